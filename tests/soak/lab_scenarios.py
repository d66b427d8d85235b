"""What is disturbed on Slurm: downloads and a training on the lab, a private cluster of four nodes."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from command_line import Cli, eventually
from interruptions import TRAINING
from lab import LAB, Lab, LabDoor
from queue_scenarios import LIMIT, Queue

from hpc_imagenet.runs.store import RunStore

_PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")  # as in slurm/lab/lab
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def is_possible() -> bool:
    """Whether the packages of the lab are installed."""
    return LAB.exists() and all(shutil.which(name, path=_PATH) for name in _PROGRAMS)


class LabDownload(Queue):
    """Two downloads on the lab: the command and tasks are killed, jobs requeued or cancelled, nodes lost."""

    turns, disturbances = 1, 2
    kinds = ("kill",) * 4 + ("terminate", "freeze", "requeue", "cancel", "crash")
    words: tuple[str, ...] = ("-m", "+stage=download", "dataset=ilsvrc", "dataset.name=a,b")
    runs = 2

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write the archives, and start the lab."""
        super().prepare(stack)
        self.words = (*self.words, f"dataset.source={self.source}")
        self.lab = _started(stack)

    @property
    def cli(self) -> Cli:
        """The command line of the workspace, on the lab."""
        return LabDoor(self.state, self.lab)

    def reset(self) -> None:
        """Restart the nodes, end all jobs, and remove the workspace."""
        self.lab.reset()
        super().reset()

    def submit(self, *words: str) -> None:
        """Submit, unless the runs are queued, running or finished."""
        self.cli(*self.words, *words, code=None)

    def disturb(self, kind: str, draw: random.Random) -> bool:
        """Requeue or cancel a job, or crash its node, which is started again when Slurm has given it up."""
        jobs = self.lab.slurm("squeue", "--noheader", "--format=%i", "--states=running").split()
        if not jobs:
            return False
        job = draw.choice(jobs)
        if kind == "requeue":
            self.lab.scontrol("requeue", job, code=None)  # it may have just ended
        elif kind == "cancel":
            self.lab.slurm("scancel", job, code=None)
        elif node := self.lab.job(job).get("NodeList"):
            self.lab.crash(node)
            self.lab.wait_until_down(node)
            self.lab.revive(node)
        return True

    def result(self) -> Any:
        """Return the runs and what they made, when Slurm's queue is empty."""
        eventually(lambda: not self.lab.slurm("squeue", "--noheader"), LIMIT)
        eventually(lambda: not self.cli.processes())
        runs = sorted(run.id for run in RunStore(self.state).unsorted())
        return runs, self.cli.states(), self.outputs()


class LabTrain(LabDownload):
    """A training of two tasks on the lab, which must end with the weights of an undisturbed one."""

    runs = 1

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Make a datastore of the digits, and start the lab."""
        site = Cli(self.folder / "site")
        site.workspace.mkdir(parents=True)
        for stage in ("download", "process", "upload"):
            site(f"+stage={stage}", "dataset=digits", "cluster=foreground")
        self.words = (*TRAINING, "recipe.epochs=2", f"datastore.url={site.workspace}/datastores")
        self.lab = _started(stack)

    def check(self) -> None:
        """Every checkpoint must be readable; at most one attempt may be without an outcome."""
        super().check()
        for path in self.state.glob("runs/*/checkpoints/*.ckpt"):
            torch.load(path, map_location="cpu", weights_only=True)

    def outputs(self) -> dict[str, bytes]:
        """Return the trained weights."""
        (path,) = self.state.glob("runs/*/checkpoints/last.ckpt")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.numpy().tobytes() for name, tensor in content["state_dict"].items()}


_LABS: list[Lab] = []


def _started(stack: contextlib.ExitStack) -> Lab:
    """Start the lab, which all scenarios share; it goes down with `stack`."""
    if not _LABS:
        # A short path, since those of sockets are limited.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True))
        lab = Lab(Path(folder), "KillWait=30")
        stack.callback(lab.command, "down", code=None)
        _LABS.append(lab)
    return _LABS[0]
