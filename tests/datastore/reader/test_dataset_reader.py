"""DatasetReader and FolderShards: reading, processes, threads and errors."""

import gc
import multiprocessing
import os
import pickle
import resource
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_dataset import file_of, make_dataset, write_tar

from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import File, Manifest, Split
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.reader.shard_reader import FolderShards
from hpc_imagenet.errors import UserError

names = st.text("abcdefghijklmnop_0123456789", min_size=1, max_size=90).map(lambda name: f"{name}.JPEG")
shards = st.lists(st.dictionaries(names, st.binary(max_size=2000), max_size=5), min_size=1, max_size=4)


@pytest.mark.slow
@given(shards=shards.filter(any))
def test_reader_returns_the_same_bytes_as_tarfile(
    tmp_path_factory: pytest.TempPathFactory, shards: list[dict[str, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("dataset")
    entries, expected = [], []
    for number, members in enumerate(shards):
        path = folder / f"{number}.tar"
        addresses = write_tar(path, list(members.items()))
        entries += [(offset, size, len(entries) + i, number) for i, (offset, size) in enumerate(addresses)]
        with tarfile.open(path) as archive:
            expected += [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    write_index(folder / "train.npy", np.array(entries, ENTRY))
    split = Split(file_of(folder / "train.npy", "train.npy"), len(entries))
    files = tuple(file_of(folder / f"{n}.tar", f"{n}.tar") for n in range(len(shards)))
    Manifest("x", "c", "", (), files, {"train": split}).save(folder)

    train = DatasetReader(folder).open_split("train")
    assert len(train) == len(expected)
    assert [(train.name(i), train.read(i)[0]) for i in range(len(train))] == expected
    assert [label for _, label in train] == list(range(len(train)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "workspace")
    return tmp_path / "workspace" / "datasets" / "digits"


def test_pickled_reader_opens_its_own_files(folder: Path) -> None:
    store = DatasetReader(folder)
    images = list(store.open_split("train"))
    assert store.shards._descriptors
    copy = pickle.loads(pickle.dumps(store))
    assert copy.shards._descriptors == {}
    assert list(copy.open_split("train")) == images


@pytest.mark.slow
def test_forked_processes_read_concurrently(folder: Path) -> None:
    # Forked processes share the file offset, so reads must not use it: pread, not read.
    split = DatasetReader(folder).open_split("train")
    images = list(split)

    def read() -> None:
        for _ in range(30):
            assert list(split) == images

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    read()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {
        os.lseek(descriptor, 0, os.SEEK_CUR) for descriptor in split.store.shards._descriptors.values()
    } == {0}


def test_missing_or_truncated_shard_is_reported(folder: Path) -> None:
    shard = folder / "../../archives/digits/train-1.tar"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(UserError, match=rf"train-1\.tar has {size - 1} bytes instead of {size}"):
        DatasetReader(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-1\.tar is missing"):
        DatasetReader(folder)


def test_missing_dataset_or_split_is_reported(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="is not a dataset"):
        DatasetReader(tmp_path)
    with pytest.raises(UserError, match="no split test; it has the splits train, val"):
        DatasetReader(folder).open_split("test")


def test_read_past_the_end_of_a_shard_is_reported(folder: Path) -> None:
    store = DatasetReader(folder)
    size = store.shards.paths[0].stat().st_size
    with pytest.raises(UserError, match="ends inside the image"):
        store.shards.read(0, size - 10, 11)


def test_more_shards_are_read_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}").write_bytes(b"%02d" % number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # readers of earlier tests, which would be closed in the middle of this one
    before = open_descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 10, hard))
    try:
        files = FolderShards(tmp_path, [File(f"{number}", 2, "md5:0") for number in range(50)])
        assert [files.read(number, 0, 2) for number in range(50)] == [b"%02d" % n for n in range(50)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(open_descriptors() - before) == 50
    del files
    gc.collect()
    assert not open_descriptors() - before


def test_the_second_thread_to_open_a_shard_closes_its_descriptor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, before, os_open = DatasetReader(folder), open_descriptors(), os.open

    def open_late(*args: Any) -> int:
        """Open the shard after another thread has."""
        monkeypatch.setattr(os, "open", os_open)
        store.shards.read(0, 0, 1)
        return os_open(*args)

    monkeypatch.setattr(os, "open", open_late)
    store.shards.read(0, 0, 1)
    assert open_descriptors() - before == set(store.shards._descriptors.values())


def open_descriptors() -> set[int]:
    """Return the open descriptors of this process, without the one that lists them."""
    return {int(path.name) for path in list(Path("/proc/self/fd").iterdir()) if path.exists()}
