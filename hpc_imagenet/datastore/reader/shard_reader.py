"""Read byte ranges of shards, by default from the files of a folder."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

_FIX = (
    "if it belongs to a dataset, create it again with +stage=process; if to a datastore, delete the version "
    "with datastores delete and upload it again"
)


class ShardReader(Protocol):
    """Random access to the shards of one dataset, by shard number. Thread-safe."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`.

        Raises:
            UserError: the shard ends before `offset + length`, or cannot be read.
        """

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Read the range again, from the original source, after `data` failed to decode."""

    def read_ahead(self, shard: int, offset: int, length: int) -> None:
        """Have the kernel read the range into the page cache, without waiting for it or for an error."""

    def is_remote(self) -> bool:
        """Whether reads wait for a network that no page cache hides, so that threads must read ahead."""


class FolderShards:
    """Shards that are files of a folder. Cheap to open, to pickle and to fork.

    Args:
        folder: folder that the paths of the shards are relative to.
        shards: shards of the manifest.

    Raises:
        UserError: a shard is missing or has another size than recorded.
    """

    def __init__(self, folder: Path, shards: Sequence[File]) -> None:
        self._descriptors: dict[int, int] = {}
        self.paths = [folder / shard.path for shard in shards]
        for path, shard in zip(self.paths, shards, strict=True):
            try:  # one call for each shard: every task of a large job makes it
                size = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                size = None
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{path} {problem}: {_FIX}")
        raise_open_files_limit()

    def __del__(self) -> None:
        # A search opens a dataset for each trial; open files would exhaust the limit and keep deleted ones.
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the open files: another process opens its own."""
        return {**self.__dict__, "_descriptors": {}}

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`, by one pread."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._open(shard)
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise UserError(
                f"{self.paths[shard]} ends inside the image at byte {offset}, so it was truncated: {_FIX}"
            )
        return data

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Return `data`: the folder is the only source."""
        return data

    def read_ahead(self, shard: int, offset: int, length: int) -> None:
        """Have the kernel read the range into the page cache, without waiting for it or for an error."""
        with contextlib.suppress(OSError):
            advise_read(self._descriptors.get(shard) or self._open(shard), offset, length)

    def is_remote(self) -> bool:
        """Return False: the page cache can be filled ahead of use."""
        return False

    def _open(self, shard: int) -> int:
        opened = os.open(self.paths[shard], os.O_RDONLY)
        descriptor = self._descriptors.setdefault(shard, opened)
        if descriptor != opened:  # another thread has opened the shard first
            os.close(opened)
        return descriptor


def advise_read(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel read a range of an open file into the page cache; a few microseconds, without the GIL.

    Source: posix_fadvise(2). A file system may ignore it; the range is then read when it is needed.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def raise_open_files_limit() -> None:
    """Raise the limit of open files to its maximum: shards stay open, and the usual 1024 are soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # the system-wide limit was lowered meanwhile
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
