"""What a place must do so that datastores can live there: a folder, a host behind ssh, a bucket.

All paths are relative to the place and have `/` between: `imagenet/v3/shards/train-000.tar`. A file of a
version is whole or absent under its name, whatever is killed while it is sent. The rest of this room asks
for nothing but what stands here, so that versions mean the same everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import DISK_FULL_ERRNOS

if TYPE_CHECKING:  # it needs packages that a look-up does not
    from hpc_imagenet.datastore.reader.shard_reader import ShardReader

BLOCK = 2 << 20  # bytes read at a time

VERSION = re.compile(r"v[1-9][0-9]{0,8}")  # the folder of one
Tell = Callable[[int, str], None]  # bytes that are done, a word about what is done now

_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class UploadFile:
    """One file to send: where it lies, and what and where it shall be (`file.path` within the version)."""

    source: Path
    file: File
    link: bool = False  # whether a hard link may do


@dataclass(frozen=True)
class StoredFile:
    """A file that is there."""

    bytes: int
    modified: float  # s since 1970, by the clock over there


@dataclass
class UploadStats:
    """Bytes, by how they came to be in the version."""

    copied: int = 0
    linked: int = 0  # with the source
    reused: int = 0  # of an older version, without being sent
    kept: int = 0  # were there already

    @property
    def total(self) -> int:
        """All bytes that are there and verified."""
        return self.copied + self.linked + self.reused + self.kept


@dataclass(frozen=True)
class Reusable:
    """What need not be read, or not be sent.

    `written` is when the manifest that vouches for the sources was written, s since 1970. `older` has the
    paths, within the place, of files of complete versions. `vouched` has the paths, within the version, of
    files that were proved there before and have not been touched since.
    """

    written: float
    older: Mapping[File, Sequence[str]] = field(default_factory=dict)  # by bytes and hash, with no path
    vouched: frozenset[str] = frozenset()


class StorageBackend(Protocol):
    """Where datastores live.

    Raises:
        UserError: it cannot be reached or is forbidden; from any method.
        OSError: of a folder; see `told`.
    """

    url: str
    folder: Path | None  # where jobs can open the files; None: nowhere

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions that were ever begun, of one datastore or of all."""

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of the small files that are there."""

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all files below `path`, hidden ones too, by their paths relative to it."""

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Make the folder `path` with the file `name` in it; False where another was faster."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file, whole or not at all, unless it is there; False where it was."""

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files; those that are not there are no trouble."""

    def remove_partial(self, path: str) -> None:
        """Remove what uploads that were cut off have left of half-sent files below `path`."""

    def delete_all(self, path: str, keep: str) -> None:
        """Remove all that is below `path`, half-sent files too, but for the file `keep`."""

    def lock(self, path: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold the only right to send what the lock `path` stands for, where the place has locks.

        Calls `waiting` once where another process holds it, then waits. Places without locks take the same
        file from several senders at once, and keep one.
        """

    def send(self, pieces: Sequence[UploadFile], path: str, known: Reusable, tell: Tell) -> UploadStats:
        """Bring all pieces into the version's folder `path`; what is there already, by its hash, stays.

        Raises:
            UserError: a source is missing or is not what its manifest says, or there is no room.
        """

    def fetch(self, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
        """Bring the file at `path` to `target`, whole and with the hash of `file`, or not at all.

        Until it is whole it lies beside the target, as `.<name>.part`. What an earlier try has left there is
        used where sending costs more than reading: a folder begins anew.

        Raises:
            UserError: it is missing, or its bytes are not what `file` says.
        """

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Read the file at `path` and return its hash, in the form of `file.hash`; None without one."""


@runtime_checkable
class SupportsRangeReads(Protocol):
    """A place without files to open that still reads a few bytes of a large file in a moment."""

    def shards(self, path: str, shards: Sequence[File]) -> ShardReader:
        """Return a reader of the shards of the version at `path`."""


@runtime_checkable
class SupportsBatchFetch(Protocol):
    """A place where many files come faster together than one by one."""

    def fetch_all(self, path: str, files: Sequence[File], folder: Path, tally: ProgressCounter) -> None:
        """Bring files of the version at `path` to their paths in `folder`, each as `Place.fetch` does.

        What an earlier try has brought is used.
        """


class _Ended(Exception):
    """Nobody waits for what is read."""


class ProgressCounter:
    """Tells of the bytes of many files that are read at once, as one number that grows."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._done = 0
        self._ended = False

    @contextlib.contextmanager
    def threads(self, number: int) -> Iterator[ThreadPoolExecutor]:
        """Return threads that count here; an interrupt lets them end with a block, an error with a file."""
        with ThreadPoolExecutor(number) as pool:
            try:
                yield pool
            except BaseException as error:
                self._ended = not isinstance(error, Exception)
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def __call__(self, more: int, note: str) -> None:
        """Count `more` bytes."""
        if self._ended:
            raise _Ended
        with self._lock:
            self._done += more
            self._tell(self._done, note)

    def of(self, note: str) -> Callable[[int], None]:
        """Return what is told how many bytes of one file are done."""
        before = 0

        def told(done: int) -> None:
            nonlocal before
            self(done - before, note)
            before = done

        return told


def fetch_files(
    place: StorageBackend,
    path: str,
    files: Sequence[File],
    folder: Path,
    threads: int,
    tally: ProgressCounter,
) -> None:
    """Bring files of the version at `path` to `folder`, several at a time; see `Place.fetch`."""
    for parent in {(folder / file.path).parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)
    if isinstance(place, SupportsBatchFetch):
        place.fetch_all(path, files, folder, tally)
        return

    def one(file: File) -> None:
        place.fetch(f"{path}/{file.path}", file, folder / file.path, tally.of(file.path))

    with tally.threads(threads) as pool:
        for _ in pool.map(one, files):
            pass


def new_digest(file: File) -> Any:
    """Return a new hash of the algorithm that the manifest has for `file`.

    Raises:
        UserError: it is one that nobody here computes.
    """
    algorithm = file.hash.partition(":")[0]
    if algorithm not in ("md5", "sha256"):
        raise UserError(f"{file.path}: the manifest gives {file.hash!r} as its hash, not md5:… or sha256:…")
    return hashlib.new(algorithm, usedforsecurity=False)


def format_digest(digest: Any) -> str:
    """Return a hash as a manifest has it."""
    return f"{digest.name}:{digest.hexdigest()}"


class ThreadedHash:
    """The hash of a file, by a thread of its own while others read and write. Use as a context.

    Raises:
        UserError: the manifest's hash of `file` is of a kind that nobody here computes.
    """

    def __init__(self, file: File) -> None:
        self._digest = new_digest(file)
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> ThreadedHash:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def add(self, block: memoryview) -> None:
        """Hash the next bytes, which must stay as they are until `wait` returns."""
        self._last = self._thread.submit(self._digest.update, block)

    def wait(self) -> None:
        """Wait until all is hashed that was added."""
        if self._last is not None:
            self._last.result()

    def digest(self) -> str:
        """Return the hash in the form of the manifest's."""
        self.wait()
        return format_digest(self._digest)


def read_through(
    reader: IO[bytes],
    hashing: ThreadedHash,
    tell: Callable[[int], None],
    hand_on: Callable[[memoryview], object] = lambda block: None,
) -> int:
    """Read an unbuffered file to its end, each block hashed while it is handed on; return the bytes."""
    done, number = 0, 0
    blocks = [memoryview(bytearray(BLOCK)) for _ in range(2)]
    while got := reader.readinto(blocks[number % 2]):  # type: ignore[attr-defined]
        block = blocks[number % 2][:got]
        hashing.wait()  # so that the other block is free for the next round
        hashing.add(block)
        hand_on(block)
        done, number = done + got, number + 1
        tell(done)
    hashing.wait()
    return done


def read_to_end(
    reader: IO[bytes],
    file: File,
    tell: Callable[[int], None],
    hand_on: Callable[[memoryview], object] = lambda block: None,
) -> str:
    """Read an unbuffered file to its end and return the hash, in the form of the manifest's."""
    with ThreadedHash(file) as hashing:
        read_through(reader, hashing, tell, hand_on)
        return hashing.digest()


def hash_file(path: Path, file: File, tell: Callable[[int], None]) -> str:
    """Return the hash of a file of this machine."""
    with path.open("rb", buffering=0) as reader:
        return read_to_end(reader, file, tell)


def check_size(piece: UploadFile) -> None:
    """Refuse a source that is gone or has grown.

    Raises:
        UserError: it is not what the manifest says.
    """
    try:
        found = piece.source.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{piece.source} is missing: +stage=download and +stage=process make it") from None
    if found != piece.file.bytes:
        raise source_changed_error(piece, f"{found} bytes instead of {piece.file.bytes}")


def require_room(setting: str, needed: int, folder: Path) -> None:
    """Refuse to begin what a file system has no room for, in bytes; a quota is told when it is met.

    Raises:
        UserError: it names the setting, what is needed and what is free.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"{setting}: {folder} needs {needed / 1e9:.3f} GB more, but {free / 1e9:.3f} GB are free"
        )


def source_changed_error(piece: UploadFile, how: str) -> UserError:
    """Return the error that says so of a source."""
    return UserError(f"{piece.source} is not what +stage=process saw ({how}): run +stage=process again")


@contextlib.contextmanager
def explain_os_errors(setting: str, place: str | Path) -> Iterator[None]:
    """Turn a full disk, or a path that cannot be read or written, into a line that names the setting."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise UserError(f"{setting}: no space left in {place}; free some and ask again") from None
        if error.errno in _CLOSED:
            path = error.filename or place
            raise UserError(f"{setting}: cannot fill {place}: {path}: {error.strerror}") from None
        raise
