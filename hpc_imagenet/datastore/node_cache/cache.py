"""A node's own disk as a cache of shards, shared by all jobs of one user on that node.

    <scratch>/hpc_imagenet-<uid>/
        sha256-<hex>             a file, by its hash, so that versions share what is equal in them
        sha256-<hex>.json        that it was proved: when, and its size, times and inode at that moment
        .sha256-<hex>.lock       held by whoever brings it
        .sha256-<hex>.part       what has come of it

Locks are those of the kernel (flock): they go with the process that holds them. Whoever reads a file holds
it shared, so that what is in use is not evicted; a file that was evicted all the same stays readable to those
who have it open.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json

TRUST = 24 * 3600.0  # s after which a file is read and proved again before it is used
SPARE = 0.02  # of the disk, left free

Fetch = Callable[[File, Path], None]  # brings a file to a path, whole and proved by its hash, or raises
Prove = Callable[[File, Path], bool]  # reads a file and says whether it has its hash


class CopyResult(enum.Enum):
    """What came of bringing a file."""

    HERE = "here"
    BUSY = "another process is bringing it"
    FULL = "no room for it"


class NodeCache:
    """The files of one scratch folder.

    Args:
        scratch: a folder on the node's own disk, or in its memory.
        limit: bytes that the cache may take at most; None: as much as there is.

    Raises:
        UserError: the folder cannot be made, or is somebody else's.
    """

    def __init__(self, scratch: Path, limit: int | None = None) -> None:
        self.folder = scratch / f"hpc_imagenet-{os.getuid()}"
        self.limit = limit
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.lstat()
        except OSError as error:
            raise UserError(f"cluster.scratch={scratch} cannot be used: {error.strerror}") from None
        # In a folder that everybody may write, such as /dev/shm, another could have made it first.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UserError(f"{self.folder} is not a folder that you alone can write: remove it")

    def path(self, file: File) -> Path:
        """Return where `file` lies if it is here."""
        return self.folder / file.hash.replace(":", "-")

    def open(self, file: File) -> int | None:
        """Open a file that is here and proved; while it is open it is not evicted.

        Returns:
            a descriptor, to be closed by the caller; None: it is not here, or was touched since.
        """
        path = self.path(file)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if self._proved(path, file, os.fstat(descriptor)):
                os.utime(_note(path))  # the last use, for eviction
                return descriptor
        except OSError:  # it is being evicted
            pass
        os.close(descriptor)
        return None

    def get_or_fetch(self, file: File, fetch: Fetch, prove: Prove, wait: bool = False) -> CopyResult:
        """Make sure that `file` is here, and proved.

        Args:
            file: what is wanted.
            fetch: brings it.
            prove: reads one that is here already, but was proved long ago or touched since.
            wait: whether to wait for another process that is bringing it.

        Raises:
            whatever `fetch` raises.
        """
        path = self.path(file)
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if wait else 0)
        try:
            with lock:
                return self._bring(path, file, fetch, prove)
        except Timeout:
            return CopyResult.BUSY

    def discard(self, file: File) -> None:
        """Forget a file whose bytes were found wrong."""
        _remove(self.path(file))

    def _bring(self, path: Path, file: File, fetch: Fetch, prove: Prove) -> CopyResult:
        if path.exists():
            if self._proved(path, file, path.stat()):
                return CopyResult.HERE
            before = _stamp(path.stat())
            if path.stat().st_size == file.bytes and prove(file, path) and before == _stamp(path.stat()):
                self._vouch(path)
                return CopyResult.HERE
            _remove(path)
        if not self._room(file):
            return CopyResult.FULL
        fetch(file, path)
        self._vouch(path)
        return CopyResult.HERE

    def _vouch(self, path: Path) -> None:
        write_json(_note(path), {"proved": time.time(), "stamp": _stamp(path.stat())})

    def _proved(self, path: Path, file: File, status: os.stat_result) -> bool:
        try:
            note = json.loads(_note(path).read_bytes())
            fresh = 0 <= time.time() - note["proved"] < TRUST
            return fresh and note["stamp"] == _stamp(status) and status.st_size == file.bytes
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _room(self, file: File) -> bool:
        """Evict what was not used for longest and is not in use, if that makes room; else nothing.

        What came of copies that were cut off goes first.
        """
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize - int(SPARE * status.f_blocks * status.f_frsize)
        if self.limit is not None:
            free = min(free, self.limit - sum(_size(path) for path in self.folder.iterdir()))
        part = self.path(file).with_name(f".{self.path(file).name}.part")
        missing = file.bytes - _size(part) - free  # an earlier try may have brought some of it
        with contextlib.ExitStack() as held:
            chosen = []
            for path in [*self.folder.glob(".*.part"), *self._oldest_first()]:
                if missing <= 0:
                    break
                if held.enter_context(_unused(path)):
                    chosen.append(path)
                    missing -= _size(path)
            if missing > 0:
                return False
            for path in chosen:
                _remove(path)
        return True

    def _oldest_first(self) -> list[Path]:
        def used(path: Path) -> float:
            try:
                return _note(path).stat().st_mtime
            except OSError:
                return 0.0

        files = [path for path in self.folder.iterdir() if path.name[0] != "." and path.suffix != ".json"]
        return sorted(files, key=lambda path: (used(path), path.name))


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Hold a file that nobody has open through a cache, or a part that nobody brings; False else."""
    in_use, part = path, path.suffix == ".part"
    if part:
        in_use = path.with_suffix(".lock")  # which may have gone with the process that held it
    flags = os.O_RDWR | os.O_CREAT if part else os.O_RDONLY
    try:
        descriptor = os.open(in_use, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _stamp(status: os.stat_result) -> list[int]:
    # The time of change cannot be set by anybody, so a write shows.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _size(path: Path) -> int:
    """Return the bytes that a file takes of the disk; 0 where there is none."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def _remove(path: Path) -> None:
    _note(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
