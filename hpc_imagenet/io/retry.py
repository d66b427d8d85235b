"""Retries with exponential backoff and jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_LIMIT = 3  # failures in a row after which to give up if the other side was never reached


@dataclass
class Retry:
    """Counts failures in a row of one operation and computes the wait before the next attempt.

    Attributes:
        first_wait: s before the first retry; doubled before each further one.
        longest_wait: s, the limit of the doubling.
        limit: failures in a row after which to give up.
        jitter: random share by which a wait is longer or shorter.
        failures: failures in a row; set it to 0 after progress.
    """

    first_wait: float
    longest_wait: float
    limit: int
    jitter: float = 0.25
    failures: int = 0

    def failed(self, reached: bool = True) -> float | None:
        """Count a failure; return the s to wait before the next attempt, or None to give up.

        Args:
            reached: whether the other side was reached at least once.
        """
        self.failures += 1
        if self.failures >= (self.limit if reached else min(self.limit, FIRST_LIMIT)):
            return None
        wait = min(self.longest_wait, self.first_wait * 2.0 ** (self.failures - 1))
        return wait * random.uniform(1 - self.jitter, 1 + self.jitter)
