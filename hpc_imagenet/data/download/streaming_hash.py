"""The MD5 of a file while it is written: a thread that follows the front of what is there without a gap.

Bytes come in chunks side by side, a little ahead of the front, so they are read back while they are still in
memory. What an earlier try has written is read from the disk, once, while the rest is being fetched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hpc_imagenet.data.download.expected import new_md5
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.errors import UserError

STEP = 4 << 20  # bytes


class StreamingHash:
    """Hashes a part for as long as the block lasts."""

    def __init__(self, part: PartialFile) -> None:
        self._part = part
        self._ended = False
        self._error: BaseException | None = None
        self._md5 = new_md5()
        self.hashed = 0
        self._thread = threading.Thread(target=self._run, name="md5", daemon=True)

    def __enter__(self) -> StreamingHash:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._part.changed:
            self._ended = True
            self._part.changed.notify_all()
        self._thread.join()

    def result(self, tick: Callable[[], None]) -> str:
        """Wait until all that is there is hashed; return the MD5 in hex.

        Args:
            tick: called every second or so until then.

        Raises:
            UserError: the file became shorter.
        """
        while self._error is None and self.hashed < self._part.contiguous_size:
            tick()
            with self._part.changed:
                if self._error is None and self.hashed < self._part.contiguous_size:
                    self._part.changed.wait(1.0)
        if self._error is not None:
            raise self._error
        return self._md5.hexdigest()

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            self._error = error
            with self._part.changed:
                self._part.changed.notify_all()

    def _follow(self) -> None:
        part, buffer = self._part, memoryview(bytearray(STEP))
        generation = part.generation
        while True:
            with part.changed:
                while (
                    not self._ended and part.generation == generation and part.contiguous_size <= self.hashed
                ):
                    part.changed.wait()
                if self._ended:
                    return
                if part.generation != generation:
                    generation, self.hashed, self._md5 = part.generation, 0, new_md5()
                size = min(STEP, part.contiguous_size - self.hashed)
            if not size:
                continue
            done = os.preadv(part.file, [buffer[:size]], self.hashed)
            self._md5.update(buffer[:done])
            with part.changed:
                if part.generation != generation:
                    continue
                if not done:
                    raise UserError(
                        f"{part.path}: became shorter while it was read; is something else writing it?"
                    )
                self.hashed += done
                part.changed.notify_all()
