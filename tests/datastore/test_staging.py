"""Training reads while the shards come: always the right bytes, wherever they are read from."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sample_dataset import make_dataset

from hpc_imagenet.config.schema import Cluster, Datastore
from hpc_imagenet.datastore import open_dataset, versions
from hpc_imagenet.datastore.backends.storage_backend import hash_file
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache import staging
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.node_cache.staging import Tell
from hpc_imagenet.datastore.reader import shard_reader
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.reader.prefetch import Prefetcher
from hpc_imagenet.datastore.reader.shard_reader import StagedShards
from hpc_imagenet.datastore.versions import Version
from hpc_imagenet.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(staging, "POLL", 0.02)
    monkeypatch.setattr(staging, "AGAIN", 0.02)


@pytest.fixture
def version(tmp_path: Path) -> Version:
    """Version 1 of a datastore in a folder; its shards have paths of their own in there."""
    make_dataset(tmp_path / "workspace")
    home = tmp_path / "stores" / "digits"
    home.mkdir(parents=True)
    dataset = tmp_path / "workspace" / "datasets" / "digits"
    (home / "v1").symlink_to(dataset)
    return versions.open_version(Datastore("digits", str(tmp_path / "stores")))


def images(store: DatasetReader) -> list[tuple[bytes, int]]:
    return [image for split in ("train", "val") for image in store.open_split(split)]


def expected(version: Version) -> list[tuple[bytes, int]]:
    assert version.folder is not None
    return images(DatasetReader(version.folder))


def cached(scratch: Path) -> list[Path]:
    folder = scratch / f"hpc_imagenet-{os.getuid()}"
    return [path for path in folder.iterdir() if path.name[0] != "." and path.suffix != ".json"]


def until(true: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if true():
            return
        waiting.wait(0.01)
    raise AssertionError("it never came")


class Held:
    """Copies files only when it is told to."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.go = threading.Semaphore(0)
        self.fails = 0
        self.error: Exception = UserError("the server is away")
        self.closed = False

    def bring(self, file: File, target: Path, tell: Tell) -> None:
        while not self.go.acquire(timeout=0.01):
            tell(0)
        if self.fails:
            self.fails -= 1
            raise self.error
        self.version.backend.fetch(f"{self.version.path}/{file.path}", file, target, tell)

    def hash(self, path: Path, file: File, tell: Tell) -> str:
        return hash_file(path, file, tell)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def held(version: Version) -> Held:
    return Held(version)


def test_reading_begins_at_once_and_goes_on_from_the_copies(
    version: Version, held: Held, tmp_path: Path
) -> None:
    wanted = expected(version)
    with open_dataset.open_dataset(
        version, Cluster(scratch=str(tmp_path / "disk")), stages=True, copies=held
    ) as store:
        assert images(store) == wanted
        assert store.shards.is_remote()
        held.go.release()
        until(lambda: len(cached(tmp_path / "disk")) == 1)
        assert images(store) == wanted
        assert store.shards.is_remote()
        held.go.release(2)
        until(lambda: not store.shards.is_remote())
        # What they were copied from is not needed any more.
        for path in (tmp_path / "workspace" / "archives" / "digits").iterdir():
            path.write_bytes(b"")
        assert images(store) == wanted


def test_a_second_rank_reads_what_the_first_copies(version: Version, tmp_path: Path) -> None:
    cluster = Cluster(scratch=str(tmp_path / "disk"))
    with (
        open_dataset.open_dataset(version, cluster, stages=True),
        open_dataset.open_dataset(version, cluster, stages=False) as second,
    ):
        until(lambda: len(cached(tmp_path / "disk")) == 3)
        images(second)
        until(lambda: bool(images(second)) and not second.shards.is_remote())
        assert images(second) == expected(version)


def test_the_end_of_a_job_stops_its_copying(version: Version, held: Held, tmp_path: Path) -> None:
    with open_dataset.open_dataset(
        version, Cluster(scratch=str(tmp_path / "disk")), stages=True, copies=held
    ):
        pass
    assert held.closed
    assert cached(tmp_path / "disk") == []
    assert not [thread for thread in threading.enumerate() if thread.name == "staging"]


def test_closing_ends_a_read_that_waits_for_a_shard(version: Version, tmp_path: Path) -> None:
    """Threads are joined when a process ends, so one that waits for ever would keep its GPUs."""
    staged = StagedShards(None, NodeCache(tmp_path / "disk"), version.manifest.shards)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(staged.read, 0, 512, 100)
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.2)
        staged.close()
        with pytest.raises(UserError, match="the datastore was closed before the shard came"):
            reading.result(timeout=60)


def test_a_damaged_copy_is_found_by_the_image_that_cannot_be_decoded(
    version: Version, tmp_path: Path
) -> None:
    with open_dataset.open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True) as store:
        until(lambda: not store.shards.is_remote() or not images(store))
        train = store.open_split("train")
        right, _ = train.read(3)
        shard = int(train.index[3]["shard"])
        copy = NodeCache(tmp_path / "disk").path(version.manifest.shards[shard])
        with copy.open("r+b") as writer:  # behind the back of a job that has it open
            writer.seek(int(train.index[3]["offset"]))
            writer.write(b"\0" * 100)
        wrong, _ = train.read(3)
        assert wrong != right
        assert train.reread(3, wrong) == right
        assert train.read(3)[0] == right
        until(lambda: copy.exists() and bool(train.read(3)) and not store.shards.is_remote())
        assert images(store) == expected(version)


def test_a_sound_copy_of_an_undecodable_image_stays(version: Version, tmp_path: Path) -> None:
    with open_dataset.open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True) as store:
        until(lambda: bool(images(store)) and not store.shards.is_remote())
        train = store.open_split("train")
        assert train.reread(3, train.read(3)[0]) == train.read(3)[0]
        assert not store.shards.is_remote()


def test_what_has_no_room_is_read_from_where_it_lies(
    version: Version, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    room = version.manifest.shards[0].bytes + 10_000
    cluster = Cluster(scratch=str(tmp_path / "disk"), scratch_gb=room / 1e9)
    with open_dataset.open_dataset(version, cluster, stages=True) as store:
        until(lambda: "no room for 2 of 3 shards" in capfd.readouterr().out)
        assert images(store) == expected(version)
    assert len(cached(tmp_path / "disk")) == 1


def test_trouble_that_passes_is_waited_for(version: Version, held: Held, tmp_path: Path) -> None:
    held.fails = 2
    held.go.release(10)
    with open_dataset.open_dataset(
        version, Cluster(scratch=str(tmp_path / "disk")), stages=True, copies=held
    ) as store:
        until(lambda: bool(images(store)) and not store.shards.is_remote())
    assert len(cached(tmp_path / "disk")) == 3


def test_without_a_way_to_read_ranges_reading_waits_or_says_why_not(version: Version, tmp_path: Path) -> None:
    cache, files = NodeCache(tmp_path / "disk", limit=1000), version.manifest.shards
    staged = StagedShards(None, cache, files)
    copies = Held(version)
    copies.go.release(10)

    with (
        staging.Staging(staged, cache, files, copies, needed=True),
        pytest.raises(UserError, match=r"no room for 3 of 3 shards.*cluster\.scratch"),
    ):
        staged.read(0, 512, 100)
    roomy = NodeCache(tmp_path / "disk")
    staged = StagedShards(None, roomy, files)
    with staging.Staging(staged, roomy, files, copies, needed=True):
        assert staged.read(1, 512, 100) == DatasetReader(version.folder or tmp_path).read(1, 512, 100)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("sending: me@host: Permission denied (publickey)."), "Permission denied (publickey)."),
        (ValueError("of nobody's\nmaking"), "ValueError: of nobody's making"),
    ],
)
def test_who_waits_for_a_shard_is_told_whatever_went_wrong(
    version: Version, held: Held, tmp_path: Path, error: Exception, told: str
) -> None:
    cache, files = NodeCache(tmp_path / "disk"), version.manifest.shards
    staged = StagedShards(None, cache, files)
    held.error, held.fails = error, 9
    held.go.release(9)
    with staging.Staging(staged, cache, files, held, needed=True):
        until(lambda: staged._trouble is not None)
        with pytest.raises(UserError) as caught:
            staged.read(0, 512, 100)
    assert str(caught.value).startswith("staging: ")
    assert str(caught.value).endswith(told)


def test_a_scratch_of_a_variable_that_the_node_lacks_is_named(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    with (
        pytest.raises(UserError, match=r"cluster\.scratch=\$SLURM_TMPDIR: .* no such variable"),
        open_dataset.open_dataset(version, Cluster(scratch="$SLURM_TMPDIR"), stages=True),
    ):
        pass


def test_read_ahead_gives_the_same_images_within_its_memory(version: Version) -> None:
    assert version.folder is not None
    split = DatasetReader(version.folder).open_split("train")
    size = int(split.index["length"][0])
    order = [5, 3, 3, 8, 0, 1, 2, 23, 5, 5, 7, 4]
    batches = [order[at : at + 3] for at in range(0, len(order), 3)]
    ahead = Prefetcher(split, threads=4, memory=5 * size)
    try:
        most, got = 0, []
        for batch in ahead.batches((batch, batch) for batch in batches):
            most = max(most, ahead._bytes)
            got += [ahead.read(image) for image in batch]
        assert got == [split.read(image) for image in order]
        assert ahead.read(6) == split.read(6)  # one that nobody announced
        assert 0 < most < 7 * size
        assert ahead._bytes == 0
    finally:
        ahead.close()
