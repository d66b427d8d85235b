"""Who fetches which bytes: several connections share the gaps of one file, the first gaps first."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from hpc_imagenet.data.download.partial_file import PartialFile

AHEAD = 1 << 29  # bytes that one connection may be ahead of the first gap: what a node keeps in memory
LEAST = 1 << 20  # bytes that are worth a request of their own


@dataclass(eq=False)
class RangeClaim:
    """Bytes [at, end) that one connection is fetching; `end` comes nearer where an idle one takes half."""

    begin: int
    end: int
    at: int = 0

    def __post_init__(self) -> None:
        self.at = self.begin


class RangeScheduler:
    """Hands out the gaps of a part.

    Attributes:
        stopped: set when nobody shall begin with anything more.
        error: why, if not because all is there.
        workers: how many connections there are.
    """

    def __init__(self, part: PartialFile, workers: int) -> None:
        self._part = part
        self._claims: list[RangeClaim] = []
        self.workers = workers
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def take(self, size: int | None) -> RangeClaim | None:
        """Return the next bytes to fetch, at most `size` of them; None when there is nothing left to do."""
        with self._part.changed:
            while not self.stopped.is_set() and not self._part.whole:
                claim = self._free(size) or self._steal_half()
                if claim:
                    self._claims.append(claim)
                    return claim
                self._part.changed.wait(1.0)
        return None

    def release(self, claim: RangeClaim) -> None:
        """Give back what was not fetched of a claim."""
        with self._part.changed:
            self._claims.remove(claim)
            self._part.changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Let nobody begin with anything more."""
        with self._part.changed:
            self.error = self.error or error
            self.stopped.set()
            self._part.changed.notify_all()

    def retire_connection(self) -> bool:
        """Take one connection away for good; False for the last one, which stays."""
        with self._part.changed:
            if self.workers == 1:
                return False
            self.workers -= 1
            return True

    def _free(self, size: int | None) -> RangeClaim | None:
        limit = self._part.contiguous_size + AHEAD
        claims = sorted(self._claims, key=lambda claim: claim.begin)
        for begin, end in self._part.gaps():
            at, stop = begin, end
            for claim in claims:
                if claim.begin > at:
                    stop = min(end, claim.begin)
                    break
                at = max(at, claim.end)
            if at < stop:
                if at >= limit:
                    return None
                return RangeClaim(at, stop if size is None else min(stop, at + size))
        return None

    def _steal_half(self) -> RangeClaim | None:
        """Take the second half of what another connection has before it: the last one, or a slow one."""
        largest = max(self._claims, key=lambda claim: claim.end - claim.at, default=None)
        if largest is None or largest.end - largest.at < 2 * LEAST:
            return None
        middle = (largest.at + largest.end) // 2
        half = RangeClaim(middle, largest.end)
        largest.end = middle
        return half
