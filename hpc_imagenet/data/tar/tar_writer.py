"""Tar writer for shards: an uncompressed tar whose bytes depend only on the files added to it.

The tar is assembled in buffers. Images are read directly into a buffer, while one thread writes the previous
buffer to the file and another hashes the one before it. A copy thus moves each byte twice and needs few
system calls. copy_file_range and sendfile move each byte once, but then the hash has to read the file again:
0.95 CPU s a GB with all threads, against 0.80 here.
Source: POSIX pax(1), "ustar Interchange Format".
"""

from __future__ import annotations

import os
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import IO

from hpc_imagenet.datastore.file_hash import format_digest, new_digest
from hpc_imagenet.io.atomic_files import StreamingWriter
from hpc_imagenet.io.tar_header import BLOCK, END, member_header

# One buffer is filled while others are written and hashed. They are small, so that their bytes are still in
# the CPU's cache, and many, so that no thread waits: with 3 buffers of 4 MB a copy took 1.5 times as long.
_BUFFER = 1 << 20  # bytes
_BUFFERS = 8
_PADDING = bytes(BLOCK)


class TarWriter:
    """Writer of a tar into an open, empty file; a context manager.

    `size` and `hash` are those of the whole tar once the context has exited without an error.

    Raises:
        OSError: the file cannot be written; raised by any method.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.size = 0  # bytes so far, without `_padding`
        self._padding = b""  # zeros after the last member, which are written together with what follows
        self._writer = StreamingWriter(file.fileno())
        self._digest = new_digest()
        self._buffers = [memoryview(bytearray(_BUFFER)) for _ in range(_BUFFERS)]
        self._current, self._filled = 0, 0
        self._error: OSError | None = None  # of the writing thread
        # Buffers go around: filled here, then written, then hashed, then free again.
        self._written: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._hashed: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._free: SimpleQueue[int] = SimpleQueue()
        for number in range(1, _BUFFERS):
            self._free.put(number)
        self._threads = [Thread(target=self._write_buffers), Thread(target=self._hash_buffers)]
        for thread in self._threads:
            thread.start()

    @property
    def hash(self) -> str:
        """Hash of all bytes, in the manifest's form `algorithm:<hex>`."""
        return format_digest(self._digest)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._put(self._padding + END)
                self._flush()
        finally:
            self._written.put(None)
            for thread in self._threads:
                thread.join()
        if error is None and self._error is not None:
            raise self._error

    def add(self, name: str, data: bytes) -> int:
        """Append a file and return the byte offset of its data in the tar."""
        self._put(self._padding + member_header(name, len(data)) + data)
        self._padding = _PADDING[: -len(data) % BLOCK]
        return self.size - len(data)

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
        self._put(self._padding + member_header(name, length))
        begin, left = self.size, length
        while left:
            free = self._free_part()[:left]
            got = os.preadv(descriptor, [free], offset + length - left)
            if not got:
                raise EOFError
            self._advance(got)
            left -= got
        self._padding = _PADDING[: -length % BLOCK]
        return begin

    def _put(self, data: bytes) -> None:
        if len(data) <= _BUFFER - self._filled:  # nearly always, so without slices
            self._buffers[self._current][self._filled : self._filled + len(data)] = data
            self._advance(len(data))
            return
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
        self._written.put((self._current, self._filled))
        self._current, self._filled = self._free.get(), 0
        if self._error is not None:
            raise self._error

    def _write_buffers(self) -> None:
        while (block := self._written.get()) is not None:
            number, size = block
            try:
                if self._error is None:
                    self._writer.write(self._buffers[number][:size])
            except OSError as error:
                self._error = error  # raised by the thread that fills the buffers
            self._hashed.put(block)
        self._hashed.put(None)

    def _hash_buffers(self) -> None:
        while (block := self._hashed.get()) is not None:
            number, size = block
            self._digest.update(self._buffers[number][:size])
            self._free.put(number)
