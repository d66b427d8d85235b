"""Reading while shards are copied to the node: the bytes are correct from the source and from the copy."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import eventually
from sample_dataset import link_version, make_dataset

from hpc_imagenet.config.schema import Cluster, Datastore
from hpc_imagenet.datastore import open_dataset as open_dataset_module
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.file_hash import hash_file
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.node_cache.staging import StagedShards, StagingIntervals
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.reader.prefetch import Prefetcher
from hpc_imagenet.datastore.versions import Version
from hpc_imagenet.errors import UserError

INTERVALS = StagingIntervals(cached=0.0, busy=0.02, retry=0.02)
open_dataset = functools.partial(open_dataset_module.open_dataset, intervals=INTERVALS)
staged_shards = functools.partial(StagedShards, intervals=INTERVALS)


@pytest.fixture
def version(tmp_path: Path) -> Version:
    """Version 1 of a datastore in a folder; its shards are links to archives outside it."""
    make_dataset(tmp_path / "workspace")
    link_version(tmp_path / "workspace" / "datasets" / "digits", tmp_path / "stores" / "digits" / "v1")
    return versions.open_version(Datastore("digits", str(tmp_path / "stores")))


def images(store: DatasetReader) -> list[tuple[bytes, int]]:
    return [image for split in ("train", "val") for image in store.open_split(split)]


def expected(version: Version) -> list[tuple[bytes, int]]:
    assert version.folder is not None
    return images(DatasetReader(version.folder))


def cached(scratch: Path) -> list[Path]:
    folder = scratch / f"hpc_imagenet-{os.getuid()}"
    return [path for path in folder.iterdir() if path.name[0] != "." and path.suffix != ".json"]


def wait_until(condition: Callable[[], bool]) -> None:
    eventually(condition, 300)  # the copy process has the lowest priority


class GatedCopier:
    """Copies one file for each release of the semaphore `permits`; the first `failures` copies fail."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.permits = threading.Semaphore(0)
        self.failures = 0
        self.error: Exception = UserError("the server is unavailable")
        self.closed = False

    def fetch(self, file: File, target: Path) -> None:
        while not self.permits.acquire(timeout=0.01):
            if self.closed:
                raise UserError("the copy was aborted")
        if self.failures:
            self.failures -= 1
            raise self.error
        self.version.backend.fetch(f"{self.version.path}/{file.path}", file, target, lambda done: None)

    def hash(self, path: Path, file: File) -> str:
        return hash_file(path, file, lambda done: None)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def copier(version: Version) -> GatedCopier:
    return GatedCopier(version)


def test_reading_starts_from_the_source_and_continues_from_the_copies(
    version: Version, copier: GatedCopier, tmp_path: Path
) -> None:
    correct = expected(version)
    with open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True, copier=copier) as store:
        assert images(store) == correct
        assert not store.shards.is_complete()
        copier.permits.release()
        wait_until(lambda: len(cached(tmp_path / "disk")) == 1)
        assert images(store) == correct
        assert not store.shards.is_complete()
        copier.permits.release(2)
        wait_until(lambda: store.shards.is_complete())
        # The source is not read any more.
        for path in (tmp_path / "workspace" / "archives" / "digits").iterdir():
            path.write_bytes(b"")
        assert images(store) == correct


@pytest.mark.slow
def test_a_second_rank_reads_the_copies_of_the_first(version: Version, tmp_path: Path) -> None:
    cluster = Cluster(scratch=str(tmp_path / "disk"))
    with (
        open_dataset(version, cluster, stages=True),
        open_dataset(version, cluster, stages=False) as second,
    ):
        wait_until(lambda: len(cached(tmp_path / "disk")) == 3)
        images(second)
        wait_until(lambda: bool(images(second)) and second.shards.is_complete())
        assert images(second) == expected(version)


def test_a_rank_that_copies_nothing_reads_copies_that_became_a_day_old_since_its_start(
    version: Version, copier: GatedCopier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, second = version.manifest.shards, NodeCache(tmp_path / "disk")
    copier.permits.release(3)
    with contextlib.closing(staged_shards(None, NodeCache(tmp_path / "disk"), files, copier)) as staged:
        wait_until(staged.is_complete)
        tomorrow = time.time() + 25 * 3600
        monkeypatch.setattr(time, "time", lambda: tomorrow)
        with contextlib.closing(staged_shards(None, second, files)) as other:
            assert all(other.poll(shard) for shard in range(len(files)))  # `read` would wait
            assert other.read(1, 512, 100) == staged.read(1, 512, 100)


def test_closing_the_dataset_stops_copying(version: Version, copier: GatedCopier, tmp_path: Path) -> None:
    with open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True, copier=copier):
        pass
    assert copier.closed
    assert cached(tmp_path / "disk") == []
    assert not [thread for thread in threading.enumerate() if thread.name == "staging"]


def test_closing_ends_a_read_that_waits_for_a_shard(version: Version, tmp_path: Path) -> None:
    """A process joins its threads at exit, so a thread that waits forever would keep the GPUs allocated."""
    staged = staged_shards(None, NodeCache(tmp_path / "disk"), version.manifest.shards)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(staged.read, 0, 512, 100)
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.2)
        staged.close()
        with pytest.raises(UserError, match="the datastore was closed before the shard was copied"):
            reading.result(timeout=60)


@pytest.mark.slow
def test_a_damaged_copy_is_detected_by_reread_and_copied_again(version: Version, tmp_path: Path) -> None:
    with open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True) as store:
        wait_until(lambda: store.shards.is_complete() or not images(store))
        train = store.open_split("train")
        correct, _ = train.read(3)
        shard = int(train.index[3]["shard"])
        copy = NodeCache(tmp_path / "disk").path(version.manifest.shards[shard])
        with copy.open("r+b") as writer:  # while it is open
            writer.seek(int(train.index[3]["offset"]))
            writer.write(b"\0" * 100)
        wrong, _ = train.read(3)
        assert wrong != correct
        assert train.reread(3, wrong) == correct
        assert train.read(3)[0] == correct
        wait_until(lambda: copy.exists() and bool(train.read(3)) and store.shards.is_complete())
        assert images(store) == expected(version)


@pytest.mark.slow
def test_only_the_shards_of_the_splits_that_are_read_are_copied(version: Version, tmp_path: Path) -> None:
    scratch = tmp_path / "disk"
    with open_dataset(version, Cluster(scratch=str(scratch)), stages=True, splits=("val", "test")) as store:
        wait_until(lambda: bool(list(store.open_split("val"))) and store.shards.is_complete())
        assert images(store) == expected(version)
        assert len(cached(scratch)) == 1


@pytest.mark.slow
def test_an_intact_copy_of_an_undecodable_image_is_kept(version: Version, tmp_path: Path) -> None:
    with open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True) as store:
        wait_until(lambda: bool(images(store)) and store.shards.is_complete())
        train = store.open_split("train")
        assert train.reread(3, train.read(3)[0]) == train.read(3)[0]
        assert store.shards.is_complete()


@pytest.mark.slow
def test_shards_that_do_not_fit_are_read_from_the_source(
    version: Version, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limit = version.manifest.shards[0].bytes + 10_000
    cluster = Cluster(scratch=str(tmp_path / "disk"), scratch_gb=limit / 1e9)
    with open_dataset(version, cluster, stages=True) as store:
        wait_until(lambda: " for 2 of 3 shards; reading from the source instead" in capfd.readouterr().out)
        assert images(store) == expected(version)
    assert len(cached(tmp_path / "disk")) == 1


def test_failed_copies_are_retried(version: Version, copier: GatedCopier, tmp_path: Path) -> None:
    copier.failures = 2
    copier.permits.release(10)
    with open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True, copier=copier) as store:
        wait_until(lambda: bool(images(store)) and store.shards.is_complete())
    assert len(cached(tmp_path / "disk")) == 3


def test_without_range_reads_reading_waits_for_the_copy_or_fails(version: Version, tmp_path: Path) -> None:
    cache, files = NodeCache(tmp_path / "disk", limit=1000), version.manifest.shards
    copier = GatedCopier(version)
    copier.permits.release(10)

    with (
        contextlib.closing(staged_shards(None, cache, files, copier)) as staged,
        pytest.raises(UserError, match=r"not enough free space in .* for 3 of 3 shards.*cluster\.scratch"),
    ):
        staged.read(0, 512, 100)
    unlimited = NodeCache(tmp_path / "disk")
    copier = GatedCopier(version)
    copier.permits.release(10)
    with contextlib.closing(staged_shards(None, unlimited, files, copier)) as staged:
        assert staged.read(1, 512, 100) == DatasetReader(version.folder or tmp_path).shards.read(1, 512, 100)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("sending: me@host: Permission denied (publickey)."), "Permission denied (publickey)."),
        (ValueError("unexpected\nvalue"), "ValueError: unexpected value"),
    ],
)
def test_a_read_that_waits_for_a_shard_raises_the_copy_error(
    version: Version, copier: GatedCopier, tmp_path: Path, error: Exception, message: str
) -> None:
    cache, files = NodeCache(tmp_path / "disk"), version.manifest.shards
    copier.error, copier.failures = error, 9
    copier.permits.release(9)
    with contextlib.closing(staged_shards(None, cache, files, copier)) as staged:
        wait_until(lambda: staged._error is not None)
        with pytest.raises(UserError) as caught:
            staged.read(0, 512, 100)
    assert str(caught.value).startswith("staging: ")
    assert str(caught.value).endswith(message)


def test_unset_variable_in_scratch_is_reported(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    with (
        pytest.raises(UserError, match=r"cluster\.scratch=\$SLURM_TMPDIR: this variable is not set on"),
        open_dataset(version, Cluster(scratch="$SLURM_TMPDIR"), stages=True),
    ):
        pass


def test_prefetch_returns_the_same_images_within_its_memory_limit(version: Version) -> None:
    assert version.folder is not None
    split = DatasetReader(version.folder).open_split("train")
    size = int(split.index["length"][0])
    order = [5, 3, 3, 8, 0, 1, 2, 23, 5, 5, 7, 4]
    batches = [order[at : at + 3] for at in range(0, len(order), 3)]
    prefetcher = Prefetcher(split, threads=4, memory=5 * size)
    try:
        most, images_read = 0, []
        for batch in prefetcher.batches((batch, batch) for batch in batches):
            most = max(most, prefetcher._bytes)
            images_read += [prefetcher.read(image) for image in batch]
        assert images_read == [split.read(image) for image in order]
        assert prefetcher.read(6) == split.read(6)  # in no batch
        assert 0 < most < 7 * size
        assert prefetcher._bytes == 0
    finally:
        prefetcher.close()
