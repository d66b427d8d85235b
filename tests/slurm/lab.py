"""A private Slurm cluster for tests, and the door of the package on it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from door import Door, eventually

from hpc_imagenet.cli.commands import COMMANDS

LAB = Path(__file__).resolve().parents[2] / "slurm/lab/lab"
NODES = ("n1", "n2", "n3", "n4")


class Lab:
    """One lab in a folder of its own. It goes down with this process, even if that is killed."""

    def __init__(self, folder: Path, *settings: str, more: tuple[str, ...] = ()) -> None:
        """Bring it up; `settings` are lines of slurm.conf, such as MaxArraySize=50, `more` options of up.

        Where the machine lacks packages or rights, the test is skipped with the line that says which.
        """
        self.folder = folder
        more = (*more, *(word for setting in settings for word in ("--set", setting)))
        done = self.command("up", f"--end-with={os.getpid()}", *more, code=None)
        if done.returncode == 2:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SLURM_CONF": f"{folder}/etc/slurm.conf",
            "HPC_IMAGENET_LAB": str(folder),
        }

    def command(
        self, *words: str, code: int | None = 0, seconds: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run `slurm/lab/lab WORDS` on this lab."""
        command = [str(LAB), "--dir", str(self.folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def login(
        self, *words: str, code: int | None = 0, seconds: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, which is in the nodes' network."""
        return self.command("login", *words, code=code, seconds=seconds)

    def slurm(self, *words: str, code: int | None = 0, seconds: float = 60) -> str:
        """Run one of Slurm's commands from here; return what it printed."""
        done = subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def scontrol(self, *words: str, code: int | None = 0) -> str:
        return self.slurm("scontrol", *words, code=code)

    def sbatch(self, script: str, *options: str) -> str:
        """Submit shell lines as a batch job without an output file; return its id."""
        told = self.slurm("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")
        return told.partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """Return what scontrol tells of a job, by its names: JobState, Reason, Restarts, NodeList …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.scontrol("show", "job", "--oneliner", job)))

    def told(self, job: str) -> str:
        """Return sacct's word for a job's last try, such as COMPLETED."""
        lines = self.slurm("sacct", "--noheader", "--allocations", f"--jobs={job}", "--format=State%30")
        return lines.splitlines()[-1].split()[0] if lines else ""

    def node(self, name: str) -> str:
        """Return a node's state by sinfo, such as idle, mixed* (does not answer) or down*."""
        # All nodes are asked for: of a single one Slurm 22.05 goes on to tell `mixed` after it is down.
        told = self.slurm("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T")
        return dict(line.split() for line in told.splitlines())[name]

    def crash(self, node: str) -> None:
        self.command("crash", node)

    def revive(self, node: str) -> None:
        self.command("revive", node)

    def cut(self, node: str) -> None:
        self.command("cut", node)

    def mend(self, node: str) -> None:
        self.command("mend", node)

    def lose(self, node: str) -> None:
        """Wait until Slurm has given up a node that was crashed or cut, which takes it half a minute."""
        eventually(lambda: self.node(node).startswith("down"), 180)

    def listen(self) -> socket.socket:
        """Return a socket that listens on the login node, for a server in this process.

        Jobs reach it as login:PORT; they do not reach 127.0.0.1 of this machine.
        """
        here, there = socket.socketpair(socket.AF_UNIX)
        code = (
            "import socket, sys\n"
            "s = socket.socket(); s.bind(('', 0)); s.listen(64)\n"
            "door = socket.socket(fileno=int(sys.argv[1])); socket.send_fds(door, [b'!'], [s.fileno()])"
        )
        command = [
            str(LAB),
            "--dir",
            str(self.folder),
            "login",
            sys.executable,
            "-c",
            code,
            str(there.fileno()),
        ]
        with here, there:
            subprocess.run(command, pass_fds=[there.fileno()], check=True, timeout=60)
            return socket.socket(fileno=socket.recv_fds(here, 1, 1)[1][0])

    def calm(self) -> None:
        """Bring back every node; end all jobs, those at work without the time to say farewell."""
        self.command("up")
        mine = ("--user", self.slurm("id", "-un"))
        self.slurm("scancel", *mine, "--signal=KILL", "--full", code=None)
        self.slurm("scancel", *mine, code=None)
        eventually(lambda: not self.slurm("squeue", "--noheader"), 60)


class LabDoor(Door):
    """The door of the package on a lab: what submits says cluster=lab, unless it names another."""

    def __init__(self, workspace: Path, lab: Lab) -> None:
        super().__init__(workspace)
        self.lab = lab
        self.env = {**lab.env, "HPC_IMAGENET_WORKSPACE": str(workspace)}

    def __call__(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return super().__call__(*_on_lab(words), code=code)

    def process(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return super().process(*_on_lab(words), code=code)


def _on_lab(words: tuple[str, ...]) -> tuple[str, ...]:
    submits = bool(words) and words[0] not in COMMANDS and not words[0].startswith("--")
    named = any(word.startswith("cluster=") for word in words)
    return (*words, "cluster=lab") if submits and not named else words
