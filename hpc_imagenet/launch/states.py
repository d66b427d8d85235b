"""What has become of each run: its outcome where there is one, else the word of whoever runs it.

A state that cannot be known is never guessed to be good: a job whose process is gone without an outcome has
failed, and its reason says that it left no word.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from hpc_imagenet.launch import local_queue, slurm
from hpc_imagenet.runs.store import ENDED, FAILED, FINISHED, QUEUED, RUNNING, Attempt, Outcome, Run, RunStore

_SUBMITTING = 60.0  # s that handing an attempt over may take
VANISHED = "ended without a word (killed, out of memory, or the machine restarted): retry goes on from there"


@dataclass(frozen=True)
class State:
    """A run's state (see runs.py) and, in one line, why."""

    name: str
    reason: str = ""
    restarts: int = 0  # how often Slurm has started the attempt again

    @property
    def active(self) -> bool:
        """Whether it will go on by itself."""
        return self.name not in ENDED

    @property
    def finished(self) -> bool:
        """Whether it ended well."""
        return self.name == FINISHED


_BEGUN = State(QUEUED, "is being submitted")


def state(run: Run, since: float | None = None) -> State:
    """Return the state of one run; see `states`."""
    return states([run], since)[run.id]


def states(runs: Iterable[Run], since: float | None = None) -> dict[str, State]:
    """Return the state of each run by its id; Slurm is asked once for all of them.

    Who waits says since when (`time.monotonic`), and Slurm is asked less and less often; see `slurm.say`.
    """
    told: dict[str, State] = {}
    asked: dict[str, Attempt] = {}
    for run in runs:
        attempt = run.attempt
        if attempt is None:
            told[run.id] = _new(run)
        elif outcome := attempt.outcome:
            told[run.id] = _ended(attempt, outcome)
        else:
            asked[run.id] = attempt
    on_slurm = {
        run_id: str(attempt.submitted["job_id"])
        for run_id, attempt in asked.items()
        if attempt.submitted.get("executor") == "slurm"
    }
    answers = slurm.query_jobs(on_slurm.values(), since) if on_slurm else {}
    for run_id, attempt in asked.items():
        if run_id in on_slurm:
            told[run_id] = _on_slurm(attempt, answers.get(on_slurm[run_id]))
        else:
            told[run_id] = _here(attempt)
        if not told[run_id].active:
            # It may have ended while we asked, and what it said itself is better. On a network file system
            # the listing makes this host forget that there was no such file.
            with contextlib.suppress(OSError):
                list(attempt.folder.iterdir())
            if outcome := attempt.outcome:
                told[run_id] = _ended(attempt, outcome)
    return told


def _new(run: Run) -> State:
    with contextlib.suppress(OSError):  # nobody has asked for it yet
        if time.time() - run.folder.stat().st_mtime < _SUBMITTING:
            return _BEGUN
    return State(FAILED, "was never submitted: ask for it again")


def _ended(attempt: Attempt, outcome: Outcome) -> State:
    return State(outcome.state, outcome.reason, attempt.started.get("restarts", 0))


def _on_slurm(attempt: Attempt, answer: slurm.JobStatus | None) -> State:
    started = attempt.started
    if answer is None and slurm.is_available():  # neither squeue nor sacct knows the job any more
        return State(FAILED, attempt.last_error_line() or VANISHED, started.get("restarts", 0))
    if answer is None or not answer.state:
        name = RUNNING if started else QUEUED
        why = answer.reason if answer else "no Slurm commands here"
        return State(name, f"as last recorded: {why}", started.get("restarts", 0))
    words = attempt.last_error_line() if answer.state == FAILED else ""
    return State(answer.state, answer.reason + (f": {words}" if words else ""), answer.restarts)


def _here(attempt: Attempt) -> State:
    submitted = attempt.submitted
    if not submitted:
        if local_queue.is_alive(attempt):
            return State(RUNNING)
        if time.time() - attempt.folder.stat().st_mtime < _SUBMITTING:
            return _BEGUN
        return State(FAILED, "its submission was cut off: ask for it again")
    host = submitted.get("host")
    if host != socket.gethostname():
        name = RUNNING if attempt.started else QUEUED
        return State(name, f"as last recorded: it runs on {host}")
    if local_queue.is_alive(attempt):
        return State(RUNNING)
    if submitted["executor"] == "local" and not local_queue.process_record(attempt):
        store = RunStore(attempt.folder.parents[3])
        if not local_queue.is_worker_expected(store):
            return State(QUEUED, "nobody works on the queue: retry, or asking again, starts it")
        needs = [store.run(need) for need in Run(attempt.folder.parents[1]).info.get("needs", ())]
        unmet = [need.id for need in needs if not _ended_well(need)]
        return State(QUEUED, f"waits for {' '.join(unmet)}" if unmet else "waits for its turn")
    return State(FAILED, VANISHED)


def _ended_well(run: Run) -> bool:
    attempt = run.attempt
    outcome = attempt.outcome if attempt else None
    return outcome is not None and outcome.state == FINISHED
