"""Atomic writes: of files by a temporary one, fsync, then rename or hard link; of folders by a rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

Result = TypeVar("Result")

# Bytes per write. Larger ones took more CPU time (ext4, Linux 6.18; benchmarks/results/transfer.txt).
WRITE_BYTES = 256 << 10
WRITEBACK_BYTES = 16 << 20  # bytes after which write-back of a growing file is started
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})  # a full disk; an exceeded quota

_LEFTOVER_AGE = 86_400.0  # s after which a temporary folder without new files is that of a killed process
_REMOVALS = 5  # most processes that start while a file is written and remove its temporary one
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start write-back without waiting for it
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


@contextlib.contextmanager
def atomic_write(
    path: Path, before: Callable[[], object] | None = None, secret: bool = False
) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends without an exception.

    Readers see the old bytes or the new ones, never a partial file, even after a power failure. After an
    exception `path` is unchanged and the temporary file is removed.

    Args:
        path: the file to create or replace.
        before: called after the fsync and before the rename; an exception from it cancels the rename.
        secret: create the file with mode 600.
    """
    with _temporary(path, secret) as (file, name):
        yield file
        _sync(file)
        if before is not None:
            before()
        name.replace(path)
        sync_folder(path.parent)


def write_again_if_removed(write: Callable[[], Result]) -> Result:
    """Call `write`, and again if its temporary file was removed by a process that took it for a killed one's.

    Two jobs that share the same work in different numbers of parts write the same files, and each removes the
    temporary files that it finds when it starts.
    """
    for _ in range(_REMOVALS):
        try:
            return write()
        except OSError as error:
            renaming = isinstance(error, FileNotFoundError) and str(error.filename).endswith(".tmp")
            if not renaming and error.errno != errno.ESTALE:  # NFS, if a process of another node removed it
                raise
    return write()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder that becomes `path` when the block ends without an exception.

    After an exception the temporary folder is removed. One that a killed process left beside it is removed by
    the next call for the same `path`, a day after the last file was added to it.

    Args:
        path: a folder that does not exist or is empty.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE:
                shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_read_only(descriptor: int) -> None:
    """Remove all write permission from an open file; existing descriptors and root can still write."""
    os.fchmod(descriptor, os.fstat(descriptor).st_mode & ~0o222)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(_encode(value))


def write_json_once(path: Path, value: Any) -> bool:
    """Write `value` to `path` as JSON unless the file exists; of concurrent writers exactly one gets True.

    An attempt's outcome is written this way: if a job ends while it is being cancelled, the first outcome
    is kept.
    """
    with _temporary(path) as (file, name):
        file.write(_encode(value))
        _sync(file)
        try:
            os.link(name, path)
        except FileExistsError:
            # NFS sends a request again whose reply was lost: the file may be our own (open(2), "O_EXCL").
            if os.fstat(file.fileno()).st_nlink < 2:
                return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links: the process that creates the claim file may rename.
            try:
                path.with_name(f".{path.name}.claim").touch(exist_ok=False)
            except FileExistsError:
                return False
            name.replace(path)
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> Any | None:
    """Return the JSON value in `path`, or None if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return decode_json(path.read_bytes())
    except FileNotFoundError:
        return None


def decode_json(data: bytes | str) -> Any:
    """Return the value of a JSON document.

    Raises:
        ValueError: not JSON, not UTF-8, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is the cause of `error`; torch.save wraps the OSError in its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        error = error.__cause__ or error.__context__
    return False


class BackgroundWriteback:
    """Start write-back of a large file while it grows, so that the final fsync is short.

    Source: sync_file_range(2). It gives no durability, so fsync is still needed; without it this is a no-op.

    Args:
        descriptor: the open file.
        at: offset of the first byte that will be written.
    """

    def __init__(self, descriptor: int, at: int = 0) -> None:
        self._descriptor, self._flushed = descriptor, at
        self._sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)

    def written_up_to(self, done: int) -> None:
        """Start write-back once `WRITEBACK_BYTES` are new. `done`: bytes of the file written so far."""
        length = done - self._flushed
        if self._sync_file_range and length >= WRITEBACK_BYTES:
            self._sync_file_range(
                self._descriptor, ctypes.c_int64(self._flushed), ctypes.c_int64(length), _WRITE
            )
            self._flushed = done


class StreamingWriter:
    """Sequential writer of a large file with write-back in the background, from offset `at`."""

    def __init__(self, descriptor: int, at: int = 0) -> None:
        self._descriptor, self._done = descriptor, at
        self._writeback = BackgroundWriteback(descriptor, at)

    def write(self, block: memoryview) -> None:
        """Write the whole block."""
        while block:
            written = os.write(self._descriptor, block[:WRITE_BYTES])
            self._done += written
            block = block[written:]
        self._writeback.written_up_to(self._done)


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk (a no-op on file systems that refuse it)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path, secret: bool = False) -> Iterator[tuple[IO[bytes], Path]]:
    # mkstemp would create mode 0600; these files get the mode that the umask allows, so others can read them.
    # Only those may write a file who may write its folder: in the folder of a run, its owner alone.
    mode = 0o600 if secret else 0o644 | (path.parent.stat().st_mode & 0o022)
    name = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file, name
    finally:
        name.unlink(missing_ok=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _encode(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=False) + "\n").encode()
