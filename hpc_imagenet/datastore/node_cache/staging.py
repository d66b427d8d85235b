"""Copying a version's shards to the node's own disk while training reads them already.

One thread a node sees to it, and leaves the work to a process of low priority (`copier.py`), so that it takes
the CPU time that decoding leaves.
A job that shares the node shares the work: a shard that another process is bringing is left to it, and looked
at again later.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.cache import CopyResult, NodeCache
from hpc_imagenet.datastore.reader.shard_reader import StagedShards
from hpc_imagenet.errors import UserError

POLL = 1.0  # s between two looks at a shard that another process is bringing
AGAIN = 60.0  # s between two tries at a shard that cannot be read or written

Tell = Callable[[int], None]  # how many bytes are done


class ShardCopier(Protocol):
    """Whoever copies the shards of a version; `copier.Copier` does."""

    def fetch(self, file: File, target: Path, tell: Tell) -> None:
        """Bring a shard, whole and with its hash, or not at all."""

    def hash(self, path: Path, file: File, tell: Tell) -> str:
        """Return the hash of a copy that was made long ago, in the form of `file.hash`."""

    def close(self) -> None:
        """Let go of what is under way."""


class _Stopped(Exception):
    """Nobody needs the copies any more."""


class Staging:
    """The copying of one version's shards; `with` it, they come.

    Args:
        staged: who reads them.
        cache: where they go.
        shards: of the manifest.
        copies: who makes them.
        needed: whether reading waits for the copies, so that one that fails is the reader's trouble.
    """

    def __init__(
        self,
        staged: StagedShards,
        cache: NodeCache,
        shards: Sequence[File],
        copies: ShardCopier,
        needed: bool,
    ) -> None:
        self._staged, self._cache, self._shards = staged, cache, shards
        self._copies, self._needed = copies, needed
        self._stop = threading.Event()
        self._through = threading.Event()
        self._thread = threading.Thread(target=self._work, name="staging", daemon=True)

    def __enter__(self) -> Staging:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._copies.close()
        self._staged.refetch_needed.set()  # wakes it
        self._thread.join()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing more will come, unless a copy turns out to be damaged; False after `seconds`."""
        return self._through.wait(seconds)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._staged.refetch_needed.clear()
                self._all()
                self._through.set()
                self._staged.refetch_needed.wait()
        except _Stopped:
            pass
        except Exception as error:  # a defect; readers must not wait for what will not come
            traceback.print_exc()
            self._trouble(" ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            self._through.set()

    def _all(self) -> None:
        """Bring all shards that there is room for, however often it takes."""
        began, left, told = time.monotonic(), list(range(len(self._shards))), set()
        full: list[int] = []
        while left:
            busy, failed = [], []
            for number in left:
                try:
                    came = self._one(number)
                except (UserError, OSError) as error:
                    if self._stop.is_set():
                        raise _Stopped from None
                    failed.append(number)
                    if number not in told:
                        told.add(number)
                        self._trouble(f"{error}")
                else:
                    busy += [number] if came is CopyResult.BUSY else []
                    full += [number] if came is CopyResult.FULL else []
            left = busy + failed
            if left and self._stop.wait(POLL if busy else AGAIN):
                raise _Stopped
        size = sum(shard.bytes for n, shard in enumerate(self._shards) if n not in full)
        print(
            f"staging: {size / 1e9:.3f} GB are in {self._cache.folder} after "
            f"{time.monotonic() - began:.1f} s",
            flush=True,
        )
        if full:
            self._trouble(
                f"no room for {len(full)} of {len(self._shards)} shards in {self._cache.folder}",
                ": make room, or give another cluster.scratch",
            )

    def _one(self, number: int) -> CopyResult:
        file = self._shards[number]
        came = self._cache.get_or_fetch(file, self._fetch, self._prove)
        if came is CopyResult.HERE:
            self._staged.poll(number)  # from now on it is in use
        return came

    def _fetch(self, file: File, path: Path) -> None:
        self._copies.fetch(file, path, self._tell)

    def _prove(self, file: File, path: Path) -> bool:
        return self._copies.hash(path, file, self._tell) == file.hash

    def _tell(self, done: int) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _trouble(self, why: str, remedy: str = "") -> None:
        if self._needed:
            self._staged.fail(UserError(f"staging: {why}{remedy}"))
        else:
            print(f"staging: {why}; it is read from where it lies", flush=True)
