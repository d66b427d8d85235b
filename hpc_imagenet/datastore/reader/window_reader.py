"""Read the shards from front to back, where random reads are slow: a hard disk, NFS, Lustre.

With `recipe.shuffle_window` the images of a window fill whole blocks of the shards. A thread reads the
blocks of the next window in the order of their positions, `REQUEST` bytes at a time, while training uses
those of this window. What it reads is not kept in the process but in the page cache of the node, from which
the images are then read one by one, in random order. If memory is short, the kernel discards some, and they
are read again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np

from hpc_imagenet.datastore.reader.dataset_reader import SplitReader
from hpc_imagenet.datastore.reader.prefetch import PageCacheReader, PagePrefetcher, Prefetcher

REQUEST = 4 << 20  # bytes of a read
GAP = 1 << 20  # bytes that are read too, rather than skipped: other headers, or images of other ranks

Item = TypeVar("Item")
Batch = tuple[Item, Sequence[int]]  # a batch and the indices of its images


class Extent(NamedTuple):
    """Consecutive bytes of a shard."""

    shard: int
    begin: int
    end: int


class WindowReader(PageCacheReader):
    """Reads the images of a split window by window; an alternative to `PagePrefetcher`.

    Args:
        split: split to read from; its shards are files.
        windows: number of the window of each batch.
    """

    def __init__(self, split: SplitReader, windows: Iterator[int]) -> None:
        super().__init__(split, "window-reader")
        self._windows = windows

    def batches(self, batches: Iterable[Batch[Item]]) -> Iterator[Item]:
        """Yield the batches in order, those of a window after its images were read.

        Raises:
            UserError: the images cannot be read.
        """
        previous: tuple[list[Batch[Item]], Future[None]] | None = None
        for _, pairs in itertools.groupby(zip(batches, self._windows, strict=False), lambda pair: pair[1]):
            window = [batch for batch, _ in pairs]
            images = [image for _, indices in window for image in indices]
            reading = self._thread.submit(self._read_all, images)
            if previous is not None:
                yield from _wait(*previous)
            previous = window, reading
        if previous is not None:
            yield from _wait(*previous)

    def close(self) -> None:
        """Stop reading: within a request, since a process that is to end soon waits for the thread."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read_all(self, images: Sequence[int]) -> None:
        read = self._split.store.shards.read
        for shard, begin, end in extents(self._split, images):
            for offset in range(begin, end, REQUEST):
                if self._closed:
                    return
                read(shard, offset, min(REQUEST, end - offset))


def _wait(window: list[Batch[Item]], reading: Future[None]) -> Iterator[Item]:
    reading.result()
    for batch, _ in window:
        yield batch


def extents(split: SplitReader, images: Sequence[int]) -> list[Extent]:
    """Return the bytes of some images as few extents, by shard and offset; gaps up to `GAP` are included."""
    entries = split.index[np.sort(np.asarray(images))]
    entries = entries[np.lexsort((entries["offset"], entries["shard"]))]
    begins = entries["offset"].astype(np.int64)
    ends = begins + entries["length"]
    apart = (np.diff(entries["shard"]) != 0) | (begins[1:] - ends[:-1] > GAP)
    first = np.flatnonzero(np.concatenate([[True], apart]))
    last = np.concatenate([first[1:], [len(entries)]]) - 1
    columns = entries["shard"][first], begins[first], ends[last]
    return [Extent(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def open_prefetcher(
    split: SplitReader, windows: Iterator[int] | None
) -> Prefetcher | PagePrefetcher | WindowReader:
    """Return what reads the images of an epoch ahead of use.

    Args:
        split: split to read from.
        windows: number of the window of each batch; None: the order has no windows.
    """
    if split.store.shards.is_remote():
        return Prefetcher(split)
    return PagePrefetcher(split) if windows is None else WindowReader(split, windows)
