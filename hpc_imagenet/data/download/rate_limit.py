"""A download rate limit shared by all connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimiter:
    """Delays its callers so that together they stay below a rate.

    Args:
        limit: bytes per second; None for no limit.
        sleep: function that waits, taking seconds.
    """

    def __init__(self, limit: float | None, sleep: Callable[[float], object] = time.sleep) -> None:
        self._limit = limit
        self._sleep = sleep
        self._lock = threading.Lock()
        self._next_free = time.monotonic()  # when all bytes consumed so far are paid for

    def chunk_size(self, max_size: int) -> int:
        """Return the bytes to read at a time: with a limit, those of 0.1 s, at most `max_size`."""
        return max_size if self._limit is None else max(1024, min(max_size, int(self._limit / 10)))

    def consume(self, size: int) -> None:
        """Wait until `size` more bytes fit the limit, counting the bytes of all callers."""
        if self._limit is None:
            return
        with self._lock:
            now = time.monotonic()
            # At most 0.1 s of unused rate is kept, so that a pause is not followed by a burst.
            self._next_free = max(self._next_free, now - 0.1) + size / self._limit
            wait = self._next_free - now
        if wait > 0:
            self._sleep(wait)
