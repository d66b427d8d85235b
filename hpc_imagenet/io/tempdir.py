"""Temporary folders on the node: mode 700, removed by a later process if their own process was killed.

A process holds a lock (flock) on its folder, which the kernel releases however the process ends. A folder
that can be locked therefore belongs to a dead process, and the next process of the same user and purpose
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path


class NodeTempDir:
    """A temporary folder of this process, until `close`.

    Args:
        purpose: part of the folder's name; only stale folders of the same purpose are removed.
        top: parent folder; None: $TMPDIR.

    Attributes:
        folder: path of the temporary folder.
    """

    def __init__(self, purpose: str, top: Path | None = None) -> None:
        top = top or Path(tempfile.gettempdir())
        remove_stale(purpose, top)
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=_prefix(purpose), dir=top))
            try:
                self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # another process removed it before it was locked
                continue
            with contextlib.suppress(OSError):  # a file system without locks: stale folders are kept
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.fstat(self._lock).st_nlink:
                return
            os.close(self._lock)  # another process removed it before it was locked

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_stale(purpose: str, top: Path) -> list[Path]:
    """Remove this user's folders of killed processes in `top`; return the removed paths."""
    removed = []
    for folder in top.glob(f"{_prefix(purpose)}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            # Any user can create such a name in /tmp: skip links and folders of other users.
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
            finally:
                os.close(lock)
    return removed


def _prefix(purpose: str) -> str:
    return f"hpc_imagenet-{purpose}-"
