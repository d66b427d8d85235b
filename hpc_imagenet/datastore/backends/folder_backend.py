"""Storage backend for a folder: hard links where the file system allows them, else verified copies.

An upload that was interrupted is resumed: stored files are kept and only missing ones are written. A stored
file is complete or absent: a copy is hashed while it is written under a temporary name, compared with the
manifest, flushed to the disk and renamed; a link is atomic.

A link needs no space and no time, so a datastore beside its archives costs nothing. Link and source are one
file then. The file may have other hard links, so its permissions are left alone. It is hashed only if it was
modified after the dataset's manifest was written, since older files were hashed for that manifest. Later
changes are detected by the modification time when the version is opened (`hardlink_check`).
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
    ProgressCallback,
    ProgressCounter,
    Reusable,
    StoredFile,
    UploadFile,
    UploadStats,
    check_size,
    source_changed_error,
)
from hpc_imagenet.datastore.file_hash import copy_and_hash, hash_file, read_and_hash
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write, make_read_only, sync_folder, write_again_if_removed
from hpc_imagenet.io.disk import require_free_space

COPY_THREADS = 4

# Errors of link() after which a copy can still work.
_NO_LINK_ERRNOS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class FolderBackend:
    """A folder on this machine or on a shared file system; see `StorageBackend`."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self.url = str(folder)
        self._root = folder

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions ever started."""
        found = []
        for datastore in [self._root / name] if name else _subfolders(self._root):
            # A datastore of another user that cannot be read is left out of a list of all.
            with contextlib.suppress(*() if name else (PermissionError,)):
                found += [f"{datastore.name}/{version.name}" for version in _subfolders(datastore)]
        return [path for path in found if VERSION.fullmatch(path.rpartition("/")[2])]

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the contents of the files that exist and may be read, by path."""
        contents = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                contents[path] = (self._root / path).read_bytes()
        return contents

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all files below `path`."""
        top = self._root / path
        stored = {}
        for file in top.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.is_file():
                    stored[file.relative_to(top).as_posix()] = StoredFile(status.st_size, status.st_mtime)
        return stored

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Create the folder `path` with a file in it, by renaming a temporary folder with that file."""
        folder = self._root / path
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        draft.mkdir()
        try:
            with atomic_write(draft / name) as file:
                file.write(data)
            draft.rename(folder)  # fails if the target exists and is not empty; a claimed folder never is
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if folder.is_dir():
                return False
            if folder.exists():
                raise UserError(
                    f"{folder} is a file, but the version needs a folder there: rename or remove the file"
                ) from None
            raise
        sync_folder(folder.parent)
        return True

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it exists. Not atomic: the caller must hold the version's lock."""
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
        """Remove temporary files and folders."""
        for leftover in list((self._root / path).rglob(".*.tmp")):
            if leftover.is_dir():  # of an interrupted fetch
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def delete_all(self, path: str, keep: str) -> None:
        """Remove everything below `path` except the file `keep`."""
        for entry in (self._root / path).iterdir():
            if entry.name == keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock file `path`; it is released if its holder dies."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._root / path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waiting()
            lock.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            lock.release()

    def send(
        self, items: Sequence[UploadFile], path: str, reusable: Reusable, progress: ProgressCallback
    ) -> UploadStats:
        """Link or copy files to the folder `path`. The caller must hold the version's lock."""
        stats, missing, target = UploadStats(), [], self._root / path
        for item in items:
            destination = target / item.file.path
            destination.parent.mkdir(parents=True, exist_ok=True)
            for leftover in destination.parent.glob(f".{destination.name}.*.tmp"):  # of an interrupted copy
                leftover.unlink(missing_ok=True)
            check_size(item)
            checking = _offset_progress(stats.total, f"checking {item.file.path}", progress)
            if item.link and _link(item, destination, reusable.manifest_time, checking):
                stats.linked += item.file.bytes
            elif _is_stored(item, destination, reusable, checking):
                stats.kept += item.file.bytes
            elif self._link_older(item.file, destination, reusable):
                stats.reused += item.file.bytes
            else:
                missing.append(item)
        size = sum(item.file.bytes for item in missing)
        require_free_space(target, size, "the upload", len(missing), setting="datastore.url")
        before = stats.total
        counter = ProgressCounter(lambda done, step: progress(before + done, step))
        with counter.threads(COPY_THREADS) as threads:
            copies = [
                threads.submit(
                    _copy, item, target / item.file.path, counter.for_file(f"copying {item.file.path}")
                )
                for item in missing
            ]
            for item, copy in zip(missing, copies, strict=True):
                copy.result()
                stats.copied += item.file.bytes
        progress(stats.total, "")
        return stats

    def fetch(self, path: str, file: File, target: Path, progress: Callable[[int], None]) -> None:
        """Copy a file to `target` and verify its hash on the way."""
        part = target.with_name(f".{target.name}.part")
        try:
            reader = (self._root / path).open("rb", buffering=0)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{path} is missing") from None
        with reader, part.open("w+b") as writer:
            value = copy_and_hash(reader, writer, file, progress)
            os.fsync(writer.fileno())
        if damage := file.damage(f"{self.url}/{path}", value):
            part.unlink()
            raise UserError(damage)
        part.replace(target)
        sync_folder(target.parent)

    def hash(self, path: str, file: File, progress: Callable[[int], None]) -> str | None:
        """Return the file's hash."""
        try:
            return hash_file(self._root / path, file, progress)
        except FileNotFoundError:
            return None

    def _link_older(self, file: File, destination: Path, reusable: Reusable) -> bool:
        """Hard-link `destination` to the same file of an older version; False if there is none."""
        for path in reusable.older.get(File("", file.bytes, file.hash), ()):
            older = self._root / path
            with contextlib.suppress(OSError):
                status = older.stat()
                # A writable file may be hard-linked to an archive and modified through that link.
                if status.st_size == file.bytes and not status.st_mode & 0o222:
                    os.link(older, destination)
                    sync_folder(destination.parent)
                    return True
        return False


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _offset_progress(before: int, step: str, progress: ProgressCallback) -> Callable[[int], None]:
    """Return a progress callback offset by the bytes of earlier files."""
    return lambda done: progress(before + done, step)


def _link(item: UploadFile, destination: Path, manifest_time: float, progress: Callable[[int], None]) -> bool:
    """Hard-link `destination` to the source; False if a link is impossible or not allowed."""
    source = item.source.resolve()  # link() would link a symbolic link itself
    if not _same_file(source, destination):
        if source.stat().st_uid != os.geteuid():
            return False  # a link would keep another user's file from being freed when they delete it
        try:
            os.link(source, destination)
        except OSError as error:
            if error.errno in _NO_LINK_ERRNOS or isinstance(error, FileExistsError):
                return False
            raise
    # Checked through the link: the source's path may be replaced by another file at any time.
    with destination.open("rb", buffering=0) as linked:
        status = os.fstat(linked.fileno())
        if status.st_size != item.file.bytes or (
            status.st_mtime > manifest_time and read_and_hash(linked, item.file, progress) != item.file.hash
        ):
            destination.unlink()
            raise source_changed_error(item, "different content")
    sync_folder(destination.parent)
    return True


def _is_stored(
    item: UploadFile, destination: Path, reusable: Reusable, progress: Callable[[int], None]
) -> bool:
    """Whether an earlier upload stored the complete file; removes any other file of that name."""
    try:
        size = destination.stat().st_size
    except FileNotFoundError:
        return False
    if size == item.file.bytes and (
        item.file.path in reusable.verified or hash_file(destination, item.file, progress) == item.file.hash
    ):
        return True
    destination.unlink()
    return False


def _copy(item: UploadFile, destination: Path, progress: Callable[[int], None]) -> None:
    write_again_if_removed(lambda: _copy_once(item, destination, progress))


def _copy_once(item: UploadFile, destination: Path, progress: Callable[[int], None]) -> None:
    with item.source.open("rb", buffering=0) as reader, atomic_write(destination) as writer:
        before = os.fstat(reader.fileno())
        value = copy_and_hash(reader, writer, item.file, progress)
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise source_changed_error(item, "modified while it was read")
        if value != item.file.hash:
            raise source_changed_error(item, "different content")
        make_read_only(writer.fileno())


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
