"""When to try again what has failed, and when to give up. Source: RFC 9110, Retry-After."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hpc_imagenet.data.sources.range_source import ContentChanged, RangeSource, TransientError
from hpc_imagenet.errors import UserError

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # s between tries, unless the server asks for more
LONGEST_ASKED = 3600.0  # s that a server may ask for
FIRST_RETRIES = 3  # to reach a server that was not reached yet


class Retry:
    """How often something failed, and how long to wait.

    Args:
        remote: who is asked.
        file: what is being fetched.
        retries: tries in a row without a new byte before giving up.
        size: returns how many bytes are there.
        sleep: what waits, for some s.
        tail: of the error.
    """

    def __init__(
        self,
        remote: RangeSource,
        file: str,
        retries: int,
        size: Callable[[], int],
        sleep: Callable[[float], object],
        tail: str,
    ) -> None:
        self._remote = remote
        self._url = remote.url(file)
        self._retries = retries
        self._size = size
        self._sleep = sleep
        self._tail = tail
        self._best = size()
        self._changed = False
        self.failures = 0  # in a row without a byte that was not there before

    def wait_or_raise(self, error: TransientError | ContentChanged) -> None:
        """Wait until it is time to try again.

        Raises:
            UserError: there is no sense in it any more.
        """
        if isinstance(error, ContentChanged) and not self._changed:
            self._changed = True  # once is no failure: what an earlier try has left is out of date
            return
        size = self._size()
        # A server that begins anew each time makes progress only beyond the furthest byte so far.
        self.failures = 0 if size > self._best else self.failures + 1
        self._best = max(self._best, size)
        limit = self._retries if self._remote.reached else min(self._retries, FIRST_RETRIES - 1)
        if self.failures > limit:
            raise UserError(
                f"{self._url}: {error}, {self.failures} tries in a row (dataset.source, download.retries)"
                f"{self._tail}"
            )
        wait = min(LONGEST_WAIT, 2.0 ** max(0, self.failures - 1))
        if isinstance(error, TransientError):
            wait = wait if error.wait is None else min(LONGEST_ASKED, error.wait)
            log.warning("%s: %s, with %d bytes there; again in %.0f s", self._url, error, size, wait)
        self._sleep(wait)
