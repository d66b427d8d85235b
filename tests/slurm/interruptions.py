"""A training on the lab that tests can interrupt, and a comparison of two trainings."""

from __future__ import annotations

import csv
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import torch
from command_line import eventually
from lab import Lab, LabDoor

from hpc_imagenet.io.atomic_files import read_json

# 22 steps per epoch; a checkpoint about every second, to resume from.
TRAINING = (
    *("dataset=digits", "model=shufflenet_v2_x0_5", "train.checkpoint_every_minutes=0.02"),
    *("cluster.tasks_per_node=2", "cluster.cpus_per_task=1"),
)


class Training:
    """One training in its own workspace, on the datastore of another workspace."""

    def __init__(self, lab: Lab, workspace: Path, datastores: Path, *settings: str) -> None:
        self.lab = lab
        self.cli = LabDoor(workspace, lab)
        self.cli.without_forks()
        self.cli(*TRAINING, f"datastore.url={datastores}", *settings)

    @property
    def row(self) -> dict[str, Any]:
        (row,) = self.cli.jobs()
        return row

    @property
    def folder(self) -> Path:
        return Path(self.row["dir"])

    @property
    def job(self) -> str:
        return str((read_json(self.folder / "attempts/1/submitted.json") or {})["job_id"])

    @property
    def holder(self) -> dict[str, Any]:
        return read_json(self.folder / "lease.json") or {}

    def wait_for_checkpoint(self, restarts: int = 0) -> None:
        """Wait until this start of the job (0 is the first) has saved a checkpoint."""
        last = self.folder / "checkpoints/last.ckpt"
        before = last.stat().st_mtime_ns if restarts and last.exists() else 0
        eventually(
            lambda: (
                self.holder.get("restarts") == restarts and last.exists() and last.stat().st_mtime_ns > before
            ),
            400,  # s: all trainings on this machine import torch at the same time
        )

    def tasks(self) -> list[psutil.Process]:
        """Return the running tasks of all copies of the job: the main processes, not the loader workers."""
        found = []
        for process in self.cli.processes():
            try:
                command, parent = process.cmdline(), process.parent()
                inner = parent is not None and "hpc_imagenet.launch.tasks.start_task" in parent.cmdline()
            except psutil.Error:
                continue
            if "hpc_imagenet.launch.tasks.start_task" in command and not inner and "srun" not in command[0]:
                found.append(process)
        return found

    def signal(self, number: signal.Signals, *ranks: int) -> list[psutil.Process]:
        """Send a signal to the tasks of these ranks, and return them."""
        tasks = [task for task in self.tasks() if int(task.environ()["SLURM_PROCID"]) in ranks]
        for task in tasks:
            task.send_signal(number)
        return tasks

    def until_finished(self, seconds: float = 900) -> dict[str, Any]:
        """Wait for the end; fail unless the run has finished."""
        eventually(lambda: self.row["state"] not in ("queued", "running"), seconds)
        row = self.row
        assert row["state"] == "finished", (row["reason"], self.log())
        return row

    def log(self, rank: int = 0) -> str:
        """Return the stdout and stderr of one rank in all its starts."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"attempts/1/*_{rank}_log.*")))

    def losses(self) -> dict[int, str]:
        """Return the training losses by step; fail if a step is written more than once."""
        with (self.folder / "metrics.csv").open() as file:
            lines = [line for line in csv.DictReader(file) if line["train_loss"]]
        steps = [int(line["step"]) for line in lines]
        assert steps == sorted(set(steps))
        return {int(line["step"]): line["train_loss"] for line in lines}

    def weights(self) -> dict[str, torch.Tensor]:
        content = torch.load(self.folder / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        weights: dict[str, torch.Tensor] = content["state_dict"]
        return weights

    def resumed_steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"resuming from step (\d+)", self.log())]

    def stopped_steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"stopped by \w+ after step (\d+)", self.log())]


def assert_equal(one: Training, other: Training) -> None:
    """Fail unless two trainings have bitwise equal weights and equal losses."""
    first, second = one.weights(), other.weights()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.losses() == other.losses()
    assert one.row["top1"] == other.row["top1"]
    # TensorBoard has one log folder, without version numbers.
    assert [path.name for path in one.folder.glob("tensorboard*")] == ["tensorboard"]
