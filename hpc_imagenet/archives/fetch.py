"""Fetch archives over HTTP(S): resumed, retried, verified while they are written.

What is done about a bad server is in `Http._attempt` (one request) and `Http._fill` (when to ask again).
Sources: RFC 9110 (ranges, If-Range, Retry-After), urllib3's user guide.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import logging
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import urllib3
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError, ResponseError

from hpc_imagenet import __version__
from hpc_imagenet.archives import receipt, space
from hpc_imagenet.archives.part import Origin, Part
from hpc_imagenet.archives.sniff import is_html
from hpc_imagenet.archives.tar import BLOCK
from hpc_imagenet.archives.wanted import Wanted, check_first, check_whole, set_aside
from hpc_imagenet.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 18  # bytes a read from the network: what a kill can cost
LONGEST_WAIT = 60.0  # s between tries, unless the server asks for more
LONGEST_ASKED = 3600.0  # s that a server may ask for
FIRST_TRIES = 3  # to reach a server that was not reached yet
TEXT_LIMIT = 1 << 20  # bytes of a small text file


class _BrokenError(Exception):
    """A try that failed and may do better later; `wait` is what the server asked for, in s."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Http:
    """A URL prefix that holds archives.

    Args:
        prefix: dataset.source; receipts call it so.
        retries: tries in a row without a new byte before giving up.
        timeout: s without a byte after which a connection counts as broken.
        hint: the dataset's, shown behind an error.
        sleep: what waits between tries.
    """

    def __init__(
        self,
        prefix: str,
        retries: int,
        timeout: float,
        hint: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.prefix = prefix
        self._retries = retries
        self._tail = f"; {hint}" if hint else ""
        self._sleep = sleep
        self._reached = False
        self._pool = _pool(prefix, timeout)

    def text(self, file: str) -> str | None:
        """Return a small text file, or None where the server has none to give.

        Raises:
            UserError: the server cannot be reached.
        """
        found: list[bytes] = []

        def attempt() -> None:
            found.clear()
            with self._open("GET", file, {}) as response:
                # Some object stores answer 403 for what does not exist.
                if response.status not in (401, 403, 404, 410):
                    self._check_status(response, file, f"dataset.source={self.prefix}")
                    found.append(response.read(TEXT_LIMIT, decode_content=True))

        self._retrying(attempt, self._url(file), lambda: 0)
        if not found or is_html(found[0]):
            return None
        return found[0].decode("utf-8", "replace")

    def size(self, want: Wanted) -> int | None:
        """Return how many bytes an archive has, as far as the server says so. For the progress only."""
        try:
            with self._open("HEAD", want.file, {}) as response:
                return _length(response) if response.status == 200 else None
        except _BrokenError:
            return None

    def fetch(self, want: Wanted, target: Path, progress: Callable[[int], None]) -> int:
        """Bring an archive to `target`, whole, verified and with its receipt.

        Args:
            want: what it must be.
            target: its final place; `<target>.part` until it is whole.
            progress: told how many bytes of it are there.

        Returns:
            bytes that came over the network.

        Raises:
            UserError: it cannot be had, or what came is not what is wanted.
        """
        with Part(target) as part, space.telling_full(target.parent):
            if part.origin and part.origin.url != self._url(want.file):
                log.warning("%s: begins anew: its first bytes are from %s", target, part.origin.url)
                part.clear()
            part.hash_earlier(progress)
            fetched = self._fill(part, want, progress)
            md5, stat = part.finish()
            try:
                check_whole(part.path, want, md5, self._url(want.file))
            except UserError as error:
                part.forget()
                raise set_aside(part.path, target, error) from None
            receipt.write(target, md5, self.prefix, want.vouched, stat)
            part.become_whole()
        return fetched

    def _fill(self, part: Part, want: Wanted, progress: Callable[[int], None]) -> int:
        fetched = 0

        def attempt() -> None:
            nonlocal fetched
            for size in self._attempt(part, want):
                fetched += size
                progress(part.size)

        if not part.whole:
            self._retrying(attempt, self._url(want.file), lambda: part.size)
        return fetched

    def _retrying(self, attempt: Callable[[], None], url: str, size: Callable[[], int]) -> None:
        """Try until it is done or `retries` tries in a row have brought no byte that was not there before."""
        best, failures = size(), 0
        while True:
            try:
                return attempt()
            except _BrokenError as error:
                # A server that begins anew each time makes progress only beyond the furthest byte so far.
                failures = 0 if size() > best else failures + 1
                best = max(best, size())
                limit = self._retries if self._reached else min(self._retries, FIRST_TRIES - 1)
                if failures > limit:
                    raise UserError(
                        f"{url}: {error}, {failures} tries in a row (dataset.source, download.retries)"
                        f"{self._tail}"
                    ) from None
                wait = min(LONGEST_WAIT, 2.0 ** max(0, failures - 1))
                if error.wait is not None:
                    wait = min(LONGEST_ASKED, error.wait)
                log.warning("%s: %s at byte %d; again in %.0f s", url, error, size(), wait)
                self._sleep(wait)

    def _attempt(self, part: Part, want: Wanted) -> Iterator[int]:
        """Make one request and append what it brings, yielding the size of each piece."""
        headers = {}
        if part.origin and part.origin.validator:
            headers = {"Range": f"bytes={part.size}-", "If-Range": part.origin.validator}
        with self._open("GET", want.file, headers) as response:
            if response.status == 206 and part.origin:
                if _range(response) != (part.size, part.origin.total):
                    part.clear()
                    raise _BrokenError("answered with another range than was asked for; beginning anew")
                # Some servers know ranges but not If-Range.
                if response.headers.get("ETag", part.origin.etag) != part.origin.etag:
                    part.clear()
                    raise _BrokenError("the file has changed on the server; beginning anew")
                space.require(part.target.parent, (part.origin.total or 0) - part.size, want.file)
            elif response.status == 416 and part.size:
                # It promised more than it has: all of it is here, and is verified next.
                if response.headers.get("Content-Range") == f"bytes */{part.size}":
                    return
                part.clear()
                raise _BrokenError("has fewer bytes than it had before; beginning anew")
            else:
                self._check_status(response, want.file, f"{want.setting}.file={want.file}")
                yield self._begin(response, part, want)
            while chunk := response.read1(CHUNK, decode_content=False):
                part.append(chunk)
                yield len(chunk)
        total = part.origin.total if part.origin else None
        if total is not None and part.size < total:
            raise _BrokenError("the connection ended early")

    def _begin(self, response: BaseHTTPResponse, part: Part, want: Wanted) -> int:
        """Look at the answer that begins with byte 0, then make it the part; return the bytes written."""
        url = self._url(want.file)
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise UserError(f"{url} is an HTML page, not an archive: a login or an error page?{self._tail}")
        origin = Origin(
            url, response.headers.get("ETag"), response.headers.get("Last-Modified"), _length(response)
        )
        if want.bytes is not None and origin.total not in (None, want.bytes):
            raise UserError(
                f"{url}: has {origin.total} bytes, but {want.setting}.bytes is {want.bytes}{self._tail}"
            )
        first = b""
        while len(first) < BLOCK and (chunk := response.read1(CHUNK, decode_content=False)):
            first += chunk
        if origin.total is not None and len(first) < min(BLOCK, origin.total):
            raise _BrokenError("the connection ended early")
        check_first(first, want, url, self._tail.removeprefix("; "))
        space.require(part.target.parent, (origin.total or want.bytes or 0) - part.size, want.file)
        if part.origin:
            log.warning(
                "%s: %s; beginning anew, %d bytes are lost", url, _why_anew(part.origin, origin), part.size
            )
        part.begin(origin)
        part.append(first)
        return len(first)

    @contextlib.contextmanager
    def _open(self, method: str, file: str, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Send a request; tell what may do better later from what will not."""
        url = self._url(file)
        try:
            # identity: ranges and sizes are of the file, not of a compressed form of it.
            response = self._pool.request(
                method,
                url,
                headers={
                    "User-Agent": f"hpc-imagenet/{__version__}",
                    "Accept-Encoding": "identity",
                    **headers,
                },
                preload_content=False,
                retries=urllib3.Retry(
                    total=None,
                    connect=0,
                    read=0,
                    other=0,
                    status=0,
                    redirect=5,
                    respect_retry_after_header=False,
                ),
            )
        except LocationValueError as error:
            raise UserError(
                f"dataset.source={self.prefix} is not a URL that can be asked ({error})"
            ) from None
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            if isinstance(reason, ResponseError) or "CERTIFICATE_VERIFY_FAILED" in str(reason):
                raise UserError(f"{url}: {reason}{self._tail}") from None
            raise _BrokenError(_words(reason)) from None
        self._reached = True
        try:
            yield response
        except HTTPError as error:
            raise _BrokenError(_words(error)) from None
        finally:
            response.close()

    def _check_status(self, response: BaseHTTPResponse, file: str, setting: str) -> None:
        status = response.status
        if status == 200:
            return
        if status in (408, 425, 429) or status >= 500:
            raise _BrokenError(f"the server answers {status}", _retry_after(response))
        why = {
            401: "needs a login",
            403: "is forbidden: are the terms accepted, the login done?",
            404: f"does not exist: check dataset.source and {setting}",
            410: f"is gone: check dataset.source and {setting}",
        }.get(status, "cannot be had")
        raise UserError(f"{self._url(file)} {why} (status {status}){self._tail}")

    def _url(self, file: str) -> str:
        return f"{self.prefix.rstrip('/')}/{urllib.parse.quote(file)}"


def _pool(prefix: str, timeout: float) -> urllib3.PoolManager:
    """Return a pool that goes through the environment's proxy, but never to this machine through one."""
    limits = urllib3.Timeout(connect=timeout, read=timeout)
    parts = urllib.parse.urlsplit(prefix)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or _is_loopback(host) or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager(timeout=limits)
    login = urllib.parse.urlsplit(proxy)
    headers = None
    if login.username:
        pair = f"{urllib.parse.unquote(login.username)}:{urllib.parse.unquote(login.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=pair)
    return urllib3.ProxyManager(proxy, timeout=limits, proxy_headers=headers)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _length(response: BaseHTTPResponse) -> int | None:
    said = response.headers.get("Content-Length", "")
    return int(said) if said.isdigit() else None


def _range(response: BaseHTTPResponse) -> tuple[int, int | None] | None:
    """Return (first byte, bytes in total) of a 206, or None where it does not say."""
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
    return (int(said[1]), int(said[2])) if said else None


def _retry_after(response: BaseHTTPResponse) -> float | None:
    said = response.headers.get("Retry-After", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


def _why_anew(before: Origin, now: Origin) -> str:
    if before.validator is None:
        return "the server gives no ETag or date to resume by"
    if before.validator != now.validator:
        return "the file has changed on the server"
    return "the server cannot resume"


def _words(error: BaseException) -> str:
    """Return the end of urllib3's message: what the system said."""
    text = str(error)
    if "IncompleteRead" in text:
        return "the connection ended early"
    return text[text.find("[Errno") :].strip("()'\" ") if "[Errno" in text else text.rsplit(": ", 1)[-1]
