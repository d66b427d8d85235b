"""A folder as the place of datastores: hard links where the file system allows, else verified copies.

Asked again after a cut, it sends what is missing and keeps what is there. A file of the target is whole or
absent: a copy is hashed while it is written under a temporary name, compared with the manifest, flushed to
the disk and renamed; a link is one step.

A link costs no space and no time, so that a datastore beside its archives is free. The link and its source
are one file then, and it may have further names that are nobody's business here, so that its mode stays as
it is. Its bytes are hashed only where it was written after the dataset's manifest, since everything older was
hashed on its way to that manifest; whoever opens the version sees by the time of change whether it was
written to later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpc_imagenet.datastore.backends.storage_backend import (
    VERSION,
    ProgressCounter,
    Reusable,
    StoredFile,
    Tell,
    UploadFile,
    UploadStats,
    check_size,
    hash_file,
    read_to_end,
    require_room,
    source_changed_error,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import StreamingWriter, atomic_write, make_read_only, sync_folder

FILES = 4  # copied at a time

# What link() answers where it cannot, though a copy can.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class FolderBackend:
    """A folder of this machine, or of a file system that it shares; see `transport.Place`."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self.url = str(folder)
        self._root = folder

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions that were begun."""
        homes = [self._root / name] if name else _folders(self._root)
        return [
            f"{home.name}/{version.name}"
            for home in homes
            for version in _folders(home)
            if VERSION.fullmatch(version.name)
        ]

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of the files that are there."""
        found = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found[path] = (self._root / path).read_bytes()
        return found

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all files below `path`."""
        top = self._root / path
        found = {}
        for file in top.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.is_file():
                    found[file.relative_to(top).as_posix()] = StoredFile(status.st_size, status.st_mtime)
        return found

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Make the folder `path` with a file in it, by renaming one that has it."""
        folder = self._root / path
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        draft.mkdir()
        try:
            with atomic_write(draft / name) as file:
                file.write(data)
            draft.rename(folder)  # refused where the folder is there and not empty, and ours never is
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if folder.is_dir():
                return False
            if folder.exists():
                raise UserError(f"{folder} is a file where a version belongs: give it another name") from None
            raise
        sync_folder(folder.parent)
        return True

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it is there; whoever holds the version's `turn` is alone."""
        target = self._root / path
        if target.exists():
            return False
        with atomic_write(target) as file:
            file.write(data)
            make_read_only(file.fileno())
        return True

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, in this order."""
        for path in paths:
            (self._root / path).unlink(missing_ok=True)
        for folder in {(self._root / path).parent for path in paths}:
            if folder.is_dir():
                sync_folder(folder)

    def remove_partial(self, path: str) -> None:
        """Remove temporary files."""
        for leftover in list((self._root / path).rglob(".*.tmp")):
            if leftover.is_dir():  # of a fetch
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def delete_all(self, path: str, keep: str) -> None:
        """Remove all below `path` but the file `keep`."""
        for entry in (self._root / path).iterdir():
            if entry.name == keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock `path`; a holder that dies gives it back."""
        from filelock import FileLock, Timeout

        held = FileLock(self._root / path)
        try:
            held.acquire(blocking=False)
        except Timeout:
            waiting()
            held.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            held.release()

    def send(self, pieces: Sequence[UploadFile], path: str, known: Reusable, tell: Tell) -> UploadStats:
        """Bring all pieces into the folder `path`, whose `turn` is held."""
        sent, missing, target = UploadStats(), [], self._root / path
        for piece in pieces:
            destination = target / piece.file.path
            destination.parent.mkdir(parents=True, exist_ok=True)
            for leftover in destination.parent.glob(f".{destination.name}.*.tmp"):  # of one that was cut off
                leftover.unlink(missing_ok=True)
            check_size(piece)
            checking = _from(sent.total, f"checking {piece.file.path}", tell)
            if piece.link and _link(piece, destination, known.written, checking):
                sent.linked += piece.file.bytes
            elif _is_there(piece, destination, known, checking):
                sent.kept += piece.file.bytes
            elif self._reuse(piece.file, destination, known):
                sent.reused += piece.file.bytes
            else:
                missing.append(piece)
        require_room("datastore.url", sum(piece.file.bytes for piece in missing), target)
        before = sent.total
        tally = ProgressCounter(lambda done, note: tell(before + done, note))
        with tally.threads(FILES) as threads:
            copies = [
                threads.submit(_copy, piece, target / piece.file.path, tally.of(f"copying {piece.file.path}"))
                for piece in missing
            ]
            for piece, copied in zip(missing, copies, strict=True):
                copied.result()
                sent.copied += piece.file.bytes
        tell(sent.total, "")
        return sent

    def fetch(self, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
        """Copy a file to `target`; it is hashed on the way."""
        part = target.with_name(f".{target.name}.part")
        try:
            with (self._root / path).open("rb", buffering=0) as reader, part.open("wb") as writer:
                found = read_to_end(reader, file, tell, StreamingWriter(writer.fileno()).write)
                os.fsync(writer.fileno())
        except FileNotFoundError:
            raise UserError(f"{self.url}/{path} is missing") from None
        if found != file.hash:
            part.unlink()
            raise UserError(f"{self.url}/{path} has other bytes than when it was made: {found}")
        part.replace(target)
        sync_folder(target.parent)

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Return the file's hash."""
        try:
            return hash_file(self._root / path, file, tell)
        except FileNotFoundError:
            return None

    def _reuse(self, file: File, destination: Path, known: Reusable) -> bool:
        """Make `destination` a second name of the same file of an older version."""
        for path in known.older.get(File("", file.bytes, file.hash), ()):
            older = self._root / path
            with contextlib.suppress(OSError):
                status = older.stat()
                # One that has further names outside may have been written to by one of them.
                if status.st_size == file.bytes and not status.st_mode & 0o222:
                    os.link(older, destination)
                    sync_folder(destination.parent)
                    return True
        return False


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _from(before: int, note: str, tell: Tell) -> Callable[[int], None]:
    """Return a way to tell of one file's bytes, `before` of others being done."""
    return lambda done: tell(before + done, note)


def _link(piece: UploadFile, destination: Path, written: float, tell: Callable[[int], None]) -> bool:
    """Make `destination` a second name of the source; False where that cannot be or must not be."""
    source = piece.source.resolve()  # link() would link a symbolic link itself
    if not _same_file(source, destination):
        if source.stat().st_uid != os.geteuid():
            return False  # another's file: not ours to hold on to
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
            status.st_mtime > written and read_to_end(linked, piece.file, tell) != piece.file.hash
        ):
            destination.unlink()
            raise source_changed_error(piece, "other bytes")
    sync_folder(destination.parent)
    return True


def _is_there(piece: UploadFile, destination: Path, known: Reusable, tell: Callable[[int], None]) -> bool:
    """Say whether an earlier upload left the whole file; anything else by that name is removed."""
    try:
        size = destination.stat().st_size
    except FileNotFoundError:
        return False
    if size == piece.file.bytes and (
        piece.file.path in known.vouched or hash_file(destination, piece.file, tell) == piece.file.hash
    ):
        return True
    destination.unlink()
    return False


def _copy(piece: UploadFile, destination: Path, tell: Callable[[int], None]) -> None:
    with piece.source.open("rb", buffering=0) as reader, atomic_write(destination) as writer:
        before = os.fstat(reader.fileno())
        found = read_to_end(reader, piece.file, tell, StreamingWriter(writer.fileno()).write)
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise source_changed_error(piece, "written to while it was read")
        if found != piece.file.hash:
            raise source_changed_error(piece, "other bytes")
        make_read_only(writer.fileno())


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
