"""Hashes of files, in the manifest's form `algorithm:hexdigest`, computed in parallel to reading and writing.

New files are hashed with BLAKE3: as strong as SHA-256, and a quarter of its time on one core. The hash of a
file names its algorithm, so datasets with SHA-256 stay valid. Archives keep the MD5 that their publisher
gives.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import BackgroundWriteback, StreamingWriter

ALGORITHMS = ("blake3", "sha256", "md5")  # that a manifest may name; new files get the first
NEW_HASH = f"{ALGORITHMS[0]}:"  # of a new file whose hash is not known yet
BLOCK = 2 << 20  # bytes read at a time
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def new_digest(algorithm: str = ALGORITHMS[0]) -> Any:
    """Return a new hash object, with the interface of hashlib's."""
    return blake3() if algorithm == "blake3" else hashlib.new(algorithm, usedforsecurity=False)


def digest_of(file: File) -> Any:
    """Return a new hash object of the algorithm of `file.hash`.

    Raises:
        UserError: the algorithm is unknown.
    """
    algorithm = file.hash.partition(":")[0]
    if algorithm not in ALGORITHMS:
        known = ", ".join(f"{name}:…" for name in ALGORITHMS)
        raise UserError(f"{file.path}: unknown hash {file.hash!r} in the manifest: this version has {known}")
    return new_digest(algorithm)


def format_digest(digest: Any) -> str:
    """Return a hash in the manifest's format, `algorithm:hexdigest`."""
    return f"{digest.name}:{digest.hexdigest()}"


def hash_bytes(data: bytes) -> str:
    """Return the hash of a new file's contents, in the manifest's format."""
    digest = new_digest()
    digest.update(data)
    return format_digest(digest)


class ThreadedHash:
    """The hash of a file, computed in its own thread in parallel to I/O. Use as a context manager.

    Raises:
        UserError: the algorithm of `file.hash` is unknown.
    """

    def __init__(self, file: File) -> None:
        self._digest = digest_of(file)
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> ThreadedHash:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def add(self, block: memoryview) -> None:
        """Hash the next bytes; `block` must not change until `wait` returns."""
        self._last = self._thread.submit(self._digest.update, block)

    def wait(self) -> None:
        """Wait until all added blocks are hashed."""
        if self._last is not None:
            self._last.result()

    def digest(self) -> str:
        """Return the hash in the manifest's format."""
        self.wait()
        return format_digest(self._digest)


def hash_blocks(
    reader: IO[bytes],
    hashing: ThreadedHash,
    progress: Callable[[int], None],
    write: Callable[[memoryview], object] = lambda block: None,
) -> int:
    """Read an unbuffered file to its end; each block is hashed and passed to `write` in parallel.

    Returns:
        The number of bytes read.
    """
    done, number = 0, 0
    blocks = [memoryview(bytearray(BLOCK)) for _ in range(2)]
    while got := reader.readinto(blocks[number % 2]):  # type: ignore[attr-defined]
        block = blocks[number % 2][:got]
        hashing.wait()  # so that the other block is free for the next iteration
        hashing.add(block)
        write(block)
        done, number = done + got, number + 1
        progress(done)
    hashing.wait()
    return done


def read_and_hash(reader: IO[bytes], file: File, progress: Callable[[int], None]) -> str:
    """Read an unbuffered file to its end and return its hash in the manifest's format."""
    with ThreadedHash(file) as hashing:
        hash_blocks(reader, hashing, progress)
        return hashing.digest()


def copy_and_hash(reader: IO[bytes], writer: IO[bytes], file: File, progress: Callable[[int], None]) -> str:
    """Copy an unbuffered file to an empty one and return the hash of the copy, in the manifest's format.

    The kernel copies, and the copy is read for the hash while it is in the page cache. Where the file systems
    permit no such copy (copy_file_range(2), "ERRORS"), this process reads and writes.

    Args:
        reader: unbuffered file at its beginning.
        writer: empty file that is open for reading too.
        file: says which hash.
        progress: called with the number of bytes copied.
    """
    done, number = 0, 0
    blocks = [memoryview(bytearray(BLOCK)) for _ in range(2)]
    writeback = BackgroundWriteback(writer.fileno())
    with ThreadedHash(file) as hashing:
        while copied := _copy_range(reader.fileno(), writer.fileno()):
            block = blocks[number % 2][:copied]
            _read_at(writer.fileno(), block, done)
            hashing.wait()  # so that the other block is free for the next iteration
            hashing.add(block)
            done, number = done + copied, number + 1
            writeback.written_up_to(done)
            progress(done)
        # The end of the file, or all of it if the kernel does not copy.
        write = StreamingWriter(writer.fileno(), done).write
        hash_blocks(reader, hashing, lambda more: progress(done + more), write)
        return hashing.digest()


def _copy_range(source: int, target: int) -> int:
    """Copy up to a block at the positions of both files; return the bytes copied, 0 if the kernel cannot."""
    if not hasattr(os, "copy_file_range"):  # not on Linux
        return 0
    try:
        return os.copy_file_range(source, target, BLOCK)
    except OSError as error:
        if error.errno in _NO_COPY:
            return 0
        raise


def _read_at(file: int, block: memoryview, offset: int) -> None:
    """Fill `block` with the bytes of a file from `offset`."""
    while block:
        if not (got := os.preadv(file, [block], offset)):
            raise OSError(errno.EIO, "a copy is shorter than what was written to it")
        offset, block = offset + got, block[got:]


def hash_file(path: Path, file: File, progress: Callable[[int], None]) -> str:
    """Return the hash of a local file, by the algorithm of `file.hash`."""
    with path.open("rb", buffering=0) as reader:
        return read_and_hash(reader, file, progress)
