"""The folder of one start of a session on its node: of mode 700, and gone with it, even if it was killed.

Its owner holds the kernel's lock on it, which goes with the process however that ends. So a folder that can
be locked is of a start that was killed, and the next start of the same user removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

# Not $TMPDIR: the address of a socket has at most 107 bytes.
TOP = Path("/tmp")
_PREFIX = "hpc_imagenet-session-"


class Place:
    """A folder of its own for the life of this process.

    Attributes:
        folder: where it is.
    """

    def __init__(self, top: Path = TOP) -> None:
        sweep(top)
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=top))
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # no locks on this file system: then nobody sweeps it
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.fstat(self._lock).st_nlink:
                return
            os.close(self._lock)  # another start has swept it before it was locked

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def sweep(top: Path = TOP) -> list[Path]:
    """Remove what starts of this user's sessions have left that were killed, and return it."""
    removed = []
    for folder in top.glob(f"{_PREFIX}*"):
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


def private(job: str, top: Path = TOP, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether Slurm gave a job a `top` of its own (job_container/tmpfs), whose files no login by ssh sees.

    What is mounted there is then a folder that is called by the job's id.
    """
    rows = [line.split() for line in mounts.read_text().splitlines()]
    roots = [row[3] for row in rows if row[4] == str(top)]
    return bool(roots) and re.search(rf"\b{job}\b", roots[-1]) is not None  # the last one covers the others
