"""The process stage under SIGKILL: what looks whole is whole, and asking again ends with the same bytes.

HPC_IMAGENET_TEST_KILLS=50 sets how often a layout is killed; a failure prints the seed.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
from pathlib import Path

import killing
import psutil
import pytest
from asking import ask, run_of
from door import eventually, lives
from test_process import dataset, downloaded, made, write_small

from hpc_imagenet.config.schema import Config
from hpc_imagenet.stages import process

KILLS = int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "8"))
LAYOUTS = ("index", "shards", "folders")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "small"
    folder.mkdir()
    write_small(folder, random.Random(3))
    return folder


def asked(workspace: Path, source: Path, layout: str) -> Config:
    config = downloaded(workspace, source, layout)
    config.process.shard_size = 60_000 / 2**30
    return config


def references(tmp_path: Path, source: Path, layout: str) -> tuple[Config, dict[str, bytes], int]:
    """Return a config to be killed, what must come of it, and how many steps of file work that takes."""
    reference = asked(tmp_path / "reference", source, layout)
    folder = tmp_path / "reference" / "datasets"
    steps = killing.run_to_step("process", reference, run_of(reference), folder)
    return asked(tmp_path / "killed", source, layout), made(reference), steps


def check_after_kill(config: Config, *whole: dict[str, bytes]) -> None:
    """What looks whole is one of `whole`, whatever else lies about."""
    there = killing.snapshot(dataset(config)) if dataset(config).exists() else {}
    if "manifest.json" in there:
        assert any(made(config).items() >= expected.items() for expected in whole)
    for name in there:
        if name.endswith(".tar"):  # a shard has its name from the moment it is whole
            assert there[name] == whole[0][name]
    for split in ("train", "val"):
        if (dataset(config) / split).exists():
            of_split = {name: data for name, data in whole[0].items() if name.startswith(f"{split}/")}
            assert {name: data for name, data in there.items() if name.startswith(f"{split}/")} == of_split


@pytest.mark.slow
def test_killed_at_each_step_and_asked_again(tmp_path: Path, small: Path) -> None:
    (tmp_path / "source").mkdir()
    write_small(tmp_path / "source", random.Random(4))
    old = asked(tmp_path / "old", tmp_path / "source", "index")
    ask(process, old)
    config, expected, steps = references(tmp_path, small, "index")
    assert steps > 16, "these were not all: folder, manifest, two indexes, three more files, manifest again"
    folder = tmp_path / "killed" / "datasets"
    for step in range(1, steps + 1):
        if step % 2:  # begin with the dataset of other archives; else go on from what the last kill left
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(dataset(old).parent, folder)
        if killing.run_to_step("process", config, run_of(config), folder, step) < step:
            assert step >= steps - 2
        check_after_kill(config, expected, made(old))
    ask(process, config)
    assert made(config) == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random_steps_and_asked_again(tmp_path: Path, small: Path, layout: str) -> None:
    """Each try goes on from the one before; it begins with nothing once one is through."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    config, expected, steps = references(tmp_path, small, layout)
    folder = tmp_path / "killed" / "datasets"
    killed = 0
    while killed < KILLS:
        step = moments.randint(1, steps)
        if killing.run_to_step("process", config, run_of(config), folder, step) == step:
            killed += 1
            check_after_kill(config, expected)
        else:  # less was left to do than that many steps
            assert made(config) == expected
            shutil.rmtree(dataset(config))
    ask(process, config)
    assert made(config) == expected


@pytest.mark.slow
def test_parts_killed_at_random_moments_and_asked_again(tmp_path: Path, small: Path) -> None:
    """Two parts at once, and now and then the job that puts them together, which must refuse until it can."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    whole = asked(tmp_path / "whole", small, "shards")
    ask(process, whole)
    expected = made(whole)
    config = asked(tmp_path / "killed", small, "shards")
    config.stage.parts = 2
    jobs = []
    for part in (0, 1, None):
        config.stage.part = part
        jobs.append(copy.deepcopy(config))
    killed = 0
    while killed < KILLS:
        two = [killing.start("process", job, run_of(job)) for job in moments.sample(jobs, 2)]
        killed += sum([killing.kill_after(child, moments.random() * 0.05) for child in two])
        check_after_kill(config, expected)
        if (dataset(config) / "manifest.json").exists():
            more = made(config).keys() - expected.keys()
            # Of a part that began behind the job that ended it all, and may have been killed in its turn.
            assert all(
                re.fullmatch(r"\.scan\.(lock|npz)|\.\.scan\.npz\.[0-9a-f]+\.tmp", name) for name in more
            )
            shutil.rmtree(dataset(config))
    for job in jobs:
        ask(process, job)
    assert made(config) == expected


@pytest.mark.slow
def test_workers_of_a_killed_job_end_with_it(tmp_path: Path, small: Path) -> None:
    whole = asked(tmp_path / "whole", small, "shards")
    ask(process, whole)
    config = asked(tmp_path / "killed", small, "shards")
    config.process.workers = 2
    child = killing.start("process", config, run_of(config))
    workers: set[int] = set()
    eventually(lambda: len(workers) >= 2, again=lambda: workers.update(children(child.pid or 0)))
    assert killing.kill_after(child, 0)
    eventually(lambda: not any(map(lives, workers)))
    ask(process, config)
    assert made(config) == made(whole)


def children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
