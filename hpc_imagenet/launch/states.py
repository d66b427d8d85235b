"""A run's state: its recorded outcome, else what its executor reports.

An unknown end is never assumed to be good: a job whose process ended without an outcome has failed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from hpc_imagenet.launch.executor import Executor, State
from hpc_imagenet.launch.executors import executor_of
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.runs.attempt import FAILED, QUEUED, RUNNING, Attempt, Outcome
from hpc_imagenet.runs.store import Run

_SUBMITTING = 60.0  # s that a submission may take
_CLOCK_AHEAD = 3600.0  # s by which the clock of another machine or of a file server may be ahead
_BEING_SUBMITTED = State(QUEUED, "is being submitted")


def state(run: Run, since: float | None = None) -> State:
    """Return the state of one run; see `states`."""
    return states([run], since)[run.id]


def states(runs: Iterable[Run], since: float | None = None) -> dict[str, State]:
    """Return the state of each run by its id, with at most one query to each executor.

    Args:
        runs: runs of one workspace.
        since: when the caller began polling (`time.monotonic`); Slurm's replies are then cached, as in
            `slurm.run_command`.
    """
    result: dict[str, State] = {}
    unfinished: dict[str, Attempt] = {}
    by_executor: dict[Executor, dict[str, Attempt]] = {}
    for run in runs:
        attempt = run.attempt
        if attempt is None:
            result[run.id] = _state_without_attempt(run)
        elif outcome := attempt.outcome:
            result[run.id] = _state_from_outcome(attempt, outcome)
        else:
            unfinished[run.id] = attempt
            if attempt.submitted:
                by_executor.setdefault(executor_of(attempt), {})[run.id] = attempt
            elif reason := attempt.waiting:
                result[run.id] = State(QUEUED, reason, waiting=True)
            else:
                result[run.id] = _state_of_submission(attempt)
    for executor, attempts in by_executor.items():
        result |= executor.states(attempts, since)
    for run_id, attempt in unfinished.items():
        if not result[run_id].active:
            # It may have ended during the query, and its own outcome is better. Listing the folder makes a
            # network file system drop its cached "no such file".
            with contextlib.suppress(OSError):
                list(attempt.folder.iterdir())
            if outcome := attempt.outcome:
                result[run_id] = _state_from_outcome(attempt, outcome)
    return result


def _state_without_attempt(run: Run) -> State:
    with contextlib.suppress(OSError):  # the run folder does not exist
        if _is_new(run.folder):
            return _BEING_SUBMITTED
    return State(FAILED, "was never submitted: submit it again")


def _state_from_outcome(attempt: Attempt, outcome: Outcome) -> State:
    return State(outcome.state, outcome.reason, attempt.started.get("restarts", 0))


def _state_of_submission(attempt: Attempt) -> State:
    """Return the state of an attempt without a submitted.json."""
    if local_queue.is_alive(attempt):
        return State(RUNNING)
    with contextlib.suppress(OSError):  # it has just been deleted
        if _is_new(attempt.folder):
            return _BEING_SUBMITTED
    return State(FAILED, "its submission was interrupted: submit it again")


def _is_new(folder: Path) -> bool:
    """Whether a submission may still be writing a folder; not one of the far future: a clock was set back."""
    return -_CLOCK_AHEAD < time.time() - folder.stat().st_mtime < _SUBMITTING
