"""Reading objects of a bucket: in ranges that are asked for side by side, and handed on in order."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from hpc_imagenet.datastore.backends.s3_client import Corrupted, NotFound, S3Client, read_into
from hpc_imagenet.datastore.backends.storage_backend import ThreadedHash, read_through
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import StreamingWriter, sync_folder

RANGE = 16 << 20  # bytes that are asked for at a time: asking takes boto3 2 ms of a CPU, and servers as much


class S3Reader:
    """Objects of a server; however many are read at once, they share its connections."""

    def __init__(self, server: S3Client) -> None:
        self._server = server
        self._threads = ThreadPoolExecutor(server.connections)
        self._lock = threading.Lock()
        self._objects = 0  # that are being read
        self._free: list[bytearray] = []  # memory that is in use for the first time is slow

    def fetch(self, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
        """Bring an object to `target`; see `transport.Place.fetch`."""
        part = target.with_name(f".{target.name}.part")
        for again in (True, False):
            with part.open("ab+", buffering=0) as opened, ThreadedHash(file) as hashing:
                opened.seek(0)
                done = read_through(opened, hashing, tell)  # of an earlier try
                writing = StreamingWriter(opened.fileno(), done)
                for data in self.read(path, done, file.bytes):
                    hashing.add(data)
                    writing.write(data)
                    hashing.wait()  # then the memory is free
                    done += len(data)
                    tell(done)
                os.fsync(opened.fileno())
            if hashing.digest() == file.hash:
                part.replace(target)
                sync_folder(target.parent)
                return
            part.unlink()  # and once more from the beginning: an earlier try may have left it wrong
            if not again:
                raise UserError(
                    f"{self._server.url}/{path} has other bytes than when it was made: {hashing.digest()}"
                )

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Read an object and return its hash; see `transport.Place.hash`."""
        try:
            found = self._server.head(path)
        except NotFound:
            return None
        done = 0
        with ThreadedHash(file) as hashing:
            for data in self.read(path, 0, found["ContentLength"]):
                hashing.add(data)
                hashing.wait()
                done += len(data)
                tell(done)
        return hashing.digest()

    def read(self, path: str, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes [begin, end) of an object, in order; each block until the next is asked for.

        Raises:
            UserError: the object is missing or shorter.
        """
        waiting: deque[Future[memoryview]] = deque()
        with self._reading():
            try:
                for start in range(begin, end, RANGE):
                    while len(waiting) > self._server.connections // self._objects:
                        yield from self._next(waiting)
                    size = min(end - start, RANGE)
                    waiting.append(self._threads.submit(self._range, path, start, size))
                while waiting:
                    yield from self._next(waiting)
            finally:
                for future in waiting:
                    future.cancel()
                wait(waiting)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            self._objects += 1
        try:
            yield
        finally:
            with self._lock:
                self._objects -= 1
                if not self._objects:
                    self._free.clear()

    def _next(self, waiting: deque[Future[memoryview]]) -> Iterator[memoryview]:
        block = waiting.popleft().result()
        yield block
        self._free.append(block.obj)  # type: ignore[arg-type]

    def _range(self, path: str, begin: int, size: int) -> memoryview:
        """Return `size` bytes of an object from `begin` on."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = bytearray(RANGE)
        block = memoryview(memory)[:size]

        def get() -> None:
            words = f"bytes={begin}-{begin + size - 1}"
            with self._server.opened(path, Range=words) as body:
                done = read_into(body, block)
            if done != size:
                raise Corrupted(f"{done} bytes came instead of {size}")

        try:
            self._server.request(f"reading {path}", get)
        except NotFound:
            raise UserError(f"{self._server.url}/{path} is missing") from None
        return block
