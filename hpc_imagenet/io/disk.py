"""Check free bytes and inodes up front, and explain a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import DISK_FULL_ERRNOS


def require_free_space(folder: Path, size: int, what: str, files: int = 0, setting: str = "") -> None:
    """Raise unless the file system has enough free bytes and inodes.

    Quotas are not checked here; `explain_disk_full` reports an exceeded quota.

    Args:
        folder: an existing folder on the file system.
        size: bytes to be written.
        what: name of the files for the error message.
        files: number of files to be created.
        setting: put in front of the error message, such as datastore.url.

    Raises:
        UserError: too few free bytes or inodes.
    """
    stat = os.statvfs(folder)
    where = f"{setting}: {folder}" if setting else f"{folder}"
    free = stat.f_bavail * stat.f_frsize
    if size > free:
        raise UserError(
            f"{where}: not enough free space for {what}: it needs {size:,} bytes and {free:,} are free"
        )
    # File systems without a fixed number of inodes report 0 in f_files.
    if stat.f_files and files > stat.f_favail:
        raise UserError(
            f"{where}: not enough free space for {what}: "
            f"it needs {files:,} inodes and {stat.f_favail:,} are free"
        )


@contextlib.contextmanager
def explain_disk_full(folder: Path) -> Iterator[None]:
    """Convert an OSError of a full disk or an exceeded quota within the block into a UserError.

    Args:
        folder: named in the error if the OSError names no file.

    Raises:
        UserError: the disk or a quota is full, or the file is larger than the limit.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS | {errno.EFBIG}:
            raise
        fix = " (bytes or inodes); free some space, or set another workspace="
        if error.errno == errno.EFBIG:
            fix = "; raise the limit with ulimit -f"
        raise UserError(
            f"{error.filename or folder}: {os.strerror(error.errno)}{fix}; run the same command again to "
            "resume"
        ) from None
