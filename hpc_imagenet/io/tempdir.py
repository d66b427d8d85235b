"""A folder of this process's own on its node: of mode 700, and gone with it, even if it was killed.

Its owner holds the kernel's lock on it, which goes with the process however that ends. So a folder that can
be locked was left by one that was killed, and the next process of the same user and purpose removes it.
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
    """A folder for the life of this process, or until it is closed.

    Args:
        purpose: a word for its name; only folders of the same one are swept.
        top: where it is made; None: where $TMPDIR says.

    Attributes:
        folder: where it is.
    """

    def __init__(self, purpose: str, top: Path | None = None) -> None:
        top = top or Path(tempfile.gettempdir())
        remove_stale(purpose, top)
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=_prefix(purpose), dir=top))
            try:
                self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # another process has swept it before it was locked
                continue
            with contextlib.suppress(OSError):  # no locks on this file system: then nobody sweeps it
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.fstat(self._lock).st_nlink:
                return
            os.close(self._lock)  # the same, a moment later

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_stale(purpose: str, top: Path) -> list[Path]:
    """Remove what this user's processes have left in `top` that were killed, and return it."""
    removed = []
    for folder in top.glob(f"{_prefix(purpose)}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            # Everybody may make such a name in /tmp: links and other users' folders are left alone.
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
