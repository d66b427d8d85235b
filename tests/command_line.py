"""The command line as tests use it: arguments, output, exit code; and killing what it left running."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from forked import forking_environment

from hpc_imagenet.cli.main import main

# Trainings within this process set these variables for its rest; jobs must choose for themselves.
SET_BY_TRAININGS = ("GLOO_SOCKET_IFNAME", "TORCHINDUCTOR_COMPILE_THREADS")


class Cli:
    """`cli("jobs")` runs `python -m hpc_imagenet jobs` on a private workspace.

    In tests the processes of its jobs are forked from one with torch imported, except after `without_forks`.
    """

    def __init__(self, workspace: Path, path: str | None = None) -> None:
        self.workspace = workspace
        self.cwd = workspace.parent
        self.env = {**os.environ, "HPC_IMAGENET_WORKSPACE": str(workspace)}
        for name in ("SLURM_JOB_ID", *SET_BY_TRAININGS):
            self.env.pop(name, None)
        if path is not None:
            self.env["PATH"] = path
        self.env |= forking_environment()

    def without_forks(self) -> None:
        """Start the processes of jobs in the ordinary way, for tests that look at or signal process trees."""
        self.env.pop("FORK_SERVER", None)

    def __call__(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command within this process, which saves the start of Python; else as `process`."""
        out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
        os.chdir(self.cwd)
        try:
            with (
                mock.patch.dict(os.environ, self.env, clear=True),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                pytest.raises(SystemExit) as end,
            ):
                main(words)
        finally:
            os.chdir(before)
        done = subprocess.CompletedProcess(words, int(end.value.code or 0), out.getvalue(), err.getvalue())
        return self._checked(done, code)

    def process(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpc_imagenet", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.cwd, env=self.env, timeout=300, check=False
        )
        return self._checked(done, code)

    def _checked(
        self, done: subprocess.CompletedProcess[str], code: int | None
    ) -> subprocess.CompletedProcess[str]:
        assert code is None or done.returncode == code, f"{done.args}\n{done.stdout}\n{done.stderr}"
        return done

    def refused(self, *words: str) -> str:
        """Run a command that must fail, and return its one error line; nothing may have been submitted."""
        before = self.runs()
        done = self(*words, code=2)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert self.runs() == before, "a refused command left a run"
        return lines[0]

    def runs(self) -> list[str]:
        return sorted(p.name for p in self.workspace.glob("runs/[!.]*-*"))

    def jobs(self) -> list[dict[str, Any]]:
        return json.loads(self("jobs", "--json").stdout)

    def states(self) -> list[str]:
        return [row["state"] for row in self.jobs()]

    def until(self, *states: str, seconds: float = 120) -> list[dict[str, Any]]:
        """Wait until the jobs, oldest first, have these states."""
        rows: list[dict[str, Any]] = []
        eventually(
            lambda: [r["state"] for r in rows] == list(states),
            seconds,
            lambda: rows.__setitem__(slice(None), self.jobs()),
        )
        return rows

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Return the processes of this workspace whose command line contains `word`."""
        found = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if str(self.workspace) in command and word in command:
                    found.append(process)
        return found

    def close(self) -> None:
        for _ in range(100):  # a worker may start another job while it is being killed
            if not (found := self.processes()):
                return
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)


def eventually(
    condition: Callable[[], bool], seconds: float = 120, again: Callable[[], object] = lambda: None
) -> None:
    """Return as soon as `condition()`; fail after `seconds`, which is a limit and not a measurement.

    A condition that takes long, as commands of Slurm do, is looked at less often.
    """
    end = time.monotonic() + seconds
    while True:
        begin = time.monotonic()
        again()
        if condition():
            return
        now = time.monotonic()
        assert now < end, "the condition was not met in time"
        time.sleep(min(max(0.1, 5 * (now - begin)), 1))


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Gate:
    """An HTTP server that blocks every request until it is opened, so that downloads wait."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting: list[str] = []  # datasets whose jobs have sent a request, in order of arrival

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/").split("/")[0]
                if name not in gate.waiting:
                    gate.waiting.append(name)
                gate.open.wait(110)
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            gate.open.set()
            server.shutdown()
            server.server_close()
