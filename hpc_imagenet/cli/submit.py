"""Turn composed configs into a validated plan that can be submitted; used by the command line and the API."""

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
    """A validated plan that is not submitted yet; nothing has been written.

    Attributes:
        jobs: the jobs, each after those it needs.
        store: the runs of the workspace.
        executor: slurm, local or foreground, the same for all jobs.
        first: the first config, for the settings that all configs share (workspace, wait, dry_run).
    """

    jobs: list[Job]
    store: RunStore
    executor: str
    first: Config

    def submit(self) -> list[Submitted]:
        """Submit the jobs that are neither finished nor running; see `submission.submit_plan`.

        Raises:
            UserError: the workspace cannot be written, or Slurm refused a job.
        """
        validate.prepare_workspace(self.store.folder.parent)
        try:
            return submission.submit_plan(self.jobs, self.store, self.executor)
        except OSError as error:  # such as a disk that fills up meanwhile
            raise UserError(
                f"workspace={self.first.workspace}: {error.strerror or error}: fix it, then submit again"
            ) from None


def prepare(configs: Sequence[Config]) -> PreparedPlan:
    """Return the validated plan of all configs.

    Raises:
        UserError: an invalid job, or a setting that cannot differ between the configs.
    """
    first = configs[0]
    for setting in ("workspace", "wait", "dry_run"):
        if any(getattr(config, setting) != getattr(first, setting) for config in configs):
            raise UserError(f"{setting} cannot be swept: set one value for the whole command")
    if len({config.cluster.executor for config in configs}) > 1:
        raise UserError("cluster cannot be swept over executors: use one command per executor")
    executor = validate.check_executor(first.cluster.executor)
    store = RunStore(Path(first.workspace))
    jobs = make_plan(configs, validate.version_finder())
    validate.validate_jobs(jobs, store)
    return PreparedPlan(jobs, store, executor, first)
