"""A limit for the bytes a second, shared by all connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimiter:
    """Makes its callers wait until their bytes are due.

    Args:
        limit: bytes a second; None for no limit.
        sleep: what waits.
    """

    def __init__(self, limit: float | None, sleep: Callable[[float], object] = time.sleep) -> None:
        self._limit = limit
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free = time.monotonic()  # from when on bytes are due

    def chunk_size(self, most: int) -> int:
        """Return how many bytes to read at a time: with a limit, what comes within 0.1 s."""
        return most if self._limit is None else max(1024, min(most, int(self._limit / 10)))

    def consume(self, size: int) -> None:
        """Wait for as long as `size` bytes take beyond those of all callers before."""
        if self._limit is None:
            return
        with self._lock:
            now = time.monotonic()
            # What was not used for longer than 0.1 s is lost: no bursts after a pause.
            self._free = max(self._free, now - 0.1) + size / self._limit
            wait = self._free - now
        if wait > 0:
            self._sleep(wait)
