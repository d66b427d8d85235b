"""Composed configs → a plan that was checked, and where it would go: for the door and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import submission, validate
from hpc_imagenet.launch.submission import Submitted
from hpc_imagenet.runs.plan import Job, make_plan
from hpc_imagenet.runs.store import RunStore


@dataclass(frozen=True)
class PreparedPlan:
    """A plan that could be sent; nothing is written yet.

    `first` is the first of its configs, `executor` where it goes.
    """

    jobs: list[Job]
    store: RunStore
    executor: str
    first: Config

    def submit(self) -> list[Submitted]:
        """Submit what is not finished and not under way; see `submission.submit`.

        Raises:
            UserError: the workspace cannot be written, or Slurm refused a job.
        """
        validate.prepare_workspace(self.store.folder.parent)
        try:
            return submission.submit_plan(self.jobs, self.store, self.executor)
        except OSError as error:  # a disk that fills up under our hands
            raise UserError(
                f"workspace={self.first.workspace}: {error.strerror or error}: mend it, then ask again"
            ) from None


def prepare(configs: Sequence[Config]) -> PreparedPlan:
    """Return the checked plan of all configs.

    Raises:
        UserError: one of its jobs could not run, or the command cannot be one command.
    """
    first = configs[0]
    for setting in ("workspace", "wait", "dry_run"):
        if any(getattr(config, setting) != getattr(first, setting) for config in configs):
            raise UserError(f"{setting} cannot be swept: one value for the whole command")
    if len({config.cluster.executor for config in configs}) > 1:
        raise UserError("cluster cannot be swept over executors: one command a cluster")
    executor = validate.check_executor(first.cluster.executor)
    store = RunStore(Path(first.workspace))
    jobs = make_plan(configs, validate.version_finder())
    validate.validate_jobs(jobs, store)
    return PreparedPlan(jobs, store, executor, first)
