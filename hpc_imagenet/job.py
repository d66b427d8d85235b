"""What a node runs: frozen config → stage → outcome.

A job is named by its run's folder and the attempt's number, nothing else travels. Every task of the job comes
through here; rank 0 tells that it began and how it ended. `python -m hpc_imagenet.job RUN_FOLDER ATTEMPT` is
the same without submitit.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet import local, slurm
from hpc_imagenet.errors import Interrupted, UserError
from hpc_imagenet.runs import FAILED, FINISHED, Attempt, Run
from hpc_imagenet.world import from_environment


@dataclass(frozen=True)
class Task:
    """The callable that submitit pickles: two plain values and the name of this class."""

    run_folder: str
    attempt: int

    def __call__(self) -> dict[str, Any]:
        """Carry the attempt out; see `carry_out`."""
        return carry_out(Path(self.run_folder), self.attempt)

    def checkpoint(self) -> Any:
        """Return what submitit sends again when it requeues the job: the same; every stage can go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def carry_out(run_folder: Path, number: int) -> dict[str, Any]:
    """Run the stage that the frozen config names, in this process, and write the attempt's outcome.

    Raises:
        SystemExit: it failed for a reason that is told in one line, or was interrupted to be requeued.
        Exception: it failed otherwise; the traceback belongs to the log.
    """
    # submitit's handler swallows SIGTERM; a stage may be killed at any moment, and training sets its own.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run, world = Run(run_folder), from_environment()
    attempt = Attempt(run_folder / "attempts" / str(number))
    if ended := attempt.outcome:  # cancelled before it began
        raise SystemExit(f"this attempt was {ended.state} before it began: {ended.reason}")
    if world.main and local.begun_by_another(attempt):
        raise SystemExit("another process is at work on this attempt: leaving it alone")
    if world.main:
        attempt.start(**local.identity(), world_size=world.size)
    try:
        config = run.config()
        stage = importlib.import_module(f"hpc_imagenet.stages.{config.stage.name}")
        result: dict[str, Any] = stage.run(config, run, world)
    except Interrupted as interrupted:
        if _requeue(world.main, config.cluster.max_requeues):
            raise SystemExit(0) from None
        attempt.end(FAILED, f"{interrupted}: retry goes on from the last checkpoint")
        raise SystemExit(1) from None
    except UserError as error:
        attempt.end(FAILED, str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except BaseException as error:
        if _is_full(error):
            attempt.end(FAILED, f"no space left in {run_folder.parents[1]}: make room, then retry")
        attempt.end(FAILED, traceback.format_exception_only(type(error), error)[-1].strip())
        raise
    if world.main:
        attempt.end(FINISHED, result=result)
    return result


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind `error`; torch.save wraps it in an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _requeue(main: bool, most: int) -> bool:
    """Send an interrupted Slurm job back to the queue; False without Slurm, or after `most` times."""
    job, before = slurm.this_job(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if job is None or "SUBMITIT_LOCAL_GLOBALID" in os.environ or before >= most:
        return False
    if main:
        subprocess.run(["scontrol", "requeue", job], check=True)
    return True


if __name__ == "__main__":
    carry_out(Path(sys.argv[1]), int(sys.argv[2]))
