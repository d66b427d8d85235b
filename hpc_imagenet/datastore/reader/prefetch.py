"""Reading images before they are wanted, where each read is a wait: a bucket, a busy file system.

What is to be read is known: the sampler says it. So threads that only wait read the next batches, as far as
the memory that they may take goes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from hpc_imagenet.datastore.reader.dataset_reader import SplitReader

THREADS = 32  # reads at a time
MEMORY = 256 << 20  # bytes that are read and not taken yet

Item = TypeVar("Item")


class Prefetcher:
    """The images of a split, read in the order in which `over` sees that they will be wanted.

    Args:
        split: the images.
        threads: reads at a time.
        memory: bytes that may be read ahead; a single batch that is larger is read all the same.
    """

    def __init__(self, split: SplitReader, threads: int = THREADS, memory: int = MEMORY) -> None:
        self._split, self._memory = split, memory
        self._threads = ThreadPoolExecutor(threads, "read-ahead")
        self._lock = threading.Lock()
        self._begun: dict[int, deque[Future[tuple[bytes, int]]]] = {}
        self._bytes = 0  # of what is begun and not taken

    def batches(self, batches: Iterable[tuple[Item, Sequence[int]]]) -> Iterator[Item]:
        """Yield the batches, each when the images after it have been asked for as far as memory goes.

        Args:
            batches: each with the numbers of its images, in the order in which `read` will ask for them.
        """
        waiting: deque[Item] = deque()
        for batch, images in batches:
            # At least one batch is ahead, whatever its size.
            while waiting and self._bytes + self._size(images) > self._memory:
                yield waiting.popleft()
            self._begin(images)
            waiting.append(batch)
        while waiting:
            yield waiting.popleft()

    def read(self, image: int) -> tuple[bytes, int]:
        """Return what `split.read` does, which may have been read before.

        Raises:
            UserError: it cannot be read.
        """
        with self._lock:
            begun = self._begun.get(image)
            future = begun.popleft() if begun else None
            if begun is not None and not begun:
                del self._begun[image]
            if future is not None:
                self._bytes -= int(self._split.index[image]["length"])
        return self._split.read(image) if future is None else future.result()

    def close(self) -> None:
        """Stop reading; what was read is forgotten."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._begun.clear()

    def _size(self, images: Sequence[int]) -> int:
        return int(self._split.index["length"][list(images)].sum())

    def _begin(self, images: Sequence[int]) -> None:
        size = self._size(images)
        with self._lock:
            self._bytes += size
            for image in images:
                future = self._threads.submit(self._split.read, image)
                self._begun.setdefault(image, deque()).append(future)
