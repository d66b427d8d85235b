"""Reading objects of a bucket: in ranges that are asked for side by side, and handed on in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.s3 import Damaged, Missing, Server
from hpc_imagenet.datastore.transport import BLOCK, digest_of, in_form
from hpc_imagenet.durable import sync_folder
from hpc_imagenet.errors import UserError

RANGE = 8 << 20  # bytes that are asked for at a time
_PIECE = 256 << 10  # bytes, small enough for a CPU's cache


def fetch(server: Server, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
    """Bring an object to `target`; see `transport.Place.fetch`."""
    part = target.with_name(f".{target.name}.part")
    for again in (True, False):
        with part.open("ab+", buffering=0) as writer:
            digest, done = digest_of(file), 0
            while block := os.pread(writer.fileno(), BLOCK, done):  # of an earlier try
                digest.update(block)
                done += len(block)
            tell(done)
            for data in read(server, path, done, file.bytes):
                writer.write(data)
                digest.update(data)
                done += len(data)
                tell(done)
            os.fsync(writer.fileno())
        if in_form(digest) == file.hash:
            part.replace(target)
            sync_folder(target.parent)
            return
        part.unlink()  # and once more from the beginning: an earlier try may have left it wrong
        if not again:
            raise UserError(f"{server.url}/{path} has other bytes than when it was made: {in_form(digest)}")


def hash_of(server: Server, path: str, file: File, tell: Callable[[int], None]) -> str | None:
    """Read an object and return its hash; see `transport.Place.hash`."""
    try:
        found = server.head(path)
    except Missing:
        return None
    digest, done = digest_of(file), 0
    for data in read(server, path, 0, found["ContentLength"]):
        digest.update(data)
        done += len(data)
        tell(done)
    return in_form(digest)


def read(server: Server, path: str, begin: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes [begin, end) of an object, in order; each block until the next is asked for.

    Raises:
        UserError: the object is missing or shorter.
    """
    starts = range(begin, end, RANGE)
    free = deque(memoryview(bytearray(RANGE)) for _ in starts[: server.connections + 1])
    waiting: deque[tuple[Future[memoryview], memoryview]] = deque()
    threads = ThreadPoolExecutor(server.connections)
    try:
        for start in starts:
            if not free:
                future, block = waiting.popleft()
                yield future.result()
                free.append(block)
            block = free.popleft()
            size = min(end - start, RANGE)
            waiting.append((threads.submit(_range, server, path, start, block[:size]), block))
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        threads.shutdown(cancel_futures=True)


def _range(server: Server, path: str, begin: int, block: memoryview) -> memoryview:
    """Fill `block` with the bytes of an object from `begin` on."""

    def get() -> None:
        words, done = f"bytes={begin}-{begin + len(block) - 1}", 0
        with server.opened(path, Range=words) as body:
            while data := body.read(_PIECE):
                if done + len(data) > len(block):
                    raise Damaged("more bytes came than were asked for")
                block[done : done + len(data)] = data
                done += len(data)
        if done != len(block):
            raise Damaged(f"{done} bytes came instead of {len(block)}")

    try:
        server.ask(f"reading {path}", get)
    except Missing:
        raise UserError(f"{server.url}/{path} is missing") from None
    return block
