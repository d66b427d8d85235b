"""Reading the bytes of shards: from files of a folder, or from a node's copies as far as they are there."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.errors import UserError

LOOK_AGAIN = 0.5  # s between two looks whether a shard has come


class ShardReader(Protocol):
    """The shards of one dataset, by their number. Safe to be asked by many threads at once."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`.

        Raises:
            UserError: the shard ends before, or cannot be read.
        """

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Return the same bytes from what is least likely to be damaged; `data` could not be used."""

    def is_remote(self) -> bool:
        """Whether reading is worth doing ahead: a wait, rather than work."""


class FolderShards:
    """Shards that are files of a folder. Cheap to open, to pickle and to fork.

    Raises:
        UserError: a shard is missing or has another size than recorded.
    """

    def __init__(self, folder: Path, shards: Sequence[File]) -> None:
        self.paths = [folder / shard.path for shard in shards]
        for path, shard in zip(self.paths, shards, strict=True):
            found = path.stat().st_size if path.exists() else None
            if found != shard.bytes:
                was = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
                raise UserError(f"{path} {was}: make the dataset again")
        self._descriptors: dict[int, int] = {}
        _open_many()

    def __getstate__(self) -> dict[str, object]:
        """Leave the open files behind: another process opens its own."""
        return {**self.__dict__, "_descriptors": {}}

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`: one pread."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            opened = os.open(self.paths[shard], os.O_RDONLY)
            descriptor = self._descriptors.setdefault(shard, opened)
            if descriptor != opened:  # another thread was faster
                os.close(opened)
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise UserError(f"{self.paths[shard]}: ends inside the image at byte {offset}")
        return data

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Return what was read: there is nothing else."""
        return data

    def is_remote(self) -> bool:
        """The page cache reads ahead by itself."""
        return False


class StagedShards:
    """Shards that are read from a node's cache once they are there, and from their source until then.

    Args:
        source: where they come from; None: it cannot be read in pieces, so reading waits for the copy.
        cache: the node's.
        shards: of the manifest.
    """

    def __init__(self, source: ShardReader | None, cache: NodeCache, shards: Sequence[File]) -> None:
        self._source, self._cache, self._shards = source, cache, shards
        self._descriptors: dict[int, int] = {}
        self._looked = [float("-inf")] * len(shards)
        self._lock = threading.Lock()
        self._trouble: UserError | None = None
        self.refetch_needed = (
            threading.Event()
        )  # a copy turned out to be damaged, so one has to be brought again
        _open_many()

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("a staged store is opened by each process that reads it")

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._look(shard)
        while descriptor is None:
            if self._source is not None:
                return self._source.read(shard, offset, length)
            if self._trouble is not None:
                raise self._trouble
            time.sleep(LOOK_AGAIN)
            descriptor = self._look(shard)
        data = b""
        with contextlib.suppress(OSError):  # a bad disk: what it was copied from may be better
            data = os.pread(descriptor, length, offset)
        return data if len(data) == length else self.reread(shard, offset, length, data)

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Return the bytes from the source; a copy that has others is thrown away, and brought again."""
        if self._source is None or shard not in self._descriptors:
            return data
        right = self._source.read(shard, offset, length)
        if right != data:
            print(f"{self._cache.path(self._shards[shard])}: damaged, is copied again", flush=True)
            with self._lock:
                # Others may be reading from it: it is not closed.
                self._descriptors.pop(shard, None)
                self._cache.discard(self._shards[shard])
            self.refetch_needed.set()
        return right

    def is_remote(self) -> bool:
        """Whether a shard is not on this node yet."""
        return len(self._descriptors) < len(self._shards)

    def poll(self, shard: int) -> bool:
        """Look whether a shard has come; whether it is here."""
        self._looked[shard] = float("-inf")
        return self._look(shard) is not None

    def fail(self, error: UserError) -> None:
        """Let those who wait for a shard know that it will not come."""
        self._trouble = error

    def close(self) -> None:
        """Let go of all copies, so that they may be evicted, and end the reads that wait for a shard."""
        self.fail(UserError("the datastore was closed before the shard came"))  # or a thread never ends
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _look(self, shard: int) -> int | None:
        with self._lock:
            if shard not in self._descriptors:
                moment = time.monotonic()
                if moment - self._looked[shard] < LOOK_AGAIN:
                    return None
                self._looked[shard] = moment
                descriptor = self._cache.open(self._shards[shard])
                if descriptor is None:
                    return None
                self._descriptors[shard] = descriptor
            return self._descriptors[shard]


def _open_many() -> None:
    """Let this process have as many files open as it may: shards stay open, and 1024 are soon reached."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # the system's own limit was lowered meanwhile
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
