"""MD5 of a file while it is downloaded: a thread that hashes its contiguous prefix.

Connections write only a little ahead of the prefix, so the bytes are read back from the page cache. The bytes
of an earlier attempt are read from the disk once, while the rest is downloaded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hpc_imagenet.data.download.expected import new_md5
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.errors import UserError

CHUNK = 4 << 20  # bytes


class StreamingHash:
    """Context manager whose thread hashes a partial file as it grows.

    Attributes:
        hashed: length of the hashed prefix in bytes.
    """

    def __init__(self, part: PartialFile) -> None:
        self._part = part
        self._stopped = False
        self._error: BaseException | None = None
        self._md5 = new_md5()
        self._generation = part.generation  # of the bytes that are hashed
        self.hashed = 0
        self._thread = threading.Thread(target=self._run, name="md5", daemon=True)

    def __enter__(self) -> StreamingHash:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._part.changed:
            self._stopped = True
            self._part.changed.notify_all()
        self._thread.join()

    def result(self, tick: Callable[[], None]) -> str:
        """Wait until the contiguous prefix is hashed; return its MD5 in hex.

        Args:
            tick: called at least about once a second while waiting.

        Raises:
            UserError: the file was truncated by another process.
        """
        while self._behind():
            tick()
            with self._part.changed:
                if self._behind():
                    self._part.changed.wait(1.0)
        if self._error is not None:
            raise self._error
        return self._md5.hexdigest()

    def _behind(self) -> bool:
        with self._part.changed:
            if self._error is not None:
                return False
            return self._generation != self._part.generation or self.hashed < self._part.contiguous_size

    def _run(self) -> None:
        try:
            self._hash_prefix()
        except BaseException as error:
            self._error = error
            with self._part.changed:
                self._part.changed.notify_all()

    def _hash_prefix(self) -> None:
        part, buffer = self._part, memoryview(bytearray(CHUNK))
        while True:
            with part.changed:
                while (
                    not self._stopped
                    and part.generation == self._generation
                    and part.contiguous_size <= self.hashed
                ):
                    part.changed.wait()
                if self._stopped:
                    return
                if part.generation != self._generation:
                    self._generation, self.hashed, self._md5 = part.generation, 0, new_md5()
                    part.changed.notify_all()
                size = min(CHUNK, part.contiguous_size - self.hashed)
            if not size:
                continue
            done = os.preadv(part.file, [buffer[:size]], self.hashed)
            self._md5.update(buffer[:done])
            with part.changed:
                if part.generation != self._generation:
                    continue
                if not done:
                    raise UserError(
                        f"{part.path}: became shorter while it was read; stop other programs that write to "
                        "it, then run the same command again"
                    )
                self.hashed += done
                part.changed.notify_all()
