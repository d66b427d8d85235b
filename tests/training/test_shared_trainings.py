"""Trainings that share a loader, through the command line: each is an ordinary run with the same result."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command_line import Cli, eventually, is_alive
from outcomes import lines
from tiny_training import write_store

from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.runs.store import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Slow enough to be interrupted. `wait` is no part of the result.
NETWORK = """
import time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(0.02)
        return super().forward(images)

def build(num_classes, width=8):
    return Slow(
        nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes),
    )

def small(num_classes): return build(num_classes, 4)
def large(num_classes): return build(num_classes, 16)
"""
SETTINGS = (
    *("datastore.name=digits", "recipe=demo", "recipe.global_batch=16", "loader.workers=1"),
    *("cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "tracker=null"),
)
MODELS = "model=shared_net:small,shared_net:build,shared_net:large"
SHARED = ("train.share_loader=true", "train.share_wait_seconds=2", "cluster=local")
EPOCHS = "recipe.epochs=8"  # of 20 steps


def prepare(cli: Cli) -> Cli:
    write_store(cli.workspace / "datastores" / "digits" / "v1", {"train": 320, "val": 60})
    (cli.cwd / "shared_net.py").write_text(NETWORK)
    return cli


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of a sweep, each with its own loader."""
    cli = prepare(Cli(tmp_path_factory.mktemp("separate") / "workspace"))
    cli("-m", *SETTINGS, MODELS, EPOCHS, "cluster=local", "cluster.parallel=3", "wait=true")
    return cli.workspace / "runs"


@pytest.fixture
def shared(cli: Cli) -> Cli:
    return prepare(cli)


def start(cli: Cli, *settings: str, wait: int = 2) -> dict[str, Run]:
    """Submit a sweep and return its runs by the names of their networks, when all have trained a while.

    A run that is held up for longer than `wait` seconds goes on with its own loader. So does one that starts
    that much later than another, on a busy machine.
    """
    shared = with_defaults(SHARED, [f"train.share_wait_seconds={wait}"])
    done = cli("-m", *SETTINGS, *shared, EPOCHS, *settings)
    runs = {
        name.partition("_net-")[2]: Run(cli.workspace / "runs" / name)
        for name in re.findall(r"^submitted +(\S+)", done.stdout, re.MULTILINE)
    }
    for run in runs.values():
        eventually(lambda run=run: run.progress.get("done", 0) > 0 or outcome(run) is not None, 300)
    return runs


def outcome(run: Run) -> Any:
    return run.attempt.outcome if run.attempt else None


def process(run: Run) -> psutil.Process:
    assert run.attempt is not None
    return psutil.Process(run.attempt.started["pid"])


def log(run: Run) -> str:
    return "".join(path.read_text() for path in sorted(run.folder.glob("attempts/*/*_log.*")))


def assert_equal(run: Run, separate: Path) -> None:
    """Fail unless a run has the weights of the same run with its own loader, bit by bit, and its metrics."""
    other = Run(separate / run.id)  # share_loader is no part of the signature
    one, two = (
        torch.load(each.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for each in (run, other)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert lines(run) == lines(other)
    assert run.attempt
    assert run.attempt.outcome
    assert run.attempt.outcome.result
    assert outcome(other).result["top1"] == run.attempt.outcome.result["top1"]


def until(cli: Cli, runs: dict[str, Run], **states: str) -> None:
    """Wait until the runs have these states."""

    def found() -> dict[str, str]:
        by_run = {row["run"]: row["state"] for row in cli.jobs()}
        return {name: by_run[run.id] for name, run in runs.items()}

    eventually(lambda: found() == {**dict.fromkeys(runs, "finished"), **states}, 400)


def test_weights_equal_those_of_separate_runs(shared: Cli, separate: Path) -> None:
    runs = start(shared, MODELS, wait=120)
    until(shared, runs)
    for run in runs.values():
        assert_equal(run, separate)
        assert "this run shares its loader" in log(run)
        assert "own loader" not in log(run)
    jobs = {
        json.loads((run.folder / "attempts/1/process.json").read_text())["job_id"] for run in runs.values()
    }
    assert len(jobs) == 1
    one = runs["small"]
    assert "one loader with" in shared("show", one.id).stdout
    (row,) = [row for row in shared.jobs() if row["run"] == one.id]
    assert sorted(row["shares_with"]) == sorted(runs[name].id for name in ("build", "large"))
    assert "already finished" in shared("-m", *SETTINGS, *SHARED, EPOCHS, MODELS).stdout


def test_killed_run_does_not_stop_the_others_and_resumes(shared: Cli, separate: Path) -> None:
    seed = int(os.environ.get("HPC_IMAGENET_SEED", random.randrange(1 << 32)))
    print(f"HPC_IMAGENET_SEED={seed}")
    draw = random.Random(seed)
    runs = start(shared, MODELS)
    name, step = draw.choice(sorted(runs)), draw.randrange(20, 100)
    eventually(lambda: runs[name].progress["done"] >= step, 300)
    process(runs[name]).kill()
    until(shared, runs, **{name: "failed"})
    (row,) = [row for row in shared.jobs() if row["run"] == runs[name].id]
    assert "ended without an outcome (SIGKILL" in row["reason"]
    assert row["failure"] == "killed"
    shared("retry", runs[name].id)
    until(shared, runs)
    for run in runs.values():
        assert_equal(run, separate)


def test_stopped_run_is_left_behind_and_goes_on_alone(shared: Cli, separate: Path) -> None:
    runs = start(shared, MODELS, wait=30)
    stopped = process(runs["build"])
    stopped.send_signal(signal.SIGSTOP)
    until(shared, runs, build="running")  # the others do not wait for it
    assert all("this run shares its loader" in log(runs[name]) for name in ("small", "large"))
    stopped.send_signal(signal.SIGCONT)
    until(shared, runs)
    for run in runs.values():
        assert_equal(run, separate)


def test_cancelled_run_does_not_stop_the_others(shared: Cli, separate: Path) -> None:
    runs = start(shared, MODELS)
    pid = process(runs["build"]).pid
    shared("cancel", runs["build"].id)
    eventually(lambda: not is_alive(pid), 60)
    until(shared, runs, build="cancelled")
    for name in ("small", "large"):
        assert_equal(runs[name], separate)


def test_diverged_run_does_not_stop_the_others(shared: Cli, separate: Path) -> None:
    shared("-m", *SETTINGS, *SHARED, EPOCHS, "model=shared_net:small", "recipe.learning_rate=0.05,1e30")
    eventually(lambda: sorted(shared.states()) == ["failed", "finished"], 400)
    good, bad = sorted(shared.jobs(), key=lambda row: row["state"], reverse=True)
    assert "is not finite" in bad["reason"]
    assert good["shares_with"] == [bad["run"]]
    assert_equal(Run(Path(good["dir"])), separate)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_stopped_job_saves_all_runs_which_resume_together(
    number: signal.Signals, shared: Cli, separate: Path
) -> None:
    shared.without_forks()
    runs = start(shared, MODELS, wait=120)
    eventually(lambda: runs["small"].progress["done"] >= 30, 300)
    (leader,) = [
        parent
        for parent in process(runs["small"]).parents()
        if "hpc_imagenet.launch.tasks.start_task" in parent.cmdline()
        and process(runs["large"]) in parent.children()
    ]
    leader.send_signal(number)
    until(shared, runs, **dict.fromkeys(runs, "failed"))
    for run in runs.values():
        assert f"stopped by {number.name} after step" in outcome(run).reason
    shared("retry", "--failed")
    until(shared, runs)
    for run in runs.values():
        assert_equal(run, separate)
        assert "resuming from step" in log(run)
        assert log(run).count("this run shares its loader") == 2


def test_runs_go_on_if_the_decoder_is_killed(shared: Cli, separate: Path) -> None:
    shared.without_forks()
    runs = start(shared, MODELS, wait=120)
    for parent in process(runs["small"]).parents()[:2]:  # the process of the job, and submitit's
        assert {"hpc_imagenet.launch.tasks.start_task", "submitit.local._local"} & set(parent.cmdline())
        parent.kill()
    until(shared, runs)
    for run in runs.values():
        assert_equal(run, separate)
        assert "own loader: the process that decodes for it has ended" in log(run)
