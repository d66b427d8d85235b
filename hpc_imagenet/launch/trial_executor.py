"""The executor of trials: their attempts run within the job of a search's worker, whose state is theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from hpc_imagenet.launch.executor import Executor, State
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, QUEUED, RUNNING, Attempt
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.search.study_files import EXECUTOR


class TrialExecutor(Executor):
    """States of trials, and their cancellation; only a worker (`stages/work/search.py`) starts them."""

    name = EXECUTOR
    in_background = True

    def submit(
        self, store: RunStore, attempts: Sequence[tuple[Run, Attempt]], state_of: Mapping[str, State]
    ) -> None:
        """Raise: no setting selects this executor."""
        raise AssertionError("trials are started by a search")

    def states(self, attempts: Mapping[str, Attempt], since: float | None) -> dict[str, State]:
        """Return the states of trials: running as long as their worker is."""
        from hpc_imagenet.launch.states import states  # here: it imports the executors

        workers = {key: _worker(attempt) for key, attempt in attempts.items()}
        state_of = states({run.id: run for run in workers.values()}.values(), since)
        return {key: _state(state_of[workers[key].id], attempt) for key, attempt in attempts.items()}

    def cancel(self, run: Run, attempt: Attempt, reason: str, ended: datetime | None = None) -> None:
        """Write the outcome and take the lease, at which the worker goes on with its next trial."""
        attempt.end(CANCELLED, reason, ended=ended)
        lease.revoke(run.folder, attempt.number)


def _worker(attempt: Attempt) -> Run:
    return RunStore(attempt.folder.parents[3]).run(str(attempt.submitted.get("worker")))


def _state(worker: State, attempt: Attempt) -> State:
    restarts = attempt.started.get("restarts", 0)
    if worker.name == RUNNING:
        return State(RUNNING, worker.reason, restarts)
    if worker.active:
        return State(QUEUED, f"its worker is queued: {worker.reason}", restarts)
    ended = f"its worker {attempt.submitted.get('worker')} has ended"
    if worker.name == CANCELLED:
        return State(CANCELLED, f"{ended}: {worker.reason}", restarts)
    return State(FAILED, f"{ended}: submit the search again, and another one goes on", restarts)
