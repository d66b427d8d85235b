"""Room on the disk, bytes and inodes apart: asked for before the first byte, told in words when it ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import DISK_FULL_ERRNOS


def require_free_space(folder: Path, size: int, what: str, files: int = 0) -> None:
    """Refuse to begin what cannot end.

    A user's quota is not seen here; meeting it is told by `telling_full`.

    Args:
        folder: where the files will be.
        size: bytes still to be written.
        what: names them in the error.
        files: inodes still to be made.

    Raises:
        UserError: the file system has less room.
    """
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if size > free:
        raise UserError(f"{folder}: no room for {what}: it needs {size:,} bytes and {free:,} are free")
    # File systems without a fixed number of inodes report none at all.
    if room.f_files and files > room.f_favail:
        raise UserError(
            f"{folder}: no room for {what}: it needs {files:,} inodes and {room.f_favail:,} are free"
        )


@contextlib.contextmanager
def explain_disk_full(folder: Path) -> Iterator[None]:
    """Turn the system's words for a full disk or a met quota into a line.

    Raises:
        UserError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS | {errno.EFBIG}:
            raise
        raise UserError(
            f"{error.filename or folder}: {os.strerror(error.errno)} (bytes or inodes); free some, or choose "
            "another workspace=; asking again goes on from here"
        ) from None
