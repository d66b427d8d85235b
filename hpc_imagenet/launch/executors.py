"""The table of executors by name: those of `config.schema.EXECUTORS`."""

from __future__ import annotations

from collections.abc import Iterable

from hpc_imagenet.io.ownership import owner_writes
from hpc_imagenet.launch.executor import Executor
from hpc_imagenet.launch.foreground_executor import ForegroundExecutor
from hpc_imagenet.launch.local_jobs.local_executor import LocalExecutor
from hpc_imagenet.launch.slurm_jobs.slurm_executor import SlurmExecutor
from hpc_imagenet.launch.trial_executor import TrialExecutor
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import Run, RunStore

EXECUTORS: dict[str, Executor] = {
    LocalExecutor.name: LocalExecutor(),
    SlurmExecutor.name: SlurmExecutor(),
    ForegroundExecutor.name: ForegroundExecutor(),
}
_TRIALS = TrialExecutor()  # no setting selects it: a search starts its trials by itself


def executor_of(attempt: Attempt) -> Executor:
    """Return the executor of a submitted attempt; of another version's, which is unknown, foreground."""
    name = str(attempt.submitted.get("executor", ""))
    if name == _TRIALS.name:
        return _TRIALS
    return EXECUTORS.get(name, EXECUTORS[ForegroundExecutor.name])


def start_queued(store: RunStore, runs: Iterable[Run]) -> None:
    """Make sure that something starts those of the runs which are queued already, such as a local worker."""
    attempts = [run.attempt for run in runs if run.is_mine]
    with owner_writes():
        for executor in {executor_of(attempt) for attempt in attempts if attempt and not attempt.outcome}:
            executor.start_queued(store)
