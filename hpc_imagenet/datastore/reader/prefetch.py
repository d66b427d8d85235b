"""Read images ahead of use: the sampler determines their order in advance.

`PagePrefetcher` is for files: the kernel reads the next batches into the page cache, so that no decoding
thread waits for the disk. `Prefetcher` is for buckets and hosts, which the kernel cannot read: threads that
only wait for I/O read the next batches, up to a limit of memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from hpc_imagenet.datastore.reader.dataset_reader import SplitReader

THREADS = 32  # concurrent reads
MEMORY = 256 << 20  # bytes of images that are prefetched and not consumed yet
MAX_PENDING = 8  # batches that the kernel is still to be advised of

Item = TypeVar("Item")


class PageCacheReader:
    """Reads images of files that a thread of its own has brought into the page cache; nothing else is kept.

    Args:
        split: split to read from; its shards are files.
        name: of the thread.
    """

    def __init__(self, split: SplitReader, name: str) -> None:
        self._split, self._thread = split, ThreadPoolExecutor(1, name)
        self._closed = False

    def read(self, image: int) -> tuple[bytes, int]:
        """Return the bytes and the label of an image.

        Raises:
            UserError: the image cannot be read.
        """
        return self._split.read(image)


class PagePrefetcher(PageCacheReader):
    """Has the kernel read the images of each batch while earlier batches are decoded.

    It only advises the kernel, image by image.

    Args:
        split: split to read from; its shards are files.
    """

    def __init__(self, split: SplitReader) -> None:
        super().__init__(split, "page-prefetcher")
        self._pending: deque[Future[None]] = deque()

    def batches(self, batches: Iterable[tuple[Item, Sequence[int]]]) -> Iterator[Item]:
        """Yield the batches in order; the reads of each have been requested, or soon will be.

        Args:
            batches: pairs of a batch and the indices of its images.
        """
        for batch, images in batches:
            while self._pending and self._pending[0].done():
                self._pending.popleft()
            if len(self._pending) < MAX_PENDING:  # advice that comes too late is of no use
                self._pending.append(self._thread.submit(self._advise, images))
            yield batch

    def close(self) -> None:
        """Stop prefetching, and wait for the thread, which ends within one image."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _advise(self, images: Sequence[int]) -> None:
        read_ahead = self._split.store.shards.read_ahead
        for offset, length, _, shard in self._split.index[list(images)].tolist():
            if self._closed:
                return
            read_ahead(shard, offset, length)


class Prefetcher:
    """Read the images of a split ahead of time, in the order of the batches passed to `batches`.

    Args:
        split: split to read from.
        threads: number of concurrent reads.
        memory: bytes that may be prefetched; a single batch larger than this is prefetched nevertheless.
    """

    def __init__(self, split: SplitReader, threads: int = THREADS, memory: int = MEMORY) -> None:
        self._split, self._memory = split, memory
        self._threads = ThreadPoolExecutor(threads, "read-ahead")
        self._lock = threading.Lock()
        self._pending: dict[int, deque[Future[tuple[bytes, int]]]] = {}  # by image
        self._bytes = 0  # of the images in _pending

    def batches(self, batches: Iterable[tuple[Item, Sequence[int]]]) -> Iterator[Item]:
        """Yield the batches in order, after submitting reads of the following batches up to the memory limit.

        Args:
            batches: pairs of a batch and the indices of its images, in the order of the calls of `read`.
        """
        waiting: deque[Item] = deque()
        for batch, images in batches:
            # At least one batch is prefetched, whatever its size.
            while waiting and self._bytes + self._size(images) > self._memory:
                yield waiting.popleft()
            self._submit(images)
            waiting.append(batch)
        while waiting:
            yield waiting.popleft()

    def read(self, image: int) -> tuple[bytes, int]:
        """Return the bytes and the label of an image, prefetched or read now.

        Raises:
            UserError: the image cannot be read.
        """
        with self._lock:
            futures = self._pending.get(image)
            future = futures.popleft() if futures else None
            if futures is not None and not futures:
                del self._pending[image]
            if future is not None:
                self._bytes -= int(self._split.index[image]["length"])
        return self._split.read(image) if future is None else future.result()

    def close(self) -> None:
        """Stop prefetching and discard what was read."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()

    def _size(self, images: Sequence[int]) -> int:
        return int(self._split.index["length"][list(images)].sum())

    def _submit(self, images: Sequence[int]) -> None:
        size = self._size(images)
        with self._lock:
            self._bytes += size
            for image in images:
                future = self._threads.submit(self._split.read, image)
                self._pending.setdefault(image, deque()).append(future)
