"""Bring an archive from a remote: in ranges side by side, resumed, retried, verified while it is written.

The first request takes a few bytes and settles what can be done: single ranges, or one stream from the first
byte to the last. What is done about a bad server is in `Transfer._look` (the first answer), `Transfer._range`
(one range), and in tries.py (when to ask again). Source: RFC 9110 (ranges, If-Range).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import ExpectedArchive, check_complete, check_first_bytes, quarantine
from hpc_imagenet.data.download.file_type import is_html
from hpc_imagenet.data.download.partial_file import PartialFile, allocated_bytes
from hpc_imagenet.data.download.range_scheduler import RangeClaim, RangeScheduler
from hpc_imagenet.data.download.rate_limit import RateLimiter
from hpc_imagenet.data.download.retry import LONGEST_ASKED, Retry
from hpc_imagenet.data.download.streaming_hash import StreamingHash
from hpc_imagenet.data.sources.range_source import (
    ContentChanged,
    NotAvailable,
    Origin,
    RangeSource,
    Response,
    TransientError,
)
from hpc_imagenet.data.tar.tar_reader import BLOCK
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk

log = logging.getLogger(__name__)

READ = 1 << 18  # bytes a read from the network, at most
LOOK = 1 << 16  # bytes that the first request asks for
LEAST, MOST = 4 << 20, 32 << 20  # bytes of a range …
WORTH = 20  # … and so many times what comes in the time that a request waits for its answer
SLOWEST = 1000  # bytes a second: a connection below that for a whole timeout counts as broken
TOO_MANY = 3  # failures of one connection in a row, while others go on, until it stays away
TEXT_LIMIT = 1 << 20  # bytes of a small text file


class Downloader:
    """A source of archives behind a remote.

    Args:
        remote: who has the bytes.
        retries: tries in a row without a new byte before giving up.
        timeout: s without a byte after which the remote counts a connection as broken.
        connections: how many ranges are fetched at a time.
        limit: bytes a second in all; None for no limit.
        hint: the dataset's, shown behind an error.
        sleep: what waits between tries; None for a wait that ends with the download.
    """

    copies = True

    def __init__(
        self,
        remote: RangeSource,
        retries: int,
        timeout: float,
        *,
        connections: int = 1,
        limit: float | None = None,
        hint: str = "",
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.remote = remote
        self.retries = retries
        self.timeout = timeout
        self.connections = connections
        self.pace = RateLimiter(limit)
        self.hint = hint
        self.tail = f"; {hint}" if hint else ""
        self.sleep = sleep

    def text(self, file: str) -> str | None:
        """Return a small text file, or None where the remote has none to give.

        Raises:
            UserError: it cannot be reached.
        """
        tries = self.tries(file, lambda: 0, time.sleep)
        while True:
            found = b""
            try:
                with self.remote.open(file) as answer:
                    while len(found) < TEXT_LIMIT and (data := answer.read(TEXT_LIMIT - len(found))):
                        found += data
            except TransientError as error:
                tries.wait_or_raise(error)
            except (NotAvailable, ContentChanged):
                return None
            else:
                return None if is_html(found) else found.decode("utf-8", "replace")

    def size(self, want: ExpectedArchive) -> int | None:
        """Return how many bytes an archive has, as far as the remote says so."""
        try:
            return self.remote.size(want.file)
        except (TransientError, NotAvailable):
            return None

    def tries(self, file: str, size: Callable[[], int], sleep: Callable[[float], object]) -> Retry:
        """Return a count of tries for a file of which `size` says how much is there."""
        return Retry(self.remote, file, self.retries, size, self.sleep or sleep, self.tail)

    def fetch(self, want: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Bring an archive to `target`, whole, verified and with its receipt.

        Args:
            want: what it must be.
            target: its final place; `<target>.part` until it is whole.
            progress: told how many bytes of it are there.

        Returns:
            bytes that came.

        Raises:
            UserError: it cannot be had, or what came is not what is wanted.
        """
        url = self.remote.url(want.file)
        return download_and_verify(
            want,
            target,
            url,
            self.remote.prefix,
            lambda part: Transfer(self, want, part, progress).run(),
            progress,
        )


def download_and_verify(
    want: ExpectedArchive,
    target: Path,
    url: str,
    source: str,
    fill: Callable[[PartialFile], int],
    progress: Callable[[int], None],
) -> int:
    """Let `fill` write an archive, then verify it and give it its name and receipt.

    Args:
        want: what it must be.
        target: its final place.
        url: what it is fetched from; bytes of a part from elsewhere are thrown away.
        source: how the receipt calls where it came from.
        fill: makes the part whole; returns the bytes that came.
        progress: told how many bytes are there while the last of them are being verified.

    Raises:
        UserError: what came is not what is wanted: it is kept as `<target>.bad`.
    """
    with PartialFile(target) as part, disk.explain_disk_full(target.parent):
        if part.origin and part.origin.url != url:
            log.warning("%s: begins anew: its first bytes are from %s", target, part.origin.url)
            part.clear()
        with StreamingHash(part) as follower:
            fetched = fill(part)
            md5 = follower.result(lambda: progress(part.size))
        stat = part.stat()
        try:
            check_complete(part.path, want, md5, url)
        except UserError as error:
            part.discard_state()
            raise quarantine(part.path, target, error) from None
        receipt.write_receipt(target, md5, source, want.md5_source, stat)
        part.finalize()
    return fetched


class Transfer:
    """One archive on its way from a remote into a part."""

    def __init__(
        self, source: Downloader, want: ExpectedArchive, part: PartialFile, progress: Callable[[int], None]
    ) -> None:
        self._source = source
        self._remote = source.remote
        self._want = want
        self._part = part
        self._progress = progress
        self._url = source.remote.url(want.file)
        self._fetched = 0
        self._lock = threading.Lock()
        self._answers: set[Response] = set()  # those being read
        self._quiet = (0.0, 0)  # until when the server wants no requests, and whom it told

    def run(self) -> int:
        """Fetch what is missing; return how many bytes came."""
        part = self._part
        tries = self._source.tries(self._want.file, lambda: part.size, time.sleep)
        self._progress(part.size)
        while not part.whole:
            try:
                if part.origin is None or not part.origin.resumable:
                    self._look()
                else:
                    self._ranges(part.origin)
            except ContentChanged as error:
                log.warning("%s: %s; beginning anew, %d bytes are lost", self._url, error, part.size)
                part.clear()
                tries.wait_or_raise(error)
            except TransientError as error:
                tries.wait_or_raise(error)
            except NotAvailable as error:
                raise self._refusal(error.status) from None
        self._progress(part.size)
        return self._fetched

    def _look(self) -> None:
        """Ask for the first bytes: are they what is wanted, and how can the others be had?"""
        part = self._part
        if part.size:  # of a server that cannot resume
            log.warning("%s: %s; beginning anew, %d bytes are lost", self._url, _why(part.origin), part.size)
        try:
            with self._remote.open(self._want.file, 0, LOOK) as answer:
                if not answer.ranged or answer.origin.resumable:
                    self._begin(answer)
                    return
        except ContentChanged:
            pass  # an empty file has no ranges
        with self._remote.open(self._want.file) as answer:
            self._begin(answer)

    def _begin(self, answer: Response) -> None:
        """Hold the first bytes against what is wanted, then make the part of this file."""
        part, want, origin = self._part, self._want, answer.origin
        if answer.content_type.startswith("text/html"):
            raise self._page()
        if want.bytes is not None and origin.total not in (None, want.bytes):
            raise UserError(
                f"{self._url}: has {origin.total} bytes, but {want.setting}.bytes is {want.bytes}"
                f"{self._source.tail}"
            )
        first = b""
        while len(first) < BLOCK and (data := answer.read(READ)):
            first += data
        if origin.total is not None and len(first) < min(BLOCK, origin.total):
            raise TransientError("the connection ended early")
        check_first_bytes(first, want, self._url, self._source.hint)
        disk.require_free_space(
            part.target.parent, (origin.total or want.bytes or 0) - allocated_bytes(part.target), want.file
        )
        part.begin(origin)
        at = self._came(0, first)
        while data := answer.read(self._source.pace.chunk_size(READ)):
            self._source.pace.consume(len(data))
            at = self._came(at, data)
            self._progress(at)
            part.save(when_due=True)
        if not answer.ranged and origin.total is None:
            part.is_all()
        elif not answer.ranged and at < (origin.total or 0):
            raise TransientError("the connection ended early")

    def _ranges(self, origin: Origin) -> None:
        """Fetch all that is missing, over several connections."""
        part, source = self._part, self._source
        disk.require_free_space(
            part.target.parent, (origin.total or 0) - allocated_bytes(part.target), self._want.file
        )
        ranges = RangeScheduler(part, source.connections)
        threads = [
            threading.Thread(target=self._work, args=(ranges, origin, n), name=f"range-{n}", daemon=True)
            for n in range(source.connections)
        ]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                alive[0].join(0.05)
                if ranges.stopped.is_set():
                    break
                self._progress(part.size)
                part.save(when_due=True)
        finally:
            ranges.stop()
            with self._lock:
                for answer in self._answers:
                    answer.close()
            for thread in threads:
                thread.join()
        if ranges.error is not None:
            raise ranges.error

    def _work(self, ranges: RangeScheduler, origin: Origin, number: int) -> None:
        """Be one connection: fetch one range after the other until none is left."""
        sleep = self._source.sleep or ranges.stopped.wait
        tries = self._source.tries(self._want.file, lambda: self._part.size, sleep)
        size = None if self._source.connections == 1 else LEAST
        failures = 0  # of this connection, since its last byte
        try:
            while claim := ranges.take(size):
                until, whom = self._quiet
                if whom != number and until > time.monotonic():
                    sleep(until - time.monotonic())
                broken = None
                try:
                    best = self._range(origin, claim, ranges)
                    size = None if size is None else min(MOST, max(LEAST, best))
                    failures = 0
                except TransientError as error:
                    broken = error
                finally:
                    ranges.release(claim)
                if broken is None or ranges.stopped.is_set():
                    continue
                failures = 1 if claim.at > claim.begin else failures + 1
                if broken.wait is not None:
                    self._quiet = (time.monotonic() + min(LONGEST_ASKED, broken.wait), number)
                tries.wait_or_raise(broken)
                if failures >= TOO_MANY and not tries.failures and ranges.retire_connection():
                    log.warning("%s: goes on with %d connections", self._url, ranges.workers)
                    return
        except BaseException as error:
            ranges.stop(error)

    def _range(self, origin: Origin, claim: RangeClaim, ranges: RangeScheduler) -> int:
        """Fetch a claim; return how many bytes a range should have at this server."""
        asked = time.monotonic()
        pace = self._source.pace
        with self._remote.open(self._want.file, claim.begin, claim.end, origin) as answer:
            if not answer.ranged:
                raise self._no_range(answer, origin)
            with self._lock:
                self._answers.add(answer)
            try:
                first = since = time.monotonic()
                reading, brought = 0.0, 0
                while claim.at < claim.end and not ranges.stopped.is_set():
                    data = answer.read(min(pace.chunk_size(READ), claim.end - claim.at))
                    if not data:
                        if answer.end is not None and claim.at >= answer.end:
                            break  # it gave less than was asked for, and said so
                        raise TransientError("the connection ended early")
                    moment = time.monotonic()
                    reading, brought = reading + moment - since, brought + len(data)
                    if reading > self._source.timeout:
                        if brought < SLOWEST * reading:
                            raise TransientError(f"brought {brought} bytes in {reading:.0f} s")
                        reading, brought = 0.0, 0
                    with self._part.changed:  # an idle connection may have taken the rest
                        data = data[: max(0, claim.end - claim.at)]
                    claim.at = self._came(claim.at, data)
                    pace.consume(len(data))
                    since = time.monotonic()
            finally:
                with self._lock:
                    self._answers.discard(answer)
        rate = (claim.at - claim.begin) / max(1e-6, time.monotonic() - first)
        return int(WORTH * (first - asked) * rate)

    def _came(self, at: int, data: bytes) -> int:
        self._part.write(at, data)
        with self._lock:
            self._fetched += len(data)
        return at + len(data)

    def _no_range(self, answer: Response, origin: Origin) -> Exception:
        """Return what it means that the whole file comes where a range was asked for."""
        if answer.content_type.startswith("text/html") or is_html(answer.read(BLOCK)):
            return self._page()
        if not origin.same(answer.origin):
            return ContentChanged("the file has changed on the server")
        return ContentChanged("the server cannot resume")

    def _page(self) -> UserError:
        return UserError(
            f"{self._url} is an HTML page, not an archive: a login or an error page?{self._source.tail}"
        )

    def _refusal(self, status: int) -> UserError:
        check = f"check dataset.source and {self._want.setting}.file={self._want.file}"
        why = {
            401: "needs a login: docs/data.md says how to give one",
            403: "is forbidden: are the terms accepted, the login done?",
            404: f"does not exist: {check}",
            410: f"is gone: {check}",
        }.get(status, "cannot be had")
        return UserError(f"{self._url} {why} (status {status}){self._source.tail}")


def _why(origin: Origin | None) -> str:
    if origin is not None and origin.validator is None:
        return "the server gives no ETag or date to resume by"
    return "the server cannot resume"
