"""Run the stage of a frozen config on a node and write the attempt's outcome.

A job is identified by its run folder and the attempt's number alone. Every task of the job runs this module;
rank 0 records the start and the outcome. Without submitit the same is
`python -m hpc_imagenet.launch.task RUN_FOLDER ATTEMPT`.

A task on Slurm that stops for an external reason (a signal, a lost peer) leaves an exit code, no outcome;
requeue.py decides once, after srun, what follows.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import EXIT_REQUEUE, PeerLost, Preempted, Superseded, UserError
from hpc_imagenet.io.atomic_files import DISK_FULL_ERRNOS
from hpc_imagenet.launch import local_queue, slurm
from hpc_imagenet.launch.dist_env import from_environment
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.store import CANCELLED, FAILED, FINISHED, Attempt, Run


@dataclass(frozen=True)
class Task:
    """The callable that submitit pickles: two plain values and the name of this class."""

    run_folder: str
    attempt: int

    def __call__(self) -> dict[str, Any]:
        """Carry the attempt out; see `carry_out`."""
        return run_task(Path(self.run_folder), self.attempt)


def run_task(run_folder: Path, number: int) -> dict[str, Any]:
    """Run the stage that the frozen config names, in this process, and write the attempt's outcome.

    Raises:
        SystemExit: it failed for a reason that is told in one line, has ended before, or is to go on later.
        Exception: it failed otherwise; the traceback belongs to the log.
    """
    # submitit's handlers would swallow the first and requeue at the second. A stage may be killed at any
    # moment, and training sets its own.
    for number_of_signal in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number_of_signal, signal.SIG_DFL)
    run, world = Run(run_folder), from_environment()
    attempt = Attempt(run_folder / "attempts" / str(number))
    if ended := attempt.outcome:  # cancelled before it began, or finished by another copy of this job
        print(f"this attempt was {ended.state} before: {ended.reason}", file=sys.stderr, flush=True)
        raise SystemExit(0 if ended.state == FINISHED else 1)
    if world.is_rank_zero:
        _begin(run, attempt, world_size=world.size)
    try:
        config = run.config()
        stage = importlib.import_module(f"hpc_imagenet.stages.{config.stage.name}")
        result: dict[str, Any] = stage.run(config, run, world)
        if world.is_rank_zero:
            _still_ours(run)
            attempt.end(FINISHED, result=result)
    except Superseded as superseded:
        print(f"stepping back: {superseded}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_REQUEUE) from None
    except (Preempted, PeerLost) as reason:
        if not _on_slurm():
            attempt.end(FAILED, f"{reason}: retry goes on from the last checkpoint")
        print(reason, file=sys.stderr, flush=True)
        raise SystemExit(EXIT_REQUEUE) from None
    except UserError as error:
        attempt.end(FAILED, str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except BaseException as error:
        if _is_full(error):
            attempt.end(FAILED, f"no space left in {run_folder.parents[1]}: make room, then retry")
        attempt.end(FAILED, traceback.format_exception_only(type(error), error)[-1].strip())
        raise
    return result


def _begin(run: Run, attempt: Attempt, **details: Any) -> None:
    """Take the run over and note the start, unless there is a reason not to.

    Raises:
        SystemExit: somebody else has the run, or it has been started too often.
    """
    if local_queue.started_elsewhere(attempt):
        raise SystemExit("another process is at work on this attempt: leaving it alone")
    if (newest := run.attempt) and newest.number > attempt.number:
        # Its submission was cut off and asked for again: two attempts never write one run.
        attempt.end(CANCELLED, f"attempt {newest.number} took its place")
        raise SystemExit(f"attempt {newest.number} took the place of this one")
    if not attempt.submitted and (job := slurm.this_job()):
        # The command that sent this job was killed before it could note its id.
        attempt.submit("slurm", job_id=job)
    try:
        run.lease = lease.acquire(run.folder, attempt.number)
    except Superseded as superseded:
        print(f"stepping back: {superseded}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_REQUEUE) from None
    if step := slurm.this_step():
        details["step"] = step
    attempt.start(**local_queue.process_identity(), **details)
    most = run.cluster().max_requeues
    if _on_slurm() and lease.restart_count() > most:
        reason = (
            f"requeued {lease.restart_count()} times, more than cluster.max_requeues={most}: retry goes on"
        )
        attempt.end(FAILED, reason)
        raise SystemExit(reason)


def _still_ours(run: Run) -> None:
    if run.lease:
        run.lease.check()


def _on_slurm() -> bool:
    """Whether this is a task of a Slurm job; submitit's local jobs may run inside an allocation."""
    return slurm.this_job() is not None and "SUBMITIT_LOCAL_GLOBALID" not in os.environ


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind `error`; torch.save wraps it in an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    run_task(Path(sys.argv[1]), int(sys.argv[2]))
