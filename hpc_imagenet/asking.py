"""Composed configs → a plan that was checked, and where it would go: for the door and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet import check, submission
from hpc_imagenet.config import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.plan import Job, plan
from hpc_imagenet.runs import Record
from hpc_imagenet.submission import Sent


@dataclass(frozen=True)
class Asked:
    """A plan that could be sent; nothing is written yet.

    `first` is the first of its configs, `executor` where it goes.
    """

    jobs: list[Job]
    record: Record
    executor: str
    first: Config

    def send(self) -> list[Sent]:
        """Submit what is not finished and not under way; see `submission.submit`.

        Raises:
            UserError: the workspace cannot be written, or Slurm refused a job.
        """
        check.workspace(self.record.folder.parent)
        try:
            return submission.submit(self.jobs, self.record, self.executor)
        except OSError as error:  # a disk that fills up under our hands
            raise UserError(
                f"workspace={self.first.workspace}: {error.strerror or error}: mend it, then ask again"
            ) from None


def asked(configs: Sequence[Config]) -> Asked:
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
    executor = check.executor(first.cluster.executor)
    record = Record(Path(first.workspace))
    jobs = plan(configs, check.finder())
    check.jobs(jobs, record)
    return Asked(jobs, record, executor, first)
