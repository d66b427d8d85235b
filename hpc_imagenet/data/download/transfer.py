"""Transfer one archive from a source into a partial file: in parallel byte ranges, or in one stream.

The first request fetches a few bytes and shows whether the server supports ranges; if not, the archive is
fetched in one stream. Faulty servers are handled in `Transfer._first_request` (the first response),
`Transfer._fetch_range` (one range) and download_retry.py (backoff). Source: RFC 9110 (ranges, If-Range).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hpc_imagenet.data.download.download_retry import MAX_RETRY_AFTER
from hpc_imagenet.data.download.expected import ExpectedArchive, check_first_bytes
from hpc_imagenet.data.download.file_type import is_html
from hpc_imagenet.data.download.partial_file import PartialFile, allocated_bytes
from hpc_imagenet.data.download.range_scheduler import RangeClaim, RangeScheduler
from hpc_imagenet.data.sources.range_source import (
    ContentChanged,
    NotAvailable,
    Origin,
    Response,
    TransientError,
)
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk
from hpc_imagenet.io.tar_header import BLOCK

if TYPE_CHECKING:
    from hpc_imagenet.data.download.downloader import Downloader

log = logging.getLogger(__name__)

FIRST_REQUEST = 1 << 16  # bytes of the first request
LATENCY_FACTOR = 20  # a range is sized so that it takes this many times the latency of its request
MAX_CONNECTION_FAILURES = 3  # in a row, while other connections progress, before a connection is retired


class Transfer:
    """Transfers one archive from a source into a partial file.

    Args:
        downloader: source and settings.
        expected: the expected archive.
        part: the partial file.
        progress: called with the number of bytes downloaded.
    """

    def __init__(
        self,
        downloader: Downloader,
        expected: ExpectedArchive,
        part: PartialFile,
        progress: Callable[[int], None],
    ) -> None:
        self._downloader = downloader
        self._source = downloader.source
        self._sizes = downloader.sizes
        self._expected = expected
        self._part = part
        self._progress = progress
        self._url = downloader.source.url(expected.file)
        self._transferred = 0
        self._lock = threading.Lock()
        self._responses: set[Response] = set()  # those that are being read
        # When the last Retry-After ends (monotonic time), and the connection that received it.
        self._retry_after = (0.0, 0)

    def run(self) -> int:
        """Transfer all missing bytes; return how many were transferred."""
        part = self._part
        retry = self._downloader.new_retry(self._expected.file, lambda: part.size, time.sleep)
        self._progress(part.size)
        while not part.complete:
            try:
                if part.origin is None or not part.origin.resumable:
                    self._first_request()
                else:
                    self._fetch_ranges(part.origin)
            except ContentChanged as error:
                self._log_restart(str(error))
                part.clear()
                retry.wait_or_raise(error)
            except TransientError as error:
                retry.wait_or_raise(error)
            except NotAvailable as error:
                raise self._refusal(error.status) from None
        self._progress(part.size)
        return self._transferred

    def _first_request(self) -> None:
        """Request the first bytes; if the server has no ranges, fetch the whole file in one stream."""
        part = self._part
        if part.size:  # left by a server that cannot resume
            self._log_restart(_no_resume_reason(part.origin))
        try:
            with self._source.open(self._expected.file, 0, FIRST_REQUEST) as response:
                if not response.ranged or response.origin.resumable:
                    self._start(response)
                    return
        except ContentChanged:
            pass  # an empty file has no ranges
        with self._source.open(self._expected.file) as response:
            if response.ranged:
                raise TransientError("the server sent a range although the whole file was requested")
            self._start(response)

    def _start(self, response: Response) -> None:
        """Check the first bytes, then restart the partial file with the bytes of this response."""
        part, expected, origin = self._part, self._expected, response.origin
        if response.content_type.startswith("text/html"):
            raise self._html_page_error()
        if expected.bytes is not None and origin.total not in (None, expected.bytes):
            raise UserError(
                f"{self._url}: has {origin.total} bytes, but {expected.setting}.bytes is {expected.bytes}"
                f"{self._downloader.tail}"
            )
        first = b""
        while len(first) < BLOCK and (data := response.read(self._sizes.read)):
            first += data
        if origin.total is not None and len(first) < min(BLOCK, origin.total):
            raise TransientError("the connection ended early")
        _check_total(len(first), origin)
        check_first_bytes(first, expected, self._url, self._downloader.hint)
        disk.require_free_space(
            part.target.parent,
            (origin.total or expected.bytes or 0) - allocated_bytes(part.target),
            expected.file,
        )
        part.restart(origin)
        at = self._write(0, first)
        rate_limiter = self._downloader.rate_limiter
        while data := response.read(rate_limiter.chunk_size(self._sizes.read)):
            rate_limiter.consume(len(data))
            _check_total(at + len(data), origin)
            at = self._write(at, data)
            self._progress(at)
            part.save_state(if_due=True)
        if not response.ranged and origin.total is None:
            part.set_total_to_size()
        elif not response.ranged and at < (origin.total or 0):
            raise TransientError("the connection ended early")

    def _fetch_ranges(self, origin: Origin) -> None:
        """Fetch all missing bytes over several connections."""
        part, downloader = self._part, self._downloader
        disk.require_free_space(
            part.target.parent, (origin.total or 0) - allocated_bytes(part.target), self._expected.file
        )
        ranges = RangeScheduler(part, downloader.connections, self._sizes.min_steal)
        threads = [
            threading.Thread(
                target=self._run_connection, args=(ranges, origin, n), name=f"range-{n}", daemon=True
            )
            for n in range(downloader.connections)
        ]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                alive[0].join(0.05)
                if ranges.stopped.is_set():
                    break
                self._progress(part.size)
                part.save_state(if_due=True)
        finally:
            ranges.stop()
            with self._lock:
                for response in self._responses:
                    response.close()
            for thread in threads:
                thread.join()
        if ranges.error is not None:
            raise ranges.error

    def _run_connection(self, ranges: RangeScheduler, origin: Origin, number: int) -> None:
        """Run one connection: fetch ranges until none is left."""
        sleep = self._downloader.sleep or ranges.stopped.wait
        retry = self._downloader.new_retry(self._expected.file, lambda: self._part.size, sleep)
        size = None if self._downloader.connections == 1 else self._sizes.min_range
        failures = 0  # of this connection, since its last byte
        try:
            while claim := ranges.take(size):
                retry_at, receiver = self._retry_after
                if receiver != number and retry_at > time.monotonic():
                    sleep(retry_at - time.monotonic())
                failure = None
                try:
                    best_size = self._fetch_range(origin, claim, ranges)
                    if size is not None:
                        size = min(self._sizes.max_range, max(self._sizes.min_range, best_size))
                    failures = 0
                except TransientError as error:
                    failure = error
                finally:
                    ranges.release(claim)
                if failure is None or ranges.stopped.is_set():
                    continue
                failures = 1 if claim.at > claim.begin else failures + 1
                if failure.wait is not None:
                    self._retry_after = (time.monotonic() + min(MAX_RETRY_AFTER, failure.wait), number)
                retry.wait_or_raise(failure)
                if failures >= MAX_CONNECTION_FAILURES and not retry.failures and ranges.retire_connection():
                    log.warning("%s: continuing with %d connection(s)", self._url, ranges.connections)
                    return
        except BaseException as error:
            ranges.stop(error)

    def _fetch_range(self, origin: Origin, claim: RangeClaim, ranges: RangeScheduler) -> int:
        """Fetch a claim; return the best range size for the latency and rate seen, in bytes."""
        requested = time.monotonic()
        rate_limiter = self._downloader.rate_limiter
        with self._source.open(self._expected.file, claim.begin, claim.end, origin) as response:
            if not response.ranged:
                raise self._no_range_error(response, origin)
            with self._lock:
                self._responses.add(response)
            try:
                first = since = time.monotonic()
                # Spent in reads, and their bytes, since the last check of the rate.
                seconds, received = 0.0, 0
                while claim.at < claim.end and not ranges.stopped.is_set():
                    data = response.read(min(rate_limiter.chunk_size(self._sizes.read), claim.end - claim.at))
                    if not data:
                        if response.end is not None and claim.at >= response.end:
                            break  # the server announced a shorter range than requested
                        raise TransientError("the connection ended early")
                    moment = time.monotonic()
                    seconds, received = seconds + moment - since, received + len(data)
                    if seconds > self._downloader.timeout:
                        if received < self._downloader.min_rate * seconds:
                            raise TransientError(f"too slow: {received} bytes in {seconds:.0f} s")
                        seconds, received = 0.0, 0
                    with self._part.changed:  # an idle connection may have stolen the rest
                        data = data[: max(0, claim.end - claim.at)]
                    claim.at = self._write(claim.at, data)
                    rate_limiter.consume(len(data))
                    since = time.monotonic()
            finally:
                with self._lock:
                    self._responses.discard(response)
        rate = (claim.at - claim.begin) / max(1e-6, time.monotonic() - first)
        return int(LATENCY_FACTOR * (first - requested) * rate)

    def _write(self, at: int, data: bytes) -> int:
        self._part.write(at, data)
        with self._lock:
            self._transferred += len(data)
        return at + len(data)

    def _log_restart(self, reason: str) -> None:
        log.warning(
            "%s: %s; restarting the download, %d bytes are discarded", self._url, reason, self._part.size
        )

    def _no_range_error(self, response: Response, origin: Origin) -> Exception:
        """Return the error for a response with the whole file instead of the requested range."""
        if response.content_type.startswith("text/html") or is_html(response.read(BLOCK)):
            return self._html_page_error()
        if not origin.matches(response.origin):
            return ContentChanged("the file has changed on the server")
        return ContentChanged("the server cannot resume")

    def _html_page_error(self) -> UserError:
        return UserError(
            f"{self._url} is an HTML page, not an archive: a login or an error page?{self._downloader.tail}"
        )

    def _refusal(self, status: int) -> UserError:
        check = f"check dataset.source and {self._expected.setting}.file={self._expected.file}"
        reason = {
            401: "needs a login: set download.login (see docs/data.md)",
            403: "is forbidden: accept the dataset's terms on its website and check the credentials",
            404: f"does not exist: {check}",
            410: f"no longer exists: {check}",
        }.get(status, f"cannot be downloaded: {check}")
        return UserError(f"{self._url} {reason} (status {status}){self._downloader.tail}")


def _no_resume_reason(origin: Origin | None) -> str:
    if origin is not None and origin.validator is None:
        return "the server sends no ETag or date, which resuming needs"
    return "the server cannot resume"


def _check_total(size: int, origin: Origin) -> None:
    """Raise if a server has sent more bytes than it announced: such a download would never be complete.

    Raises:
        TransientError: another server behind the same address may announce it correctly.
    """
    if origin.total is not None and size > origin.total:
        raise TransientError(f"the server sent more than the {origin.total} bytes that it announced")
