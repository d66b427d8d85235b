"""Run tiny trainings, in this process or on several ranks, and compare their results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import task
import torch
from forked import CONTEXT
from servers import free_port

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.fit import fit

STEPS = 5  # per epoch of the tiny store


def new_run(folder: Path) -> Run:
    folder.mkdir()
    return Run(folder)


def train(config: Config, store: DatasetReader, run: Run) -> dict[str, Any]:
    result = fit(config, store, run, DistEnv())
    torch.set_num_threads(1)  # fit sets it to the number of CPUs
    return result


def saved(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def assert_same_training(one: Run, other: Run) -> None:
    """Compare weights, momentum, schedule and position bit by bit, and the metrics except images/s."""
    a, b = saved(one), saved(other)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    differences = {
        name: (value - b["state_dict"][name]).abs().max().item() for name, value in a["state_dict"].items()
    }
    assert not any(differences.values()), {name: value for name, value in differences.items() if value}
    states = [c["optimizer_states"][0]["state"] for c in (a, b)]
    assert all(
        torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in states[0]
    )
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["loops"] == b["loops"]  # Lightning's position
    assert lines(one) == lines(other)


def lines(run: Run) -> list[dict[str, str]]:
    with (run.folder / "metrics.csv").open(newline="") as file:
        timed = ("images_per_second", "data_wait")
        return [{k: v for k, v in line.items() if k not in timed} for line in csv.DictReader(file)]


def results(result: dict[str, Any]) -> tuple[float, float, float]:
    return result["top1"], result["top5"], result["loss"]


class Task:
    """One rank of a training in its own process."""

    def __init__(self, store: DatasetReader, run: Run, dist_env: DistEnv, setting: dict[str, Any]) -> None:
        log = run.folder.with_name(f"{run.folder.name}-{dist_env.rank}")
        self._logs = [log.with_suffix(suffix) for suffix in (".out", ".err")]
        self._process = CONTEXT.Process(
            target=task.run_rank, args=(store.folder, run, dist_env, setting, self._logs)
        )
        self._process.start()

    def wait(self) -> tuple[int, str, str]:
        """Wait for the process to exit; return its exit code, stdout and stderr."""
        self._process.join(240)
        assert self._process.exitcode is not None, "the process did not exit"
        out, err = (path.read_text() for path in self._logs)
        return self._process.exitcode, out, err


def tasks(store: DatasetReader, run: Run, size: int = 1, **setting: Any) -> list[Task]:
    """Start one training on `size` ranks."""
    port = free_port()
    dist_envs = [DistEnv(rank, size, rank, size, port=port) for rank in range(size)]
    return [Task(store, run, dist_env, setting) for dist_env in dist_envs]


def finish(ranks: list[Task]) -> list[dict[str, Any]]:
    """Wait for all ranks to succeed; return their results."""
    exits = [rank.wait() for rank in ranks]
    assert [code for code, _, _ in exits] == [0] * len(ranks), exits
    return [json.loads(out.splitlines()[-1]) for _, out, _ in exits]
