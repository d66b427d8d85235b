"""A private Slurm cluster (lab) for tests, and the command line of the package on it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SET_BY_TRAININGS, Cli, eventually
from forked import forking_environment

from hpc_imagenet.cli.commands import COMMANDS

LAB = Path(__file__).resolve().parents[2] / "slurm/lab/lab"
NODES = ("n1", "n2", "n3", "n4")


class Lab:
    """One lab in its own folder. It is shut down when this process ends, even if it is killed."""

    def __init__(self, folder: Path, *settings: str, options: tuple[str, ...] = ()) -> None:
        """Start the lab; skip the test if the machine lacks packages or rights.

        Args:
            folder: folder of the lab.
            settings: lines of slurm.conf, such as MaxArraySize=50.
            options: further options of `lab up`.
        """
        self.folder = folder
        options = (*options, *(word for setting in settings for word in ("--set", setting)))
        done = self.command("up", f"--end-with={os.getpid()}", *options, code=None)
        if done.returncode == 2:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        others = ("SLURM_", "SBATCH_", *SET_BY_TRAININGS)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        self.env |= {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SLURM_CONF": f"{folder}/etc/slurm.conf",
            "HPC_IMAGENET_LAB": str(folder),
        }

    def command(
        self, *words: str, code: int | None = 0, seconds: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run `slurm/lab/lab WORDS` on this lab and check its exit code."""
        command = [str(LAB), "--dir", str(self.folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def login(
        self, *words: str, code: int | None = 0, seconds: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, which is in the network of the nodes."""
        return self.command("login", *words, code=code, seconds=seconds)

    def slurm(self, *words: str, code: int | None = 0, seconds: float = 60) -> str:
        """Run one of Slurm's commands on this machine and return its stdout."""
        done = subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def scontrol(self, *words: str, code: int | None = 0) -> str:
        return self.slurm("scontrol", *words, code=code)

    def sbatch(self, script: str, *options: str) -> str:
        """Submit shell lines as a batch job without an output file; return its id."""
        output = self.slurm("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")
        return output.partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job in scontrol: JobState, Reason, Restarts, NodeList …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.scontrol("show", "job", "--oneliner", job)))

    def final_state(self, job: str) -> str:
        """Return sacct's state of the last start of a job, such as COMPLETED."""
        lines = self.slurm("sacct", "--noheader", "--allocations", f"--jobs={job}", "--format=State%30")
        return lines.splitlines()[-1].split()[0] if lines else ""

    def node(self, name: str) -> str:
        """Return a node's state in sinfo, such as idle, mixed* (does not answer) or down*."""
        # Query all nodes: for a single node sinfo 22.05 still prints `mixed` after it is down.
        output = self.slurm("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T")
        return dict(line.split() for line in output.splitlines())[name]

    def crash(self, node: str) -> None:
        self.command("crash", node)

    def revive(self, node: str) -> None:
        self.command("revive", node)

    def cut(self, node: str) -> None:
        self.command("cut", node)

    def reconnect(self, node: str) -> None:
        self.command("reconnect", node)

    def wait_until_down(self, node: str) -> None:
        """Wait until Slurm marks a crashed or disconnected node as down, which takes it half a minute."""
        eventually(lambda: self.node(node).startswith("down"), 180)

    def listen(self) -> socket.socket:
        """Return a listening socket of the login node, for a server in this process.

        Jobs reach it as login:PORT; they cannot reach 127.0.0.1 of this machine.
        """
        receiver, sender = socket.socketpair(socket.AF_UNIX)
        code = (
            "import socket, sys\n"
            "s = socket.socket(); s.bind(('', 0)); s.listen(64)\n"
            "sender = socket.socket(fileno=int(sys.argv[1])); socket.send_fds(sender, [b'!'], [s.fileno()])"
        )
        command = [
            str(LAB),
            "--dir",
            str(self.folder),
            "login",
            sys.executable,
            "-c",
            code,
            str(sender.fileno()),
        ]
        with receiver, sender:
            subprocess.run(command, pass_fds=[sender.fileno()], check=True, timeout=60)
            return socket.socket(fileno=socket.recv_fds(receiver, 1, 1)[1][0])

    def reset(self) -> None:
        """Restart every node and end all jobs; running ones with SIGKILL, without a grace period."""
        self.command("up")
        user = ("--user", self.slurm("id", "-un"))
        self.slurm("scancel", *user, "--signal=KILL", "--full", code=None)
        self.slurm("scancel", *user, code=None)
        eventually(lambda: not self.slurm("squeue", "--noheader"), 60)


class LabDoor(Cli):
    """The command line on a lab: submitting commands get cluster=lab unless they set another cluster."""

    def __init__(self, workspace: Path, lab: Lab) -> None:
        super().__init__(workspace)
        self.lab = lab
        self.env = {**lab.env, "HPC_IMAGENET_WORKSPACE": str(workspace), **forking_environment()}

    def __call__(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return super().__call__(*_on_lab(words), code=code)

    def process(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return super().process(*_on_lab(words), code=code)


def _on_lab(words: tuple[str, ...]) -> tuple[str, ...]:
    submits = bool(words) and words[0] not in COMMANDS and not words[0].startswith("--")
    named = any(word.startswith("cluster=") for word in words)
    return (*words, "cluster=lab") if submits and not named else words
