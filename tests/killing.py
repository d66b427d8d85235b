"""Run a data stage in a separate process and kill it at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import CONTEXT

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import download, process

_STAGES = {"download": download, "process": process}

# Audit events of Python for files and folders that are created, opened, renamed or removed.
_STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")


def start(stage: str, config: Config, run: Run) -> BaseProcess:
    """Start a stage and wait until its process has begun."""
    child, _ = _start(stage, config, run, None, 0)
    return child


def kill_after(child: BaseProcess, seconds: float) -> bool:
    """Send SIGKILL after `seconds`; return whether the stage was still running."""
    deadline = time.monotonic() + seconds
    while child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def kill_when(child: BaseProcess, reached: Callable[[], bool]) -> bool:
    """Send SIGKILL as soon as `reached()`; return whether the stage was still running."""
    while child.is_alive() and not reached():
        time.sleep(0.001)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def run_to_step(stage: str, config: Config, run: Run, below: Path, last: int = 0) -> int:
    """Run a stage and send it SIGKILL at file operation number `last` below a folder; 0: never.

    Returns:
        Number of file operations begun: less than `last` if the stage ended before.
    """
    child, steps = _start(stage, config, run, below, last)
    child.join(180)
    killed = bool(last) and steps.value == last
    if child.exitcode != (-signal.SIGKILL if killed else 0):
        raise RuntimeError(f"exit code {child.exitcode} at step {steps.value}")
    return int(steps.value)


def snapshot(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the bytes of every file below `folder`, also hidden ones, except those named in `but`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def _start(stage: str, config: Config, run: Run, below: Path | None, last: int) -> tuple[BaseProcess, Any]:
    began, steps = CONTEXT.Event(), CONTEXT.Value("i", 0)
    child = CONTEXT.Process(target=_run, args=(stage, config, run, began, steps, str(below), last))
    child.start()
    if not began.wait(180):
        raise TimeoutError("the process did not start")
    return child, steps


def _run(stage: str, config: Config, run: Run, began: Any, steps: Any, below: str, last: int) -> None:
    def count(event: str, args: tuple[Any, ...]) -> None:
        if event in _STEPS and str(args[0]).startswith(below):
            steps.value += 1
            if steps.value == last:
                os.kill(os.getpid(), signal.SIGKILL)

    began.set()
    sys.addaudithook(count)
    try:
        _STAGES[stage].run(config, run, DistEnv())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
