"""WindowReader: what it reads, in which order, and when it ends."""

from __future__ import annotations

import threading
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.datastore.index import ENTRY
from hpc_imagenet.datastore.reader import window_reader
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.datastore.reader.prefetch import PagePrefetcher, Prefetcher
from hpc_imagenet.datastore.reader.window_reader import GAP, REQUEST, WindowReader, extents, open_prefetcher
from hpc_imagenet.errors import UserError


class RecordingShards:
    """Shards that record what is read of them; reads of one shard can be made to fail."""

    def __init__(self, remote: bool = False) -> None:
        self.remote = remote
        self.reads: list[tuple[int, int, int]] = []
        self.broken = -1

    def read(self, shard: int, offset: int, length: int) -> bytes:
        if shard == self.broken:
            raise UserError(f"shard {shard} is truncated")
        self.reads.append((shard, offset, length))
        return b""

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        return data

    def read_ahead(self, shard: int, offset: int, length: int) -> None:
        pass

    def is_remote(self) -> bool:
        return self.remote


def make_split(lengths: list[int], shard_of: list[int] | None = None) -> SplitReader:
    """Return a split of images behind each other, with their tar headers, in one shard or several."""
    entries = np.zeros(len(lengths), ENTRY)
    entries["length"], entries["shard"] = lengths, shard_of or 0
    entries["offset"] = 512 + np.cumsum([0, *(length + 1024 for length in lengths[:-1])])
    store = object.__new__(DatasetReader)
    store.shards = RecordingShards()
    store.folder = Path()
    return SplitReader(store, entries)


@pytest.mark.slow
@given(st.lists(st.integers(1, 3 * GAP), min_size=1, max_size=30), st.data())
def test_extents_contain_the_images_and_no_gap_longer_than_allowed(lengths, data) -> None:
    shards = sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    split = make_split(lengths, shards)
    images = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    found = extents(split, images)
    assert found == sorted(found)
    for image in images:
        offset, length, _, shard = split.index[image].item()
        assert sum(e.shard == shard and e.begin <= offset and offset + length <= e.end for e in found) == 1
    for one, other in pairwise(found):
        assert one.shard < other.shard or other.begin - one.end > GAP
    expected = sum(int(split.index[image]["length"]) for image in images)
    assert sum(e.end - e.begin for e in found) <= expected + GAP * (len(images) - 1)


def test_window_is_read_in_order_in_long_requests_before_its_batches_are_used() -> None:
    split = make_split([100_000] * 400)
    shards = split.store.shards
    batches = [([i, i + 50, i + 100], [i, i + 50, i + 100]) for i in range(100)]
    reader = WindowReader(split, (i // 50 for i in count()))
    reads_at = []
    for batch in reader.batches(batches):
        reads_at.append((batch[0] // 50, list(shards.reads)))
    reader.close()
    first_window = 150 * 101_024 - 1024
    for window, reads in reads_at:
        assert sum(length for *_, length in reads) >= first_window * (window + 1)
    # Both windows overlap: images 0 to 149, then 50 to 199. Each is one extent, cut into requests.
    assert len(shards.reads) == 2 * -(-first_window // REQUEST)
    offsets = [offset for _, offset, _ in shards.reads]
    half = len(offsets) // 2
    assert offsets[:half] == sorted(offsets[:half])
    assert offsets[half:] == sorted(offsets[half:])


def test_next_window_is_read_while_the_present_one_is_used() -> None:
    split = make_split([1000] * 40)
    shards = split.store.shards
    batches = [(i, [i]) for i in range(40)]
    reader = WindowReader(split, (i // 10 for i in count()))
    iterator = reader.batches(batches)
    assert next(iterator) == 0
    reader._thread.submit(lambda: None).result()  # behind the windows that were submitted
    assert len(shards.reads) == 2
    reader.close()


def test_error_of_a_window_is_raised_before_its_first_batch() -> None:
    split = make_split([1000] * 4, [0, 0, 1, 1])
    split.store.shards.broken = 1
    reader = WindowReader(split, (i // 2 for i in count()))
    iterator = reader.batches([(i, [i]) for i in range(4)])
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(UserError, match="shard 1 is truncated"):
        next(iterator)
    reader.close()


def test_closed_reader_ends_within_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_reader, "REQUEST", 1000)
    split = make_split([1000] * 1000)
    begun, closed = threading.Event(), threading.Event()
    shards = split.store.shards
    plain = shards.read

    def read(shard: int, offset: int, length: int) -> bytes:
        begun.set()
        assert closed.wait(60)
        return plain(shard, offset, length)

    shards.read = read
    reader = WindowReader(split, count())
    consumer = threading.Thread(target=lambda: next(reader.batches([(0, range(1000))])))
    consumer.start()
    assert begun.wait(60)
    reader.close()
    closed.set()
    consumer.join(60)
    reader._thread.shutdown(wait=True)
    assert len(shards.reads) == 1


def test_window_reader_is_for_files_and_orders_with_windows_only() -> None:
    split = make_split([1000])
    assert isinstance(open_prefetcher(split, None), PagePrefetcher)
    assert isinstance(open_prefetcher(split, count()), WindowReader)
    split.store.shards = RecordingShards(remote=True)
    assert isinstance(open_prefetcher(split, None), Prefetcher)
    assert isinstance(open_prefetcher(split, count()), Prefetcher)
