"""A cache of shards on a node's own disk, shared by all jobs of one user on that node.

    <scratch>/hpc_imagenet-<uid>/
        blake3-<hex>             a file, named by its hash, so that versions share identical files
        blake3-<hex>.json        time of its last verification, and its size, times and inode at that moment
        .blake3-<hex>.lock       held by the process that fetches the file
        .blake3-<hex>.part       the part fetched so far
        .blake3-<hex>.size       size of the whole file, in bytes, while it is fetched
        .space.lock              held by the process that makes space for a file

Locks are kernel locks (flock), which end with the process that holds them. A reader holds a shared lock on
the file, so that a file in use is not evicted. If it is evicted nevertheless, processes that have it open can
still read it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import os
import platform
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.io.atomic_files import atomic_folder, write_json
from hpc_imagenet.io.ownership import user_name

MAX_VERIFIED_AGE = 24 * 3600.0  # s since its last verification after which a file is hashed again before use
_START_SPREAD = 3600.0  # s between the starts of the tasks of one job on a node, at most
KEEP_FREE = 0.02  # fraction of the disk


class ShardCopier(Protocol):
    """Copies single files of a version to the cache, such as `CopyProcess`."""

    def fetch(self, file: File, target: Path) -> None:
        """Write a file to `target`, complete and verified by its hash, or raise."""

    def hash(self, path: Path, file: File) -> str:
        """Return the hash of a local file, in the form of `file.hash`."""

    def close(self) -> None:
        """Abort a running copy, from any thread; later calls raise."""


class CopyResult(enum.Enum):
    """Result of caching a file."""

    CACHED = "cached"
    BUSY = "another process is fetching it, or making space"
    FULL = "not enough free space"


class NodeCache:
    """The cached files below one scratch folder, for one process.

    The age of a verification counts from the start of the process, however long it runs: a task that copies
    nothing, and opens a file late, finds it as the task that copies did at the start of their job.

    Args:
        scratch: `cluster.scratch`, a folder on the node's own disk or in its memory. The node's environment
            variables (such as $SLURM_TMPDIR) are expanded.
        limit: maximum size of the cache in bytes; None: the free space of the disk.

    Raises:
        UserError: a variable is not set on this node, the cache folder cannot be created, or another user
            owns it or can write to it.
    """

    def __init__(self, scratch: str | Path, limit: int | None = None) -> None:
        expanded = expand_home(os.path.expandvars(scratch))
        if "$" in str(expanded):
            raise UserError(
                f"cluster.scratch={scratch}: this variable is not set on {platform.node()}; "
                "use another folder, or cluster.scratch=null"
            )
        self.folder = _cache_folder(expanded)
        fixed = "$" not in str(scratch)  # else it is the folder of one user or one job
        self.limit = limit
        self._begin = time.time()
        try:
            _make_scratch(self.folder, fixed)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            status = self.folder.lstat()
        except OSError as error:
            raise UserError(
                f"cluster.scratch={expanded} cannot be used on this node ({error.strerror}): "
                f"use a folder that you can write to{_owner_fix(expanded) if fixed else ''}"
            ) from None
        # In a folder that all users can write to, such as /dev/shm, another user could have created it first.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UserError(
                f"{self.folder} must be a folder that only you can write to, but its owner is "
                f"{user_name(status.st_uid)} and its mode {status.st_mode & 0o7777:o}: remove it, or use "
                "another cluster.scratch"
            )

    def path(self, file: File) -> Path:
        """Return the path of `file` in the cache, whether or not it is cached."""
        return self.folder / file.hash.replace(":", "-")

    def present_bytes(self, file: File) -> int:
        """Return how many bytes of a file are on this node, in part or whole."""
        return min(file.bytes, max(_size(_part(self.path(file))), _size(self.path(file))))

    def open(self, file: File) -> int | None:
        """Open a cached and verified file; it is not evicted while it is open.

        Returns:
            A file descriptor for the caller to close; None if the file is not cached, was modified, or must
            be verified again.
        """
        path = self.path(file)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):  # the file is being evicted
                    raise
                # A file system without locks, from which nothing is evicted.
            status = os.fstat(descriptor)
            if status.st_uid == os.getuid() and self._is_verified(path, file, status, MAX_VERIFIED_AGE):
                os.utime(_note(path))  # time of the last use, for eviction
                return descriptor
        except OSError:
            pass
        os.close(descriptor)
        return None

    def get_or_fetch(self, file: File, copier: ShardCopier) -> CopyResult:
        """Ensure that `file` is cached and verified.

        A cached file whose last verification is too old, or that was modified since, is hashed again.

        Raises:
            Exception: any exception of the copier.
        """
        path = self.path(file)
        try:
            with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
                return self._get_or_fetch(path, file, copier)
        except Timeout:
            return CopyResult.BUSY

    def discard(self, file: File) -> None:
        """Remove a file whose bytes are wrong."""
        _remove(self.path(file))

    def _get_or_fetch(self, path: Path, file: File, copier: ShardCopier) -> CopyResult:
        if path.exists():
            before = path.stat()
            # A task that starts later must not find a file too old that this one has not hashed again.
            if self._is_verified(path, file, before, MAX_VERIFIED_AGE - _START_SPREAD):
                return CopyResult.CACHED
            intact = before.st_size == file.bytes and copier.hash(path, file) == file.hash
            if intact and _stamp(before) == _stamp(path.stat()):
                self._record_verified(path)
                return CopyResult.CACHED
            _remove(path)
        if not self._make_space(file):
            return CopyResult.FULL
        copier.fetch(file, path)
        self._record_verified(path)
        return CopyResult.CACHED

    def _record_verified(self, path: Path) -> None:
        _expected(path).unlink(missing_ok=True)
        write_json(_note(path), {"proved": time.time(), "stamp": _stamp(path.stat())})

    def _is_verified(self, path: Path, file: File, status: os.stat_result, max_age: float) -> bool:
        try:
            note = json.loads(_note(path).read_bytes())
            # A clock that was set back is no reason either, unless by so much that the time says nothing.
            recent = self._begin - note["proved"] < max_age and note["proved"] - time.time() < max_age
            return recent and note["stamp"] == _stamp(status) and status.st_size == file.bytes
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _make_space(self, file: File) -> bool:
        """Evict files until `file` fits; evict nothing if it cannot fit. Return whether it fits.

        Partial files of interrupted fetches are evicted first, then the least recently used files that are
        not open. Space that other processes need for the rest of what they fetch is not free.
        """
        with FileLock(self.folder / ".space.lock", timeout=0):  # else two processes could find the same space
            if not self._evict(file):
                return False
            write_json(_expected(self.path(file)), file.bytes)
        return True

    def _evict(self, file: File) -> bool:
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize - int(KEEP_FREE * status.f_blocks * status.f_frsize)
        if self.limit is not None:
            free = min(free, self.limit - sum(_size(path) for path in self.folder.iterdir()))
        free -= self._awaited_bytes(file)
        part = _part(self.path(file))
        missing = file.bytes - _size(part) - free  # an earlier attempt may have fetched a part of the file
        with contextlib.ExitStack() as locks:
            chosen = []
            for path in [*self.folder.glob(".*.part"), *self._least_recently_used()]:
                if missing <= 0:
                    break
                lock = _lock_unused(path)
                if lock is not None:
                    locks.callback(os.close, lock)
                    chosen.append(path)
                    missing -= _size(path)
            if missing > 0:
                return False
            for path in chosen:
                _remove(path)
        return True

    def _awaited_bytes(self, file: File) -> int:
        """Return how many bytes other processes will still write, of the files other than `file`."""
        awaited = 0
        for expected in self.folder.glob(".*.size"):
            path = expected.with_name(expected.stem[1:])
            if path == self.path(file):
                continue
            lock = _lock_unused(_part(path))
            if lock is not None:  # the process that fetched it was killed
                expected.unlink(missing_ok=True)
                os.close(lock)
                continue
            with contextlib.suppress(OSError, ValueError):
                size = int(expected.read_bytes())
                # In this order: the part is renamed at the end of a fetch, and must be counted once at least.
                present = [_size(_part(path)), _size(path)]
                awaited += max(0, size - sum(present))
        return awaited

    def _least_recently_used(self) -> list[Path]:
        def last_use(path: Path) -> float:
            try:
                return _note(path).stat().st_mtime
            except OSError:
                return 0.0

        files = [path for path in self.folder.iterdir() if path.name[0] != "." and path.suffix != ".json"]
        return sorted(files, key=lambda path: (last_use(path), path.name))


def cached_bytes(scratch: str, files: Iterable[File]) -> int:
    """Return how many bytes of `files` are in the cache below a scratch folder of this node.

    Nothing is created or verified.
    """
    folder = _cache_folder(expand_home(os.path.expandvars(scratch)))
    return sum(file.bytes for file in files if (folder / file.hash.replace(":", "-")).is_file())


def _cache_folder(scratch: Path) -> Path:
    return scratch / f"hpc_imagenet-{os.getuid()}"


def _make_scratch(cache: Path, share: bool) -> None:
    """Make the folders above a cache that are missing, and the cache in them.

    Where all users, or a group, may write to the folder above, they may write to those in it, too: the caches
    of other users will be beside this one. Each of them is checked for its owner and mode.

    Args:
        cache: the folder of this user's cache.
        share: whether other users may have the same scratch folder.

    Raises:
        OSError: a folder cannot be made.
    """
    missing = [folder for folder in cache.parents if not folder.is_dir()]  # the innermost is first
    if not missing:
        return
    top = missing[-1]
    mode = top.parent.stat().st_mode
    shared = share and (mode & 0o002 or (mode & 0o020 and mode & stat.S_ISGID))
    try:
        # With its final modes from the first moment, since a job of another user may start at the same time.
        with atomic_folder(top) as temporary:
            (temporary / cache.relative_to(top)).mkdir(mode=0o700, parents=True)
            for folder in missing if shared else ():
                (temporary / folder.relative_to(top)).chmod(stat.S_IMODE(mode) | stat.S_ISVTX)
    except OSError:
        if not top.is_dir():  # else another process has made it at the same time
            raise
        _make_scratch(cache, share)


def _owner_fix(scratch: Path) -> str:
    """Return what the owner of a folder that this user cannot use may type; empty if it is this user."""
    try:
        owner = scratch.stat().st_uid
    except OSError:
        return ""
    if owner == os.getuid() or os.access(scratch, os.W_OK | os.X_OK):
        return ""
    return f", or have its owner {user_name(owner)} run chmod 1777 {scratch} on {platform.node()}"


def _lock_unused(path: Path) -> int | None:
    """Lock a file that no process has open, or a partial file that no process is fetching.

    Returns:
        The descriptor that holds the lock; None if the file is in use.
    """
    flags = os.O_RDONLY
    if path.suffix == ".part":
        path, flags = path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT  # a killed process may have left none
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _expected(path: Path) -> Path:
    return path.with_name(f".{path.name}.size")


def _stamp(status: os.stat_result) -> list[int]:
    # No user can set the ctime, so it reveals every write.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _size(path: Path) -> int:
    """Return the bytes that a file occupies on the disk; 0 if it does not exist."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def _remove(path: Path) -> None:
    _note(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
