"""A job of several tasks begins when all its nodes have copies of a version that cannot be read otherwise."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import eventually
from sample_dataset import link_version, make_dataset

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Cluster, Config, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.node_cache.staging import StagedShards, StagingIntervals
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.versions import Version
from hpc_imagenet.errors import Preempted
from hpc_imagenet.runs.store import Progress, Run
from hpc_imagenet.stages.work import evaluate, node_copies, price, train

PORT = 12_345
COPYING, WAITING = "copying images to this node", "waiting for the copies of 1 of 2 nodes"


class HeldCopier:
    """Copies shards of a version once `released` is set."""

    def __init__(self, version: Version) -> None:
        self.version, self.released = version, threading.Event()

    def fetch(self, file: File, target: Path) -> None:
        self.released.wait()
        self.version.backend.fetch(f"{self.version.path}/{file.path}", file, target, lambda done: None)

    def hash(self, path: Path, file: File) -> str:
        raise AssertionError

    def close(self) -> None:
        self.released.set()


@pytest.fixture
def version(tmp_path: Path) -> Version:
    make_dataset(tmp_path / "workspace")
    link_version(tmp_path / "workspace" / "datasets" / "digits", tmp_path / "datastores" / "digits" / "v1")
    return versions.open_version(Datastore("digits", str(tmp_path / "datastores")))


@pytest.fixture
def copier(version: Version) -> HeldCopier:
    return HeldCopier(version)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "runs" / "abc-train")
    run.new_attempt()
    return run


@contextlib.contextmanager
def opened(version: Version, scratch: Path, copier: HeldCopier) -> Iterator[DatasetReader]:
    """Open a version as one that can be read from copies only."""
    assert version.folder is not None
    shards, intervals = version.manifest.shards, StagingIntervals(0.01, 0.01, 0.01)
    staged = StagedShards(None, NodeCache(scratch), shards, copier, intervals)
    with contextlib.closing(staged):
        yield DatasetReader(version.folder, staged)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [train, price, evaluate])
def test_no_task_computes_before_all_nodes_have_their_copies(
    stage: ModuleType,
    version: Version,
    copier: HeldCopier,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[Run] = []

    def compute(config: Config, store: DatasetReader, run: Run, *rest: Any) -> dict[str, Any]:
        begun.append(run)
        return {"images_per_second": 1.0}

    def open_dataset(
        version: Version, cluster: Cluster, stages: bool, splits: Sequence[str]
    ) -> contextlib.AbstractContextManager[DatasetReader]:
        return opened(version, tmp_path / "disk", copier)

    monkeypatch.setattr("hpc_imagenet.training.fit.fit", compute)
    monkeypatch.setattr("hpc_imagenet.training.score.score", compute)
    monkeypatch.setattr(evaluate, "check_fingerprint", lambda config: None)
    monkeypatch.setattr(stage, "open_dataset", open_dataset)
    monkeypatch.setattr(node_copies, "INTERVAL", 0.01)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run.attempt is not None
    copied, before = run.attempt.folder / node_copies.FOLDER, []

    def other_node() -> None:
        try:
            eventually(lambda: run.progress.get("note") == COPYING)
            before.append((list(begun), copied.exists()))
            copied.mkdir()
            for start in (f"{PORT + 1}.1", f"{PORT}.0"):  # of other starts of the job
                (copied / f"{start}-1").touch()
            copier.released.set()
            eventually(lambda: run.progress.get("note") == WAITING)
            before.append((list(begun), (copied / f"{PORT}.1-0").exists()))
        finally:
            copier.released.set()
            copied.mkdir(exist_ok=True)
            (copied / f"{PORT}.1-1").touch()

    (config,) = compose(["dataset=digits", f"workspace={tmp_path}"])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(other_node)
        stage.run(config, run, DistEnv(rank=0, size=2, port=PORT))
        other.result()
    assert before == [([], False), ([], True)]
    assert begun == [run]
    assert run.waited > 0


def test_tasks_of_one_node_wait_for_its_copies_alone(
    version: Version, copier: HeldCopier, run: Run, tmp_path: Path
) -> None:
    with opened(version, tmp_path / "disk", copier) as store:
        node_copies.wait_for_copies(store, run, DistEnv())  # one task waits for nothing
        assert not store.shards.is_complete()
        copier.released.set()
        node_copies.wait_for_copies(store, run, DistEnv(rank=1, size=2, local_rank=1, local_size=2))
        assert store.shards.is_complete()
    assert run.attempt is not None
    assert list(run.attempt.folder.iterdir()) == []


def test_nothing_waits_where_images_can_be_read_meanwhile(version: Version, run: Run) -> None:
    assert version.folder is not None
    node_copies.wait_for_copies(DatasetReader(version.folder), run, DistEnv(size=2))
    assert run.waited == 0


def test_a_stop_signal_ends_the_waiting(
    version: Version, copier: HeldCopier, run: Run, tmp_path: Path
) -> None:
    def stop() -> None:
        eventually(lambda: run.progress.get("note") == COPYING)
        os.kill(os.getpid(), signal.SIGUSR2)

    with opened(version, tmp_path / "disk", copier) as store, ThreadPoolExecutor(1) as pool:
        pool.submit(stop)
        with pytest.raises(Preempted, match="stopped by SIGUSR2 while images were copied to the nodes"):
            node_copies.wait_for_copies(store, run, DistEnv(size=2))


def test_a_stop_signal_at_the_end_of_the_waiting_is_no_less_one(
    version: Version, copier: HeldCopier, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(shards: StagedShards, pause: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(StagedShards, "wait_until_complete", stop)
    with (
        opened(version, tmp_path / "disk", copier) as store,
        pytest.raises(Preempted, match="stopped by SIGUSR2"),
    ):
        node_copies.wait_for_copies(store, run, DistEnv(size=2, local_size=2))


def test_the_progress_of_a_resumed_training_is_kept(
    version: Version, copier: HeldCopier, run: Run, tmp_path: Path
) -> None:
    Progress(run)(1, 2, "images", top1=0.75)
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "last.ckpt").touch()
    before = run.progress
    copier.released.set()
    with opened(version, tmp_path / "disk", copier) as store:
        node_copies.wait_for_copies(store, run, DistEnv(size=2, local_size=2))
    assert run.progress == before
