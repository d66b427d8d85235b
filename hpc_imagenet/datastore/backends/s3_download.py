"""Download of S3 objects: ranges are requested in parallel and returned in order."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from hpc_imagenet.datastore.backends.s3_client import Corrupted, NotFound, S3Client, read_into
from hpc_imagenet.datastore.file_hash import ThreadedHash, hash_blocks
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import StreamingWriter, sync_folder

RANGE = 16 << 20  # bytes per request: a request costs boto3 2 ms of CPU time, and the server about the same


class S3Reader:
    """Reader of S3 objects; objects that are read in parallel share the client's connections."""

    def __init__(self, client: S3Client) -> None:
        self._client = client
        self._threads = ThreadPoolExecutor(client.connections)
        self._lock = threading.Lock()
        self._objects = 0  # number of objects being read
        self._free: list[bytearray] = []  # reused buffers: newly allocated memory is slow on first use

    def fetch(self, path: str, file: File, target: Path, progress: Callable[[int], None]) -> None:
        """Download an object to `target`; see `StorageBackend.fetch`."""
        part = target.with_name(f".{target.name}.part")
        for retry in (True, False):
            with part.open("ab+", buffering=0) as output, ThreadedHash(file) as hashing:
                output.seek(0)
                done = hash_blocks(output, hashing, progress)  # of an earlier attempt
                writer = StreamingWriter(output.fileno(), done)
                for data in self.read(path, done, file.bytes):
                    hashing.add(data)
                    writer.write(data)
                    hashing.wait()  # the buffer is reused after this
                    done += len(data)
                    progress(done)
                os.fsync(output.fileno())
            damage = file.damage(f"{self._client.url}/{path}", hashing.digest())
            if damage is None:
                part.replace(target)
                sync_folder(target.parent)
                return
            part.unlink()  # start over once: the earlier attempt may have left damaged data
            if not retry:
                raise UserError(damage)

    def hash(self, path: str, file: File, progress: Callable[[int], None]) -> str | None:
        """Read an object and return its hash; see `StorageBackend.hash`."""
        try:
            size = self._client.head(path)["ContentLength"]
        except NotFound:
            return None
        done = 0
        with ThreadedHash(file) as hashing:
            for data in self.read(path, 0, size):
                hashing.add(data)
                hashing.wait()
                done += len(data)
                progress(done)
        return hashing.digest()

    def read(self, path: str, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes [begin, end) of an object, in order; a block is valid until the next is taken.

        Raises:
            UserError: the object is missing or too short.
        """
        pending: deque[Future[memoryview]] = deque()
        with self._count_object():
            try:
                for start in range(begin, end, RANGE):
                    while len(pending) > self._client.connections // self._objects:
                        yield from self._next(pending)
                    size = min(end - start, RANGE)
                    pending.append(self._threads.submit(self._read_range, path, start, size))
                while pending:
                    yield from self._next(pending)
            finally:
                for future in pending:
                    future.cancel()
                wait(pending)

    @contextlib.contextmanager
    def _count_object(self) -> Iterator[None]:
        """Count an object as being read: the connections are divided by this number."""
        with self._lock:
            self._objects += 1
        try:
            yield
        finally:
            with self._lock:
                self._objects -= 1
                if not self._objects:
                    self._free.clear()

    def _next(self, pending: deque[Future[memoryview]]) -> Iterator[memoryview]:
        """Yield the first pending block, and reuse its buffer afterwards."""
        block = pending.popleft().result()
        yield block
        self._free.append(block.obj)  # type: ignore[arg-type]

    def _read_range(self, path: str, begin: int, size: int) -> memoryview:
        """Return `size` bytes of an object from offset `begin`."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = bytearray(RANGE)
        block = memoryview(buffer)[:size]

        def get() -> None:
            byte_range = f"bytes={begin}-{begin + size - 1}"
            with self._client.open_object(path, Range=byte_range) as body:
                done = read_into(body, block)
            if done != size:
                raise Corrupted(f"{done} bytes received instead of {size}")

        try:
            self._client.request(f"reading {path}", get)
        except NotFound:
            raise UserError(f"{self._client.url}/{path} is missing") from None
        return block
