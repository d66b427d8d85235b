"""Run a command of a benchmark with a time limit, so that a way that hangs costs its own row only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

LIMIT = 600.0  # s that a way may take
TIMED_OUT = "timed out"  # in the row of a way


def run_limited(
    command: Sequence[str | Path], limit: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; return its exit code and output.

    Args:
        command: the program and its arguments.
        limit: s after which it is killed with all its descendants.
        env: its environment; None: that of this process.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    return finish(start(command, env), limit)


def start(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a session of its own, for `finish`."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Wait for a command of `start`; see `run_limited`."""
    try:
        output, errors = process.communicate(timeout=limit)
    except BaseException:
        _kill_all(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a process with its descendants, also those that started sessions of their own."""
    with contextlib.suppress(psutil.Error):
        whole = psutil.Process(process.pid)
        whole.suspend()  # so that it starts no more of them
        for child in whole.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
