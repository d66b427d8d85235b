"""The transport to a folder: hard links where the file system allows, else verified copies.

Asked again after a cut, it sends what is missing and keeps what is there. A file of the target is whole or
absent: a copy is hashed while it is written under a temporary name, compared with the manifest, flushed to
the disk and renamed; a link is one step.

A link costs no space and no time, so that a datastore beside its archives is free; the link and its source
are one file then, which is made read-only, because versions never change. Its size is compared; its bytes
are hashed again only where it was written after the dataset's manifest, since everything older was hashed on
its way to that manifest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.durable import replacing, sync_folder
from hpc_imagenet.errors import UserError

BLOCK = 4 << 20  # bytes read at a time

Tell = Callable[[int, str], None]  # bytes that are done, a word about what is done now

# What link() answers where it cannot, though a copy can.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Piece:
    """One file to send: where it lies, and what and where it shall be (`file.path` within the target)."""

    source: Path
    file: File
    link: bool = False  # whether a hard link may do


@dataclass
class Sent:
    """Bytes, by how they came to be in the target."""

    copied: int = 0
    linked: int = 0
    kept: int = 0  # were there already

    @property
    def total(self) -> int:
        """All bytes that are there and verified."""
        return self.copied + self.linked + self.kept


def send(pieces: Sequence[Piece], target: Path, written: float, tell: Tell) -> Sent:
    """Bring all `pieces` into the folder `target`, whose `turn` is held.

    Args:
        pieces: what to send.
        target: an existing folder.
        written: when the manifest that vouches for the sources was written, s since 1970.
        tell: is called as bytes arrive.

    Raises:
        UserError: a source is missing or is not what its manifest says, or there is no room.
    """
    sent = Sent()
    for leftover in target.rglob(".*.tmp"):  # of an upload that was cut off
        leftover.unlink()
    missing = []
    for piece in pieces:
        destination = target / piece.file.path
        destination.parent.mkdir(parents=True, exist_ok=True)
        _check_size(piece)
        checking = _from(sent.total, f"checking {piece.file.path}", tell)
        if piece.link and _link(piece, destination, written, checking):
            sent.linked += piece.file.bytes
        elif _is_there(piece, destination, checking):
            sent.kept += piece.file.bytes
        else:
            missing.append(piece)
    _check_room(sum(piece.file.bytes for piece in missing), target)
    for piece in missing:
        _copy(piece, target / piece.file.path, _from(sent.total, f"copying {piece.file.path}", tell))
        sent.copied += piece.file.bytes
    tell(sent.total, "")
    return sent


@contextlib.contextmanager
def turn(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the only right to write into the folder of `lock`; a holder that dies gives it back.

    Calls `waiting` once where another process holds it, then waits.
    """
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except Timeout:
        waiting()
        held.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def told(setting: str, folder: Path) -> Iterator[None]:
    """Turn a full disk, or a path that cannot be read or written, into a line that names the setting."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"{setting}: no space left in {folder}; free some and ask again") from None
        if error.errno in _CLOSED:
            path = error.filename or folder
            raise UserError(f"{setting}: cannot fill {folder}: {path}: {error.strerror}") from None
        raise


def _from(before: int, note: str, tell: Tell) -> Callable[[int], None]:
    """Return a way to tell of one file's bytes, `before` of others being done."""
    return lambda done: tell(before + done, note)


def _check_size(piece: Piece) -> None:
    try:
        found = piece.source.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{piece.source} is missing: +stage=download and +stage=process make it") from None
    if found != piece.file.bytes:
        raise _changed(piece, f"{found} bytes instead of {piece.file.bytes}")


def _link(piece: Piece, destination: Path, written: float, tell: Callable[[int], None]) -> bool:
    """Make `destination` a second name of the source; False where that cannot be or must not be."""
    source = piece.source.resolve()  # link() would link a symbolic link itself
    if not _same_file(source, destination):
        if source.stat().st_uid != os.geteuid():
            return False  # another's file: it cannot be made read-only, and so may change
        try:
            os.link(source, destination)
        except OSError as error:
            if error.errno in _NO_LINK or isinstance(error, FileExistsError):
                return False
            raise
    # Looked at after the link was made: nobody can exchange the file now.
    with destination.open("rb", buffering=0) as linked:
        status = os.fstat(linked.fileno())
        if status.st_size != piece.file.bytes or (
            status.st_mtime > written and _read(linked, piece.file, tell) != piece.file.hash
        ):
            destination.unlink()
            raise _changed(piece, "other bytes")
        os.fchmod(linked.fileno(), status.st_mode & ~0o222)
    sync_folder(destination.parent)
    return True


def _is_there(piece: Piece, destination: Path, tell: Callable[[int], None]) -> bool:
    """Say whether an earlier upload left the whole file; anything else by that name is removed."""
    try:
        size = destination.stat().st_size
    except FileNotFoundError:
        return False
    if size == piece.file.bytes and _hash_of(destination, piece.file, tell) == piece.file.hash:
        return True
    destination.unlink()
    return False


def _copy(piece: Piece, destination: Path, tell: Callable[[int], None]) -> None:
    with piece.source.open("rb", buffering=0) as reader, replacing(destination) as writer:
        before = os.fstat(reader.fileno())
        found = _read(reader, piece.file, tell, writer.write)
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _changed(piece, "written to while it was read")
        if found != piece.file.hash:
            raise _changed(piece, "other bytes")
        os.fchmod(writer.fileno(), os.fstat(writer.fileno()).st_mode & ~0o222)


def _check_room(needed: int, target: Path) -> None:
    status = os.statvfs(target)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"datastore.url: {target} needs {needed / 1e9:.3f} GB more, but {free / 1e9:.3f} GB are free"
        )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def _hash_of(path: Path, file: File, tell: Callable[[int], None]) -> str:
    with path.open("rb", buffering=0) as reader:
        return _read(reader, file, tell)


def _read(
    reader: IO[bytes],
    file: File,
    tell: Callable[[int], None],
    hand_on: Callable[[bytes], object] = lambda block: None,
) -> str:
    """Read to the end and return the hash, by the algorithm and in the form of the manifest's."""
    algorithm = file.hash.partition(":")[0]
    if algorithm not in ("md5", "sha256"):
        raise UserError(f"{file.path}: the manifest gives {file.hash!r} as its hash, not md5:… or sha256:…")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    done = 0
    while block := reader.read(BLOCK):
        hand_on(block)
        digest.update(block)
        done += len(block)
        tell(done)
    return f"{algorithm}:{digest.hexdigest()}"


def _changed(piece: Piece, how: str) -> UserError:
    return UserError(f"{piece.source} is not what +stage=process saw ({how}): run +stage=process again")
