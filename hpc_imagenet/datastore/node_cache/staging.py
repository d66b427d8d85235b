"""Copy a version's shards to the node's own disk while training already reads them.

One process per node has a thread that controls the copying and leaves the work to a low-priority process
(`copy_process.py`), which uses the CPU time that decoding leaves. Jobs on the same node share the work: a
shard that another process is fetching is skipped and checked again later.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.cache import CopyResult, NodeCache, ShardCopier
from hpc_imagenet.datastore.reader.shard_reader import ShardReader, advise_read, raise_open_files_limit
from hpc_imagenet.errors import UserError


@dataclass(frozen=True)
class StagingIntervals:
    """Seconds between two checks of a shard.

    Attributes:
        cached: between two checks of a reader whether a shard is cached.
        busy: between two checks of a shard that another process is fetching.
        retry: between two attempts at a shard that cannot be read or written.
    """

    cached: float = 0.5
    busy: float = 1.0
    retry: float = 60.0


INTERVALS = StagingIntervals()


class StagedShards:
    """Shards read from a node's cache once they are copied, and from their source until then.

    Args:
        source: reader of the original shards; None: it has no random access, so reads wait for the copy.
        cache: cache of this node.
        shards: shards of the manifest.
        copier: copies the shards in a background thread until `close`; None: another process copies them.
        intervals: times between checks and retries.
        selected: numbers of the shards that are copied; None: all. Others can be read from the source only.
    """

    def __init__(
        self,
        source: ShardReader | None,
        cache: NodeCache,
        shards: Sequence[File],
        copier: ShardCopier | None = None,
        intervals: StagingIntervals = INTERVALS,
        selected: Sequence[int] | None = None,
    ) -> None:
        self._source, self._cache, self._shards, self._copier = source, cache, shards, copier
        self._selected = range(len(shards)) if selected is None or source is None else selected
        self._intervals = intervals
        self._descriptors: dict[int, int] = {}
        self._checked = [float("-inf")] * len(shards)  # by shard: time of the last check, monotonic s
        self._lock = threading.Lock()
        self._error: UserError | None = None  # raised by reads that wait for a copy
        self._closed = threading.Event()
        self._refetch = threading.Event()  # a copy was damaged and discarded
        raise_open_files_limit()
        self._thread = threading.Thread(target=self._copy_until_closed, name="staging", daemon=True)
        if copier is not None:
            self._thread.start()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._open_cached(shard)
        while descriptor is None:
            if self._source is not None:
                return self._source.read(shard, offset, length)
            if self._error is not None:
                raise self._error
            time.sleep(self._intervals.cached)
            descriptor = self._open_cached(shard)
        data = b""
        with contextlib.suppress(OSError):  # the node's disk may be faulty and the source intact
            data = os.pread(descriptor, length, offset)
        return data if len(data) == length else self.reread(shard, offset, length, data)

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Read the range from the source; if it differs from `data`, discard the copy and refetch it."""
        if self._source is None or shard not in self._descriptors:
            return data
        original = self._source.read(shard, offset, length)
        if original != data:
            print(f"{self._cache.path(self._shards[shard])} is damaged and will be copied again", flush=True)
            with self._lock:
                # Other threads may be reading from the descriptor, so it is not closed.
                self._descriptors.pop(shard, None)
                self._cache.discard(self._shards[shard])
            self._refetch.set()
        return original

    def read_ahead(self, shard: int, offset: int, length: int) -> None:
        """Have the kernel read the range, of the copy or the source, into the page cache, without waiting.

        The copy process reads the source through the same page cache, so each byte is fetched once.
        """
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                advise_read(descriptor, offset, length)
        elif self._source is not None:
            self._source.read_ahead(shard, offset, length)

    def is_remote(self) -> bool:
        """Whether a shard is still read by requests to a server, or waited for."""
        return not self.is_complete() and (self._source is None or self._source.is_remote())

    def is_complete(self) -> bool:
        """Whether all shards that are copied are cached on this node, and open."""
        return len(self._descriptors) >= len(self._selected)

    @property
    def has_source(self) -> bool:
        """Whether shards can be read before they are copied."""
        return self._source is not None

    def copied_bytes(self) -> int:
        """Return how many bytes of the shards that are copied are on this node."""
        return sum(self._cache.present_bytes(self._shards[number]) for number in self._selected)

    def wait_until_complete(self, pause: Callable[[float], None]) -> None:
        """Wait until all shards that are copied are cached on this node, and open.

        Args:
            pause: waits for a number of seconds between two checks; what it raises ends the waiting.

        Raises:
            UserError: a shard cannot be copied.
        """
        for shard in self._selected:
            while not self.poll(shard):
                if self._error is not None:
                    raise self._error
                pause(self._intervals.cached)

    def poll(self, shard: int) -> bool:
        """Check now whether a shard is cached, and open it if so; return whether it is."""
        self._checked[shard] = float("-inf")
        return self._open_cached(shard) is not None

    def close(self) -> None:
        """Stop copying, close all copies, so that they can be evicted, and end the reads that wait."""
        self._closed.set()
        if self._copier is not None:
            self._copier.close()
            self._refetch.set()  # wakes the thread
            self._thread.join()
        # Otherwise a reading thread would wait forever and keep its process alive.
        self._error = UserError("the datastore was closed before the shard was copied")
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _open_cached(self, shard: int) -> int | None:
        """Return the descriptor of a cached shard; check the cache at most once per interval."""
        with self._lock:
            if shard not in self._descriptors:
                now = time.monotonic()
                if now - self._checked[shard] < self._intervals.cached:
                    return None
                self._checked[shard] = now
                descriptor = self._cache.open(self._shards[shard])
                if descriptor is None:
                    return None
                self._descriptors[shard] = descriptor
            return self._descriptors[shard]

    def _copy_until_closed(self) -> None:
        assert self._copier is not None
        try:
            while True:
                self._refetch.clear()
                if self._closed.is_set():  # checked after clearing, so that `close` is not missed
                    return
                self._copy_all(self._copier)
                self._refetch.wait()
        except Exception as error:  # a bug of this package; readers must not wait for copies forever
            traceback.print_exc()
            self._report_failure(" ".join(f"{type(error).__name__}: {error}".split()))

    def _copy_all(self, copier: ShardCopier) -> None:
        """Copy the selected shards that fit, with retries until none is busy or failed, or until closed."""
        begin, remaining = time.monotonic(), list(self._selected)
        reported: set[int] = set()  # shards whose failure was reported
        full: list[int] = []
        while remaining:
            busy, failed = [], []
            for number in remaining:
                if self._closed.is_set():
                    return
                try:
                    result = self._cache.get_or_fetch(self._shards[number], copier)
                except (UserError, OSError) as error:
                    failed.append(number)
                    if number not in reported and not self._closed.is_set():
                        reported.add(number)
                        self._report_failure(f"{error}")
                    continue
                if result is CopyResult.CACHED:
                    self.poll(number)  # opens it, so that it is not evicted
                busy += [number] if result is CopyResult.BUSY else []
                full += [number] if result is CopyResult.FULL else []
            remaining = busy + failed
            interval = self._intervals.busy if busy else self._intervals.retry
            if remaining and self._closed.wait(interval):
                return
        size = sum(self._shards[n].bytes for n in self._selected if n not in full)
        print(
            f"staging: {size / 1e9:.3f} GB are in {self._cache.folder} after "
            f"{time.monotonic() - begin:.1f} s",
            flush=True,
        )
        if full:
            self._report_failure(
                f"not enough free space in {self._cache.folder} for {len(full)} of {len(self._selected)} "
                "shards",
                ": free some space, raise cluster.scratch_gb, or use another cluster.scratch",
            )

    def _report_failure(self, reason: str, fix: str = "") -> None:
        if self._source is None:
            self._error = UserError(f"staging: {reason}{fix}")
        else:
            print(f"staging: {reason}; reading from the source instead", flush=True)
