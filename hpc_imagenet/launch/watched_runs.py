"""What a command that waits for runs does meanwhile: it submits those that wait, and starts a killed worker.

A run waits while Slurm takes no more jobs of this user.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hpc_imagenet.launch.executors import start_queued
from hpc_imagenet.launch.states import states
from hpc_imagenet.runs.store import Run, RunStore

_SUBMIT_INTERVAL = 60.0  # s between two attempts to submit the same runs
_WORKER_INTERVAL = 5.0  # s between two looks whether a local worker runs


class WatchedRuns:
    """Runs that a command waits for, with the times when they were looked after."""

    def __init__(self) -> None:
        self._submitted = self._checked = time.monotonic()

    def keep_going(self, runs: Sequence[Run]) -> None:
        """Start a killed local worker again if one of `runs` is queued, and submit those that wait.

        The worker is looked for every 5 s. Once a minute as many waiting runs are submitted as Slurm takes.

        Raises:
            UserError: Slurm refused a job for another reason.
        """
        store = RunStore(runs[0].folder.parents[1])
        if time.monotonic() - self._checked >= _WORKER_INTERVAL:
            start_queued(store, runs)
            self._checked = time.monotonic()
        if time.monotonic() - self._submitted < _SUBMIT_INTERVAL:
            return
        from hpc_imagenet.launch.retries.retry_plan import plan_retry, send_retry  # seldom needed

        state_of = states(runs)
        waiting = [run for run in runs if state_of[run.id].waiting]
        if waiting:
            send_retry(store, plan_retry(store, waiting))
        self._submitted = time.monotonic()
