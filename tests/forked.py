"""Processes that are forked from a server with torch imported, so that they start fast."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hpc_imagenet.stages.work.download",
        "hpc_imagenet.stages.work.process",
        "hpc_imagenet.training.fit",
        "scipy.io",
    ]
)


def run_job(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command of a foreground job in a forked process; return its exit code."""
    *start, folder, number = command
    assert start == [sys.executable, "-u", "-m", "hpc_imagenet.launch.tasks.task"]
    process = CONTEXT.Process(target=_run_task, args=(Path(folder), int(number), dict(environment)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run_task(folder: Path, number: int, environment: dict[str, str]) -> None:
    from hpc_imagenet.launch.tasks.task import run_task

    os.environ.clear()
    os.environ.update(environment)
    os.chdir("/")
    run_task(folder, number)
