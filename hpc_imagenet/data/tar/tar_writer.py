"""Write a shard: an ordinary uncompressed tar whose bytes depend on nothing but what is put in.

The tar grows in buffers: images are read straight into their place in one, while one thread writes
the buffer before to the file and another hashes it. So a copy costs two moves of each byte and few calls.
Source: POSIX pax(1), "ustar Interchange Format".
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any

from hpc_imagenet.datastore.reader.dataset_reader import TAR_BLOCK

# One buffer is filled while others are written and hashed. They are small, so that their bytes are still in
# the CPU's cache then, and many, so that nobody waits: with 3 of 4 MB a copy took half as long again.
_BUFFER = 1 << 20  # bytes
_BUFFERS = 8
_MTIME, _MODE = 0, 0o644


class TarWriter:
    """A tar that is being written to an open, empty file.

    Use as a context; `size` and `hash` are those of the tar when the context has ended well.

    Raises:
        OSError: the file cannot be written; from any method.
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
        """Of all bytes, as a manifest has it."""
        return f"sha256:{self._digest.hexdigest()}"

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._put(bytes(2 * TAR_BLOCK))  # the end mark
                self._hand_over()
                for number in range(_BUFFERS):
                    self._wait(number)
        finally:
            for thread in self._threads:
                thread.shutdown(cancel_futures=True)

    def add(self, name: str, data: bytes) -> int:
        """Append a file; return where in the tar its first byte lies."""
        self._put(shard_member_header(name, len(data)))
        offset = self.size
        self._put(data)
        self._put(bytes(-len(data) % TAR_BLOCK))
        return offset

    def copy(self, name: str, descriptor: int, offset: int, length: int) -> int:
        """Append a file whose bytes lie in another open file; return where in the tar its first byte lies.

        Raises:
            EOFError: the other file ends before.
        """
        self._put(shard_member_header(name, length))
        begin, left = self.size, length
        while left:
            room = self._room()[:left]
            got = os.preadv(descriptor, [room], offset + length - left)
            if not got:
                raise EOFError
            self._advance(got)
            left -= got
        self._put(bytes(-length % TAR_BLOCK))
        return begin

    def _put(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            room = self._room()
            part = data[done : done + len(room)]
            room[: len(part)] = part
            self._advance(len(part))
            done += len(part)

    def _room(self) -> memoryview:
        """Return what is free of the current buffer, at least a byte."""
        if self._filled == _BUFFER:
            self._hand_over()
        return self._buffers[self._current][self._filled :]

    def _advance(self, size: int) -> None:
        self._filled += size
        self.size += size

    def _hand_over(self) -> None:
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


def shard_member_header(name: str, length: int) -> bytes:
    """Return the tar header of a file: mode 0644, no owner, no time.

    A name that does not fit its field gets a GNU long name in front, so that this is more than one block.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or length >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = length, _MTIME, _MODE
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    # The same bytes as above, ten times faster: there are two headers an image.
    size = b"%011o" % length
    checksum = _PLAIN_SUM + sum(encoded) + sum(size)
    return b"%b%b%b%b%06o%b" % (
        encoded.ljust(100, b"\0"),
        _PLAIN[100:124],
        size,
        _PLAIN[135:148],
        checksum,
        _PLAIN[154:],
    )


def _plain() -> bytes:
    info = tarfile.TarInfo("")
    info.mtime, info.mode = _MTIME, _MODE
    return info.tobuf(tarfile.GNU_FORMAT)


_PLAIN = _plain()
# Without name, size (eleven digits) and checksum (which counts as eight spaces).
_PLAIN_SUM = sum(_PLAIN) - sum(_PLAIN[124:135]) - sum(_PLAIN[148:156]) + 8 * ord(" ")
