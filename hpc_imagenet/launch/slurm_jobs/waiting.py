"""Runs that wait because Slurm takes no more jobs of this user: what is printed, and when they are sent."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.submission import Submitted
from hpc_imagenet.runs.store import Run, RunStore

_INTERVAL = 60.0  # s between two attempts to submit the same runs


def describe_waiting(entries: Sequence[Submitted], command: str = "") -> str:
    """Return one line about the runs that wait, with the command that submits them; empty if there are none.

    Args:
        entries: what a submission or a retry did.
        command: the arguments of `retry`; empty: the same command again.
    """
    waiting = [entry.run for entry in entries if entry.action == "waiting"]
    if not waiting:
        return ""
    attempt = waiting[0].attempt
    reason = attempt.waiting.removeprefix("waiting: ") if attempt else ""
    count = f"{len(waiting)} of {len(entries)} runs wait" if len(entries) > 1 else "the run waits"
    again = f"python -m hpc_imagenet retry {command}" if command else "this command again"
    return f"{count}: {reason}: when jobs have ended, {again} submits more"


class WaitingRuns:
    """Submits runs that wait, for commands that stay until all runs have ended."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def submit(self, runs: Sequence[Run]) -> None:
        """Submit those of `runs` that wait, as far as the limit allows, at most once a minute.

        Raises:
            UserError: Slurm refused a job for another reason.
        """
        if time.monotonic() - self._last < _INTERVAL:
            return
        from hpc_imagenet.launch.retries.retry_plan import plan_retry, send_retry

        state_of = states(runs)
        waiting = [run for run in runs if state_of[run.id].waiting]
        if waiting:
            store = RunStore(runs[0].folder.parents[1])
            send_retry(store, plan_retry(store, waiting))
        self._last = time.monotonic()
