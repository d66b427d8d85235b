"""One trial within its worker's process: its training, how that ended, and its own log files."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import PeerLost, Preempted, Superseded, UserError
from hpc_imagenet.io.atomic_files import is_disk_full
from hpc_imagenet.runs.attempt import FAILED, FINISHED, Attempt, Outcome
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.train_stage import TRAIN


def run_trial(config: Config, trial: Run, attempt: Attempt, dist_env: DistEnv) -> tuple[Outcome, bool]:
    """Train; what stops the worker as well is raised.

    Returns:
        How it ended, and whether that is an end that this package expects, and not an error with a traceback.
    """
    try:
        return Outcome(FINISHED, result=TRAIN.run(config, trial, dist_env)), True
    except (Preempted, PeerLost):
        raise
    except Superseded:
        if attempt.outcome is None:  # not cancelled: another process has the trial
            raise
        print("this trial was cancelled", file=sys.stderr, flush=True)
        return attempt.outcome, True
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Outcome(FAILED, str(error)), True
    except Exception as error:
        if is_disk_full(error):
            raise  # the next trial would fail as well
        traceback.print_exc()
        return Outcome(FAILED, traceback.format_exception_only(type(error), error)[-1].strip()), False


def has_lost_gpu() -> bool:
    """Whether every further call of CUDA fails in this process, as after an illegal memory access."""
    torch = sys.modules.get("torch")  # a trial may fail before it is imported
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def free_memory() -> None:
    """Free the memory of the last trial for the next one, also on the GPU for nvJPEG, cuDNN and kernels."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


@contextlib.contextmanager
def output_to(stem: Path) -> Iterator[None]:
    """Append stdout and stderr of this process, also of its libraries, to `<stem>.out` and `<stem>.err`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    try:
        for number, end in ((1, "out"), (2, "err")):
            log = os.open(f"{stem}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, number)
            os.close(log)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in saved.items():
            os.dup2(before, number)
            os.close(before)
