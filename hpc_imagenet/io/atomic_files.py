"""Files that are whole or absent: temp file in the same folder, fsync, then rename or link."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

WRITEBACK_BYTES = 16 << 20  # bytes of a large file that the disk is given at a time, while more is written
DISK_FULL_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT}
)  # what the system says of a full disk, or a quota that is met

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


@contextlib.contextmanager
def atomic_write(
    path: Path, before: Callable[[], object] | None = None, secret: bool = False
) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the place of `path` when the block ends well.

    Readers see the old bytes or the new ones, never a part, also after a power cut. An exception leaves
    `path` as it was and no temporary file behind; also one of `before`, which is called when all bytes are on
    the disk and nothing but the rename is left. A `secret` can be read by its owner alone, from the start.
    """
    with _temporary(path, secret) as (file, name):
        yield file
        _sync(file)
        if before is not None:
            before()
        name.replace(path)
        sync_folder(path.parent)


def make_read_only(descriptor: int) -> None:
    """Let nobody write an open file any more who has not opened it yet; root is not held back."""
    os.fchmod(descriptor, os.fstat(descriptor).st_mode & ~0o222)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    with atomic_write(path) as file:
        file.write(_encode(value))


def write_json_once(path: Path, value: Any) -> bool:
    """Write `path` unless it exists; of several writers at once exactly one gets True.

    This is how an attempt's outcome is told once: whoever comes second (a job that ends while it is being
    cancelled) changes nothing.
    """
    with _temporary(path) as (file, name):
        file.write(_encode(value))
        _sync(file)
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links: whoever makes the claim may rename.
            try:
                path.with_name(f".{path.name}.claim").touch(exist_ok=False)
            except FileExistsError:
                return False
            name.replace(path)
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> Any | None:
    """Return the JSON value in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


class BackgroundWriteback:
    """Gives a large file to the disk while it grows, so that fsync has little left to wait for.

    Source: sync_file_range(2), which promises nothing. Where it is missing, all is left to fsync.
    """

    def __init__(self, descriptor: int, at: int = 0) -> None:
        self._descriptor, self._begun = descriptor, at
        self._begin = getattr(ctypes.CDLL(None), "sync_file_range", None)

    def written_up_to(self, done: int) -> None:
        """Say that the first `done` bytes are written."""
        length = done - self._begun
        if self._begin and length >= WRITEBACK_BYTES:
            self._begin(self._descriptor, ctypes.c_int64(self._begun), ctypes.c_int64(length), _WRITE)
            self._begun = done


class StreamingWriter:
    """Writes a large file from `at` on, and lets it flow."""

    def __init__(self, descriptor: int, at: int = 0) -> None:
        self._descriptor, self._done, self._flowing = descriptor, at, BackgroundWriteback(descriptor, at)

    def write(self, block: memoryview) -> None:
        """Write a block, all of it."""
        while block:
            written = os.write(self._descriptor, block)
            self._done += written
            block = block[written:]
        self._flowing.written_up_to(self._done)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut (a no-op on file systems that refuse it)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path, secret: bool = False) -> Iterator[tuple[IO[bytes], Path]]:
    # Not by mkstemp, which makes 0600: colleagues read these files as far as the umask lets them.
    name = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, name
    finally:
        name.unlink(missing_ok=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _encode(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=False) + "\n").encode()
