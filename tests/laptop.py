"""A laptop and a host behind a real sshd, both on this machine: homes, folders and settings of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Cli
from relay import Relay
from servers import SSHD, free_port, keys_for_ssh, wait_for

ROOT = Path(__file__).resolve().parents[1]
# In place of Python on the host: nothing is installed. `-m venv --clear` makes a folder with this script in
# it, `-m pip` records its arguments, and anything else runs this test's Python.
PYTHON = """#!/bin/sh
case "$1 $2 $3" in
"-m venv --clear") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-m pip --version") PIP ;;
"-m pip "*) echo "$@" >> pip.log; PIP ;;
*) exec INTERPRETER "$@" ;;
esac
"""


class Laptop(Cli):
    """`laptop.process("jobs")` runs a command that is carried out on the host.

    Attributes:
        home: home of the user on the host.
        there: the package's folder on the host.
        user: folder of the user's settings on the laptop.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        (folder / "project").mkdir(parents=True)
        super().__init__(folder / "project" / "workspace")
        self.home, self.there = home, home / "hpc_imagenet"
        self.user = folder / "config" / "hpc_imagenet"
        self.sockets = tempfile.mkdtemp(prefix="ssh")  # short: paths of sockets are limited
        self.shell = f"ssh -F {home}/ssh_config"
        self.env |= {"RSYNC_RSH": self.shell, "XDG_CONFIG_HOME": str(folder / "config")}
        self.env |= {"XDG_RUNTIME_DIR": self.sockets, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
        del self.env["HPC_IMAGENET_WORKSPACE"]
        self.make_python()
        self.host = (
            f"cluster.host: there\ncluster.host_folder: {self.there}\ncluster.host_python: {home}/python\n"
        )
        self.store(f"cluster: local\n{self.host}")

    def write_log(self, label: str, line: str) -> None:
        """Append a line to the output of a run on the host."""
        (log,) = self.there.glob(f"workspace/runs/*-{label}/attempts/1/*_0_log.out")
        with log.open("a") as file:
            file.write(f"{line}\n")

    def make_python(self, pip: str = "") -> None:
        path = self.home / "python"
        path.write_text(PYTHON.replace("INTERPRETER", sys.executable).replace("PIP", pip))
        path.chmod(0o755)

    def store(self, text: str, name: str = "hpc_imagenet.yaml") -> None:
        """Write a file of the user's settings."""
        (self.user / name).parent.mkdir(parents=True, exist_ok=True)
        (self.user / name).write_text(text)

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command whose output is not awaited."""
        command = [sys.executable, "-m", "hpc_imagenet", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(command, cwd=self.cwd, env=self.env, **pipes)

    def runs(self) -> list[str]:
        return sorted(path.name for path in self.there.glob("workspace/runs/[!.]*-*"))

    def jobs(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.process("jobs", "--json").stdout)
        return rows

    def installed(self) -> list[str]:
        """Return the arguments of pip on the host, a line per call."""
        log = self.there / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    def disconnect(self) -> None:
        command = [
            *self.shell.split(),
            "-q",
            "-o",
            f"ControlPath={self.sockets}/hpc-%C",
            "-O",
            "exit",
            "there",
        ]
        subprocess.run(command, capture_output=True, check=False)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Return the processes on the host whose command line contains `word`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                there = str(self.there) in process.environ().get("PYTHONPATH", "")
                if there and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def close(self) -> None:
        self.disconnect()
        super().close()
        shutil.rmtree(self.sockets, ignore_errors=True)


@contextlib.contextmanager
def running_host(home: Path, relay: Relay | None = None) -> Iterator[Path]:
    """Run sshd for a host with that home, behind a relay if given; yield the log of sshd."""
    if SSHD is None or not shutil.which("rsync") or not shutil.which("git"):
        pytest.skip("sshd, rsync or git is missing: apt-get install openssh-server rsync git")
    home.mkdir(parents=True)
    port = free_port()
    if relay:
        relay.target_port = port
    client = f" HostName 127.0.0.1\n Port {relay.port if relay else port}\n"
    keys_for_ssh(home, f"ListenAddress 127.0.0.1\nPort {port}\nLogLevel VERBOSE\n", client)
    log = home / "sshd.log"
    server = subprocess.Popen([SSHD, "-D", "-E", str(log), "-f", str(home / "sshd_config")])
    try:
        wait_for(port, server)
        yield log
    finally:
        server.terminate()
        server.wait()


class Terminal:
    """A command on a terminal of 80 x 24."""

    def __init__(self, laptop: Laptop, *words: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(laptop.cwd)
            os.execve(
                sys.executable,
                [sys.executable, "-m", "hpc_imagenet", *words],
                {**laptop.env, "TERM": "xterm-256color", "LINES": "24", "COLUMNS": "80"},
            )
        self.output = ""

    def read_until(self, text: str, seconds: float = 60) -> None:
        """Read output until it contains `text`."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, self.output
            assert self._read(), f"ended without {text!r}: {self.output}"

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait(self) -> int:
        """Read the rest of the output and return the exit code."""
        while self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # EIO: the command has ended
            return False
        self.output += data.decode(errors="replace")
        return bool(data)
