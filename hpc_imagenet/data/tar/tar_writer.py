"""Tar writer for shards: an uncompressed tar whose bytes depend only on the files added to it.

The tar is assembled in buffers. Images are read directly into a buffer, while one thread writes the previous
buffer to the file and another hashes it. A copy thus moves each byte twice and needs few system calls.
Source: POSIX pax(1), "ustar Interchange Format".
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any

from hpc_imagenet.io.tar_header import BLOCK, END, member_header

# One buffer is filled while others are written and hashed. They are small, so that their bytes are still in
# the CPU's cache, and many, so that no thread waits: with 3 buffers of 4 MB a copy took 1.5 times as long.
_BUFFER = 1 << 20  # bytes
_BUFFERS = 8


class TarWriter:
    """Writer of a tar into an open, empty file; a context manager.

    `size` and `hash` are those of the whole tar once the context has exited without an error.

    Raises:
        OSError: the file cannot be written; raised by any method.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.size = 0  # bytes so far
        self._descriptor = file.fileno()
        self._digest = hashlib.sha256()
        self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._buffers = [memoryview(bytearray(_BUFFER)) for _ in range(_BUFFERS)]
        self._busy: list[tuple[Future[Any], ...]] = [()] * _BUFFERS
        self._current, self._filled = 0, 0

    @property
    def hash(self) -> str:
        """SHA-256 of all bytes, in the manifest's form `sha256:<hex>`."""
        return f"sha256:{self._digest.hexdigest()}"

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._put(END)
                self._flush()
                for number in range(_BUFFERS):
                    self._wait(number)
        finally:
            for thread in self._threads:
                thread.shutdown(cancel_futures=True)

    def add(self, name: str, data: bytes) -> int:
        """Append a file and return the byte offset of its data in the tar."""
        self._put(member_header(name, len(data)))
        offset = self.size
        self._put(data)
        self._put(bytes(-len(data) % BLOCK))
        return offset

    def copy(self, name: str, descriptor: int, offset: int, length: int) -> int:
        """Append a file by copying a byte range of an open file; return its data's byte offset in the tar.

        Args:
            name: member name in the tar.
            descriptor: file descriptor of the source file.
            offset: byte offset of the range in the source file.
            length: bytes to copy.

        Raises:
            EOFError: the source file ends inside the range.
        """
        self._put(member_header(name, length))
        begin, left = self.size, length
        while left:
            free = self._free_part()[:left]
            got = os.preadv(descriptor, [free], offset + length - left)
            if not got:
                raise EOFError
            self._advance(got)
            left -= got
        self._put(bytes(-length % BLOCK))
        return begin

    def _put(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            free = self._free_part()
            part = data[done : done + len(free)]
            free[: len(part)] = part
            self._advance(len(part))
            done += len(part)

    def _free_part(self) -> memoryview:
        """Return the free part of the current buffer, at least one byte."""
        if self._filled == _BUFFER:
            self._flush()
        return self._buffers[self._current][self._filled :]

    def _advance(self, size: int) -> None:
        self._filled += size
        self.size += size

    def _flush(self) -> None:
        data = self._buffers[self._current][: self._filled]
        writer, hasher = self._threads
        self._busy[self._current] = writer.submit(self._write, data), hasher.submit(self._digest.update, data)
        self._current, self._filled = (self._current + 1) % _BUFFERS, 0
        self._wait(self._current)

    def _wait(self, number: int) -> None:
        for future in self._busy[number]:
            future.result()

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]
