"""Trainings of the tiny store, and what is left of them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from servers import free_port

from hpc_imagenet.config import Config
from hpc_imagenet.datastore.store import Store
from hpc_imagenet.runs import Run
from hpc_imagenet.training.fit import fit
from hpc_imagenet.world import World

STEPS = 5  # an epoch of the tiny store; two epochs
HERE = Path(__file__).parent


def begin(folder: Path) -> Run:
    folder.mkdir()
    return Run(folder)


def train(config: Config, store: Store, run: Run) -> dict[str, Any]:
    result = fit(config, store, run, World())
    torch.set_num_threads(1)  # fit takes all there are
    return result


def saved(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def assert_same_training(one: Run, other: Run) -> None:
    """Weights, momentum, schedule and position bit for bit; the same lines of metrics but for the speed."""
    a, b = saved(one), saved(other)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    moments = [c["optimizer_states"][0]["state"] for c in (a, b)]
    assert all(
        torch.equal(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0]
    )
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["loops"] == b["loops"]  # where Lightning believes to be
    assert lines(one) == lines(other)


def lines(run: Run) -> list[dict[str, str]]:
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in csv.DictReader(file)]


def results(result: dict[str, Any]) -> tuple[float, float, float]:
    return result["top1"], result["top5"], result["loss"]


def tasks(store: Store, run: Run, size: int = 1, **setting: Any) -> list[subprocess.Popen[str]]:
    """One training on `size` ranks; `python tests/training/task.py` is one rank."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                HERE / "task.py",
                store.folder,
                run.folder,
                json.dumps([rank, size, port, setting]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    told = [process.communicate(timeout=240) for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), told
    return [json.loads(out.splitlines()[-1]) for out, _ in told]
