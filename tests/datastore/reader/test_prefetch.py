"""PagePrefetcher: what is in the page cache before an image is read, from files and from staged copies."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import eventually
from sample_dataset import file_of

from hpc_imagenet.datastore.file_hash import hash_file
from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import File, Manifest, Split
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.node_cache.staging import StagedShards
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.reader.prefetch import PagePrefetcher
from hpc_imagenet.datastore.reader.shard_reader import FolderShards

LENGTH, DISTANCE = 100_000, 16 << 20  # bytes; images so far apart that no read-ahead reaches the next


@pytest.fixture
def store(tmp_path: Path) -> DatasetReader:
    """A dataset with four images in one shard that is not in the page cache."""
    path = tmp_path / "shard.tar"
    entries = np.zeros(4, ENTRY)
    with path.open("wb") as file:
        for image in range(4):
            file.seek(image * DISTANCE)
            file.write(os.urandom(LENGTH))
            entries[image] = (image * DISTANCE, LENGTH, image, 0)
    write_index(tmp_path / "train.npy", entries)
    split = Split(file_of(tmp_path / "train.npy", "train.npy"), len(entries))
    file = File(path.name, path.stat().st_size, "blake3:")
    shard = File(path.name, file.bytes, hash_file(path, file, lambda done: None))
    Manifest("x", "c", "", (), (shard,), {"train": split}).save(tmp_path)
    drop_pages(path)
    return DatasetReader(tmp_path)


def drop_pages(path: Path) -> None:
    """Drop a file from the page cache; skip the test where that has no effect, as in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(is_cached(path, image) for image in range(4)):
        pytest.skip(f"the pages of {path} cannot be dropped")


def is_cached(path: Path, image: int) -> bool:
    """Whether all bytes of an image are in the page cache. Source: mincore(2)."""
    pages = -(-LENGTH // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        begin = ctypes.c_char.from_buffer(mapped, image * DISTANCE)
        length = ctypes.c_size_t(LENGTH)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(begin)), length, resident) == 0
        del begin  # else the mapping cannot be closed
    return all(page & 1 for page in resident)


def test_images_of_a_batch_are_in_the_page_cache_before_they_are_read(store: DatasetReader) -> None:
    split, path = store.open_split("train"), store.folder / "shard.tar"
    prefetcher = PagePrefetcher(split)
    batches = prefetcher.batches([("first", [2, 0]), ("second", [3])])
    assert next(batches) == "first"
    eventually(lambda: is_cached(path, 2) and is_cached(path, 0))
    assert not is_cached(path, 1)
    assert not is_cached(path, 3)
    assert list(batches) == ["second"]
    eventually(lambda: is_cached(path, 3))
    assert not is_cached(path, 1)
    assert prefetcher.read(2) == split.read(2)
    prefetcher.close()


@pytest.mark.slow
def test_staged_images_are_read_ahead_from_the_source_and_then_from_the_copy(
    store: DatasetReader, tmp_path: Path
) -> None:
    source, cache = store.folder / "shard.tar", NodeCache(tmp_path / "scratch")
    (shard,) = store.manifest.shards
    staged = StagedShards(FolderShards(store.folder, [shard]), cache, [shard])
    with contextlib.closing(staged):
        staged.read_ahead(0, 0, LENGTH)
        eventually(lambda: is_cached(source, 0))
        copy = cache.path(shard)
        copy.write_bytes(source.read_bytes())
        cache._record_verified(copy)
        assert staged.poll(0)
        assert staged.is_complete()
        drop_pages(source)
        drop_pages(copy)
        staged.read_ahead(0, DISTANCE, LENGTH)
        eventually(lambda: is_cached(copy, 1))
        assert not is_cached(source, 1)


def test_advice_for_a_missing_file_is_no_error(store: DatasetReader) -> None:
    """The read that follows reports it."""
    (store.folder / "shard.tar").unlink()
    store.shards.read_ahead(0, 0, LENGTH)
    with pytest.raises(FileNotFoundError):
        store.shards.read(0, 0, LENGTH)
