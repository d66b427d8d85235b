"""Retries of a download, with exponential backoff and Retry-After. Source: RFC 9110, 10.2.3."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hpc_imagenet.data.sources.range_source import ContentChanged, RangeSource, TransientError
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.retry import Retry

log = logging.getLogger(__name__)

MAX_BACKOFF = 60.0  # s between attempts if the server sends no Retry-After
MAX_RETRY_AFTER = 3600.0  # s; longer values of Retry-After are cut to this


class DownloadRetry:
    """Counts the failures of one download in a row, and waits between attempts.

    Args:
        source: source of the file.
        file: name of the file in the source.
        retries: retries in a row without a new byte before giving up.
        size: function that returns how many bytes have been downloaded.
        sleep: function that waits, taking seconds.
        tail: text appended to the error.
    """

    def __init__(
        self,
        source: RangeSource,
        file: str,
        retries: int,
        size: Callable[[], int],
        sleep: Callable[[float], object],
        tail: str,
    ) -> None:
        self._source = source
        self._url = source.url(file)
        self._retry = Retry(1.0, MAX_BACKOFF, retries + 1, jitter=0.0)
        self._size = size
        self._sleep = sleep
        self._tail = tail
        self._largest_size = size()
        self._changed_before = False

    @property
    def failures(self) -> int:
        """Failures in a row without a new byte."""
        return self._retry.failures

    def wait_or_raise(self, error: TransientError | ContentChanged) -> None:
        """Count a failure and wait until the next attempt.

        Raises:
            UserError: there were too many failures in a row.
        """
        if isinstance(error, ContentChanged) and not self._changed_before:
            # The first change is no failure: the bytes of an earlier attempt are out of date.
            self._changed_before = True
            return
        size = self._size()
        # A server that makes every download restart progresses only beyond the largest size so far.
        progressed = size > self._largest_size
        self._largest_size = max(self._largest_size, size)
        if progressed:
            self._retry.failures = 0
            wait = 1.0 if self._retry.limit > 0 else None  # retries=-1: a single attempt
        else:
            wait = self._retry.failed(self._source.reached)
        if wait is None:
            raise UserError(
                f"{self._url}: {error}; {self.failures} failed attempts in a row; check dataset.source or "
                f"increase download.retries{self._tail}"
            )
        if isinstance(error, TransientError):
            wait = wait if error.wait is None else min(MAX_RETRY_AFTER, error.wait)
            log.warning("%s: %s after %d bytes; retrying in %.0f s", self._url, error, size, wait)
        self._sleep(wait)
