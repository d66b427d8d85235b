"""The interface of an executor: submit attempts, report their states, cancel them.

An executor is one file with a class `…Executor`, one line in `executors.py` and its name in
`config.schema.EXECUTORS`.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.io.child_environment import environment_without_secrets
from hpc_imagenet.runs.attempt import ENDED, FINISHED, Attempt
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore

if TYPE_CHECKING:
    from hpc_imagenet.launch.submission import Submitted


@dataclass(frozen=True)
class State:
    """A run's state, one of those in runs/attempt.py, and a one-line reason."""

    name: str
    reason: str = ""
    restarts: int = 0  # number of requeues of the attempt by Slurm
    waiting: bool = False  # recorded as queued, but Slurm has not taken the job: a limit was reached

    @property
    def active(self) -> bool:
        """Whether the executor has it: queued or running."""
        return not self.ended and not self.waiting

    @property
    def ended(self) -> bool:
        """Whether it has finished, failed, or was cancelled or pruned."""
        return self.name in ENDED

    @property
    def finished(self) -> bool:
        """Whether it ended successfully."""
        return self.name == FINISHED


class JobsRefused(UserError):
    """An executor refused jobs; the others are submitted.

    Attributes:
        errors: one for each refusal.
        entries: what became of each run of the command; known once `submission` or `retry_plan` raises it.
    """

    def __init__(self, errors: Sequence[UserError], entries: Sequence[Submitted] = ()) -> None:
        submitted = sum(entry.action == "submitted" for entry in entries)
        counts = {"refused": len(errors) - 1, "submitted": submitted}
        beside = ", ".join(f"{name} beside it: {count}" for name, count in counts.items() if count)
        super().__init__(f"{errors[0]} ({beside})" if beside else str(errors[0]))
        self.errors, self.entries = list(errors), list(entries)


class Executor(Protocol):
    """What executes jobs.

    Attributes:
        in_background: whether `submit` returns before the jobs have ended.
    """

    in_background: bool

    def check_available(self) -> None:
        """Raise a UserError if jobs cannot be submitted from this machine."""
        return  # the default: nothing to do

    def check_settings(self, stage: str, cluster: Cluster, shares_loader: bool = False) -> None:
        """Raise a UserError for cluster settings with which a job of `stage` cannot be submitted.

        Args:
            stage: name of the stage.
            cluster: cluster settings of the stage.
            shares_loader: whether it is one of several trainings with one loader, each one process.
        """
        return  # the default: nothing to do

    def check_need(self, run_id: str, need: Run) -> None:
        """Raise a UserError if a job of run `run_id` cannot wait for the active run `need`."""
        return  # the default: nothing to do

    def submit(
        self, store: RunStore, attempts: Sequence[tuple[Run, Attempt]], state_of: Mapping[str, State]
    ) -> None:
        """Submit attempts and record it in their submitted.json.

        Args:
            store: the workspace's runs.
            attempts: attempts with their runs; a run comes after those it needs.
            state_of: states at the beginning of the command, of every run that is needed.

        Raises:
            JobsRefused: an attempt was refused: it is marked as failed, those that need it as cancelled, and
                the others are submitted.
            UserError: nothing was submitted.

        Beyond a limit of submitted jobs attempts are marked as waiting (`Attempt.wait`).
        """

    def states(self, attempts: Mapping[str, Attempt], since: float | None) -> dict[str, State]:
        """Return the states of submitted attempts without an outcome, by the keys of `attempts`.

        Args:
            attempts: the attempts.
            since: when the caller began polling, as in `states.states`.
        """

    def cancel(self, run: Run, attempt: Attempt, reason: str, ended: datetime | None = None) -> None:
        """End an active attempt and write its outcome, with the time `ended`, or now.

        Raises:
            UserError: it cannot be cancelled from this machine.
        """

    def end_jobs(self, attempts: Sequence[tuple[Run, Attempt]]) -> set[str]:
        """End the jobs of several active attempts with one command, where that is possible.

        Returns:
            Ids of the runs whose jobs are ended. Their outcome is not written; the others need `cancel`.
        """
        return set()

    def start_queued(self, store: RunStore) -> None:
        """Make sure that something starts the attempts which are queued already."""
        return  # the default: nothing to do

    def preview(self, store: RunStore, jobs: Sequence[tuple[Job, Sequence[str]]]) -> Iterator[str]:
        """Yield lines for a dry run about jobs that would be submitted, given with the runs they wait for."""
        yield from ()

    def expected_starts(self, store: RunStore, jobs: Sequence[tuple[Job, Sequence[str]]]) -> dict[str, str]:
        """Return the reply, by run id, about when jobs would start; empty where nothing is known."""
        return {}


def setting_name(cluster: Cluster, stage: str, name: str) -> str:
    """Return the full name of a cluster setting: `cluster.<name>`, or that of the stage if it has its own."""
    return f"cluster.stage.{stage}.{name}" if name in cluster.stage.get(stage, {}) else f"cluster.{name}"


def override_of(setting: str, value: object) -> str:
    """Return the word that sets a setting; with ++ below cluster.stage, where it may be new or in a file."""
    return f"{'++' if setting.startswith('cluster.stage.') else ''}{setting}={value}"


@functools.cache
def code_version() -> dict[str, str]:
    """Return the version of the package and, of a git checkout, the commit; for submitted.json.

    On cluster.host also the folder of the code, which is never changed, and its difference to the commit.
    """
    from hpc_imagenet import __version__  # reads the metadata of the installed package, which takes a while

    code = {"version": __version__}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        env = environment_without_secrets()
        code["commit"] = subprocess.run(
            command, capture_output=True, text=True, check=False, env=env
        ).stdout.strip()
    elif sent := read_json(root / "code.json"):  # sent from another machine (remote/parcels.py)
        code |= {**sent, "folder": str(root)}
        if (root / "difference.patch").exists():
            code["difference"] = str(root / "difference.patch")
    return code
