"""The process stage under SIGKILL: complete files are valid, and a rerun gives the same bytes.

HPC_IMAGENET_TEST_KILLS=50 sets the number of kills per layout; a failure prints the seed.
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
from command_line import eventually, is_alive
from run_stage import run_of, run_stage
from test_process import config_with_archives as _config_with_archives
from test_process import dataset, dataset_bytes, write_small

from hpc_imagenet.config.schema import Config
from hpc_imagenet.stages.work import process

KILLS = int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "8"))
LAYOUTS = ("index", "shards", "folders")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "small"
    folder.mkdir()
    write_small(folder, random.Random(3))
    return folder


def config_with_archives(workspace: Path, source: Path, layout: str) -> Config:
    config = _config_with_archives(workspace, source, layout)
    config.process.shard_size = 60_000 / 2**30
    return config


def references(tmp_path: Path, source: Path, layout: str) -> tuple[Config, dict[str, bytes], int]:
    """Return the config to kill, the expected dataset, and the number of file operations of a whole run."""
    reference = config_with_archives(tmp_path / "reference", source, layout)
    folder = tmp_path / "reference" / "datasets"
    steps = killing.run_to_step("process", reference, run_of(reference), folder)
    return config_with_archives(tmp_path / "killed", source, layout), dataset_bytes(reference), steps


def check_after_kill(config: Config, *expected: dict[str, bytes]) -> None:
    """Check that a manifest means a dataset of `expected`, and that shards and splits are complete."""
    found = killing.snapshot(dataset(config)) if dataset(config).exists() else {}
    if "manifest.json" in found:
        assert any(dataset_bytes(config).items() >= one.items() for one in expected)
    for name in found:
        if name.endswith(".tar"):  # a shard is renamed to its final name when it is complete
            assert found[name] == expected[0][name]
    for split in ("train", "val"):
        if (dataset(config) / split).exists():
            files = {name: data for name, data in expected[0].items() if name.startswith(f"{split}/")}
            assert {name: data for name, data in found.items() if name.startswith(f"{split}/")} == files


@pytest.mark.slow
def test_rerun_after_a_kill_at_each_step(tmp_path: Path, small: Path) -> None:
    (tmp_path / "source").mkdir()
    write_small(tmp_path / "source", random.Random(4))
    old = config_with_archives(tmp_path / "old", tmp_path / "source", "index")
    run_stage(process, old)
    config, expected, steps = references(tmp_path, small, "index")
    assert steps > 16, (
        "too few steps for a folder, a manifest, two indexes, three more files and the manifest again"
    )
    folder = tmp_path / "killed" / "datasets"
    for step in range(1, steps + 1):
        if step % 2:  # start from the dataset of other archives, else from the state after the last kill
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(dataset(old).parent, folder)
        if killing.run_to_step("process", config, run_of(config), folder, step) < step:
            assert step >= steps - 2
        check_after_kill(config, expected, dataset_bytes(old))
    run_stage(process, config)
    assert dataset_bytes(config) == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rerun_after_kills_at_random_steps(tmp_path: Path, small: Path, layout: str) -> None:
    """Each attempt resumes the previous one; after a complete one, the next starts from nothing."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    config, expected, steps = references(tmp_path, small, layout)
    folder = tmp_path / "killed" / "datasets"
    killed = 0
    while killed < KILLS:
        step = rng.randint(1, steps)
        if killing.run_to_step("process", config, run_of(config), folder, step) == step:
            killed += 1
            check_after_kill(config, expected)
        else:  # it finished before that step
            assert dataset_bytes(config) == expected
            shutil.rmtree(dataset(config))
    run_stage(process, config)
    assert dataset_bytes(config) == expected


@pytest.mark.slow
def test_rerun_after_kills_of_parallel_parts(tmp_path: Path, small: Path) -> None:
    """Kill two parallel jobs of three: two parts, and the final job, which fails until both are complete."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = config_with_archives(tmp_path / "whole", small, "shards")
    run_stage(process, whole)
    expected = dataset_bytes(whole)
    config = config_with_archives(tmp_path / "killed", small, "shards")
    config.stage.parts = 2
    jobs = []
    for part in (0, 1, None):
        config.stage.part = part
        jobs.append(copy.deepcopy(config))
    killed = 0
    while killed < KILLS:
        two = [killing.start("process", job, run_of(job)) for job in rng.sample(jobs, 2)]
        killed += sum([killing.kill_after(child, rng.random() * 0.05) for child in two])
        check_after_kill(config, expected)
        if (dataset(config) / "manifest.json").exists():
            extra = dataset_bytes(config).keys() - expected.keys()
            # Written by a part that started after the final job, and that may have been killed as well.
            assert all(
                re.fullmatch(r"\.scan\.(lock|npz)|\.\.scan\.npz\.[0-9a-f]+\.tmp", name) for name in extra
            )
            shutil.rmtree(dataset(config))
    for job in jobs:
        run_stage(process, job)
    assert dataset_bytes(config) == expected


@pytest.mark.slow
def test_workers_exit_when_their_job_is_killed(tmp_path: Path, small: Path) -> None:
    whole = config_with_archives(tmp_path / "whole", small, "shards")
    run_stage(process, whole)
    config = config_with_archives(tmp_path / "killed", small, "shards")
    config.process.workers = 2
    child = killing.start("process", config, run_of(config))
    workers: set[int] = set()
    eventually(lambda: len(workers) >= 2, again=lambda: workers.update(children(child.pid or 0)))
    assert killing.kill_after(child, 0)
    eventually(lambda: not any(map(is_alive, workers)))
    run_stage(process, config)
    assert dataset_bytes(config) == dataset_bytes(whole)


def children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
