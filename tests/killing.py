"""Run a stage in a process of its own, to be killed at any moment."""

from __future__ import annotations

import multiprocessing
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from hpc_imagenet.config import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs import Run
from hpc_imagenet.stages import download, process
from hpc_imagenet.world import World

# Forked from a server without threads that has torch and the rest imported: a start takes milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_STAGES = {"download": download, "process": process}
_CONTEXT.set_forkserver_preload(
    [
        *(stage.__name__ for stage in _STAGES.values()),
        "hpc_imagenet.archives.digits",
        "hpc_imagenet.training.meta_bin",
    ]
)


def start(stage: str, config: Config, run: Run) -> BaseProcess:
    """Start a stage; wait until its process has begun with it."""
    began = _CONTEXT.Event()
    child = _CONTEXT.Process(target=_run, args=(stage, config, run, began))
    child.start()
    if not began.wait(60):
        raise TimeoutError("the process did not begin")
    return child


def kill_after(child: BaseProcess, seconds: float) -> bool:
    """Send SIGKILL after that time; return whether it was still at work."""
    deadline = time.monotonic() + seconds
    while child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    was_alive = child.is_alive()
    child.kill()
    child.join()
    return was_alive and child.exitcode == -9


def snapshot(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the bytes of every file below `folder`, hidden ones too, except those named in `but`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def _run(stage: str, config: Config, run: Run, began) -> None:  # type: ignore[no-untyped-def]
    began.set()
    try:
        _STAGES[stage].run(config, run, World())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
