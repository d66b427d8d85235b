"""Assigns the missing byte ranges of one file to several connections, lowest offsets first."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from hpc_imagenet.data.download.partial_file import PartialFile

# Bytes that a connection may be ahead of the first gap: what stays in a node's page cache until it is hashed.
MAX_AHEAD = 1 << 29


@dataclass(frozen=True)
class TransferSizes:
    """Sizes of a parallel download, in bytes.

    Attributes:
        min_range: smallest range that a connection requests.
        max_range: largest range.
        min_steal: what is worth a request of its own.
        read: most bytes per read from the network.
    """

    min_range: int = 4 << 20
    max_range: int = 32 << 20
    min_steal: int = 1 << 20
    read: int = 1 << 18


SIZES = TransferSizes()


@dataclass(eq=False)
class RangeClaim:
    """Bytes [at, end) that one connection still has to fetch.

    Attributes:
        begin: offset of the first byte of the claim.
        end: offset after the last byte; decreases if an idle connection steals the second half.
        at: offset of the next byte to fetch.
    """

    begin: int
    end: int
    at: int = 0

    def __post_init__(self) -> None:
        self.at = self.begin


class RangeScheduler:
    """Assigns the gaps of a partial file to connections; thread-safe.

    Args:
        part: the partial file.
        connections: number of connections.
        min_steal: bytes that are worth a request of their own.

    Attributes:
        stopped: set once no further request may start.
        error: the exception that stopped the download, if any.
        connections: number of connections in use.
    """

    def __init__(self, part: PartialFile, connections: int, min_steal: int) -> None:
        self._part, self._min_steal = part, min_steal
        self._claims: list[RangeClaim] = []
        self.connections = connections
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def take(self, size: int | None) -> RangeClaim | None:
        """Claim the next range of at most `size` bytes; None once the file is complete or stopped."""
        with self._part.changed:
            while not self.stopped.is_set() and not self._part.complete:
                claim = self._next_gap(size) or self._steal_half()
                if claim:
                    self._claims.append(claim)
                    return claim
                self._part.changed.wait(1.0)
        return None

    def release(self, claim: RangeClaim) -> None:
        """Return the unfetched rest of a claim, for any connection to take."""
        with self._part.changed:
            self._claims.remove(claim)
            self._part.changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Stop all connections; the first error is kept."""
        with self._part.changed:
            self.error = self.error or error
            self.stopped.set()
            self._part.changed.notify_all()

    def retire_connection(self) -> bool:
        """Reduce the number of connections by one; return False if only one is left."""
        with self._part.changed:
            if self.connections == 1:
                return False
            self.connections -= 1
            return True

    def _next_gap(self, size: int | None) -> RangeClaim | None:
        limit = self._part.contiguous_size + MAX_AHEAD
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
        """Claim the second half of the largest unfetched rest, so that no slow connection is waited for."""
        largest = max(self._claims, key=lambda claim: claim.end - claim.at, default=None)
        if largest is None or largest.end - largest.at < 2 * self._min_steal:
            return None
        middle = (largest.at + largest.end) // 2
        half = RangeClaim(middle, largest.end)
        largest.end = middle
        return half
