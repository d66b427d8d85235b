"""The storage backend interface: what a folder, a host behind ssh and an S3 bucket implement for datastores.

All paths are relative to the backend's root and use `/`: `imagenet/v3/shards/train-000.tar`. A file of a
version is complete or absent under its name, even if an upload is killed. The rest of the package uses only
this interface, so that versions behave the same on every backend.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hpc_imagenet.datastore.manifest import FILE, File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import DISK_FULL_ERRNOS

if TYPE_CHECKING:  # imports packages that listing versions does not need
    from hpc_imagenet.datastore.reader.shard_reader import ShardReader

VERSION = re.compile(r"v[1-9][0-9]{0,8}")  # folder name of a version
ProgressCallback = Callable[[int, str], None]  # (bytes done so far, current step)

_NO_ACCESS_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class UploadFile:
    """One file to upload: its source, and its size, hash and path within the version (`file`)."""

    source: Path
    file: File
    link: bool = False  # whether a hard link to the source is allowed


@dataclass(frozen=True)
class StoredFile:
    """Size and modification time of a stored file."""

    bytes: int
    modified: float  # s since 1970, by the storage's clock


@dataclass
class UploadStats:
    """Uploaded bytes, by how they were stored."""

    copied: int = 0
    linked: int = 0  # hard links to the source
    reused: int = 0  # linked or copied from an older version, without a transfer
    kept: int = 0  # already stored

    @property
    def total(self) -> int:
        """Bytes stored and verified."""
        return self.copied + self.linked + self.reused + self.kept


@dataclass(frozen=True)
class Reusable:
    """Files that need not be read or transferred again.

    Attributes:
        manifest_time: when the manifest with the sources' hashes was written, s since 1970. Sources that
            are older are not hashed again before they are linked.
        older: paths within the backend of files of complete versions, by size and hash (with an empty path).
        verified: paths within the version of files that were verified earlier and not modified since.
    """

    manifest_time: float
    older: Mapping[File, Sequence[str]] = field(default_factory=dict)
    verified: frozenset[str] = frozenset()


class StorageBackend(Protocol):
    """Storage that holds datastores.

    Raises:
        UserError: the storage cannot be reached or access is denied; from any method.
        OSError: from a folder; see `explain_os_errors`.
    """

    url: str
    folder: Path | None  # folder where jobs can open the files; None: files cannot be opened

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions ever started, of one datastore or of all."""

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the contents of the small files that exist and may be read, by path."""

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all files below `path`, including hidden ones, by their paths relative to it."""

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Create the folder `path` with the file `name`; False if another process created it first."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file atomically; False if it exists already."""

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files; missing ones are ignored."""

    def remove_partial(self, path: str) -> None:
        """Remove partly written files that interrupted uploads left below `path`."""

    def delete_all(self, path: str, keep: str) -> None:
        """Remove everything below `path`, including partly written files, except the file `keep`."""

    def lock(self, path: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold the exclusive lock `path` while uploading, if the backend has locks.

        Calls `waiting` once if another process holds the lock, then waits. Backends without locks accept the
        same file from several uploads at once, and keep one. They replace no file of a complete version.
        """

    def send(
        self, items: Sequence[UploadFile], path: str, reusable: Reusable, progress: ProgressCallback
    ) -> UploadStats:
        """Upload files to the version's folder `path`; stored files with the right hash are kept.

        Raises:
            UserError: a source is missing or differs from its manifest, or there is not enough space.
        """

    def fetch(self, path: str, file: File, target: Path, progress: Callable[[int], None]) -> None:
        """Download the file at `path` to `target`, atomically and with its hash verified.

        Until it is complete it is stored beside the target as `.<name>.part`. A partial file of an earlier
        attempt is resumed if transferring costs more than reading; a folder starts over.

        Raises:
            UserError: the file is missing, or its hash is not that of `file`.
        """

    def hash(self, path: str, file: File, progress: Callable[[int], None]) -> str | None:
        """Read the file at `path` and return its hash, by the algorithm of `file.hash`; None if missing."""


@runtime_checkable
class SupportsRangeReads(Protocol):
    """A backend without local files that can still read a few bytes of a large file quickly."""

    def shards(self, path: str, shards: Sequence[File]) -> ShardReader:
        """Return a reader of the shards of the version at `path`."""


@runtime_checkable
class SupportsBatchFetch(Protocol):
    """A backend that downloads many files faster together than one by one."""

    def fetch_all(self, path: str, files: Sequence[File], folder: Path, counter: ProgressCounter) -> None:
        """Download files of the version at `path` to their paths in `folder`, as `StorageBackend.fetch` does.

        Files of an earlier attempt are reused.
        """


class _Stopped(Exception):
    """The caller was interrupted: stop reading."""


class ProgressCounter:
    """Sum of the bytes of several files that are processed in parallel, reported as one growing number."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._stopped = False

    @contextlib.contextmanager
    def threads(self, number: int) -> Iterator[ThreadPoolExecutor]:
        """Return a thread pool that counts here.

        After an interrupt its threads stop at their next block, after an error at the end of their file.
        """
        with ThreadPoolExecutor(number) as pool:
            try:
                yield pool
            except BaseException as error:
                self._stopped = not isinstance(error, Exception)
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def __call__(self, more: int, step: str) -> None:
        """Count `more` bytes."""
        if self._stopped:
            raise _Stopped
        with self._lock:
            self._done += more
            self._progress(self._done, step)

    def for_file(self, step: str) -> Callable[[int], None]:
        """Return a callback that takes the number of bytes done of one file."""
        before = 0

        def count(done: int) -> None:
            nonlocal before
            self(done - before, step)
            before = done

        return count


def fetch_files(
    backend: StorageBackend,
    path: str,
    files: Sequence[File],
    folder: Path,
    threads: int,
    counter: ProgressCounter,
) -> None:
    """Download files of the version at `path` to `folder`, in parallel; see `StorageBackend.fetch`."""
    for parent in {(folder / file.path).parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)
    if isinstance(backend, SupportsBatchFetch):
        backend.fetch_all(path, files, folder, counter)
        return

    def fetch(file: File) -> None:
        backend.fetch(f"{path}/{file.path}", file, folder / file.path, counter.for_file(file.path))

    with counter.threads(threads) as pool:
        for _ in pool.map(fetch, files):
            pass


def check_size(item: UploadFile) -> None:
    """Check that a source exists and has the size in the manifest.

    Raises:
        UserError: it is missing or has another size.
    """
    try:
        size = item.source.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{item.source} is missing: run +stage=download and +stage=process to create it"
        ) from None
    if size != item.file.bytes:
        raise source_changed_error(item, f"{size} bytes instead of {item.file.bytes}")


def require_incomplete(backend: StorageBackend, path: str) -> None:
    """Check that no other upload has completed the version at `path`, whose files must not be replaced.

    Backends without locks call it just before they write, which may be long after they listed the files.

    Raises:
        UserError: the version has its manifest.
    """
    if backend.read([f"{path}/{FILE}"]):
        raise completed_error(backend.url, path)


def completed_error(url: str, path: str) -> UserError:
    """Return the error for an upload to a version that another upload has completed meanwhile."""
    return UserError(
        f"{url}/{path} was completed by another upload of the same images during this one: run it again"
    )


def source_changed_error(item: UploadFile, how: str) -> UserError:
    """Return the error for a source that differs from its manifest."""
    return UserError(f"{item.source} changed after +stage=process ({how}): run +stage=process again")


@contextlib.contextmanager
def explain_os_errors(setting: str, location: str | Path) -> Iterator[None]:
    """Turn a full disk, or a path that cannot be read or written, into a UserError that names the setting."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise UserError(f"{setting}: no space left in {location}: free some, then run it again") from None
        if error.errno in _NO_ACCESS_ERRNOS:
            path = error.filename or location
            raise UserError(f"{setting}: cannot read or write {location}: {path}: {error.strerror}") from None
        raise
