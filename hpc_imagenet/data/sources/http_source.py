"""A URL prefix as a remote: HTTP(S) by urllib3, through the environment's proxy.

Sources: RFC 9110, urllib3's user guide.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator

import urllib3
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError, ResponseError

from hpc_imagenet import __version__
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.range_source import ContentChanged, NotAvailable, Origin, TransientError
from hpc_imagenet.errors import UserError

REDIRECTS = 5


class HttpSource:
    """A URL prefix.

    Args:
        prefix: dataset.source.
        timeout: s without a byte after which a connection counts as broken.
        connections: how many are kept open.
        login: what is sent to the host of the prefix, and to no other.
    """

    def __init__(self, prefix: str, timeout: float, connections: int, login: HttpCredentials) -> None:
        self.prefix = prefix
        self.reached = False
        self._login = login
        self._pool = _pool(prefix, timeout, connections)

    def url(self, file: str) -> str:
        """Return the URL of a file."""
        return f"{self.prefix.rstrip('/')}/{urllib.parse.quote(file)}"

    def size(self, file: str) -> int | None:
        """Return the bytes of a file by HEAD; None where the server does not say."""
        with self._open("HEAD", file, {}) as response:
            return _length(response) if response.status == 200 else None

    @contextlib.contextmanager
    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> Iterator[_HttpResponse]:
        """Ask for bytes [begin, end) of a file; see `remote.Remote`."""
        headers = {}
        if end is not None:
            headers["Range"] = f"bytes={begin}-{end - 1}"
            if origin and origin.validator:
                headers["If-Range"] = origin.validator
        with self._open("GET", file, headers) as response:
            status = response.status
            if status == 416:
                raise ContentChanged("the file has fewer bytes on the server than before")
            if status not in (200, 206):
                if status in (408, 425, 429) or status >= 500:
                    raise TransientError(f"the server answers {status}", _retry_after(response))
                raise NotAvailable(status)
            answer = _HttpResponse(response, self.url(file))
            if status == 206:
                if answer.begin != begin:
                    raise TransientError("the server gave another range than was asked for")
                # Some servers know ranges but not If-Range.
                if origin and not origin.same(answer.origin):
                    raise ContentChanged("the file has changed on the server")
            yield answer
            # Used again is a connection that has nothing more on its way, if the server tells the truth.
            if answer.exact and response.length_remaining == 0:
                response.release_conn()

    @contextlib.contextmanager
    def _open(self, method: str, file: str, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Send a request; tell what may do better later from what will not."""
        url = self.url(file)
        login = self._login.headers(url)
        try:
            # identity: ranges and sizes are of the file, not of a compressed form of it.
            response = self._pool.request(
                method,
                url,
                headers={
                    "User-Agent": f"hpc-imagenet/{__version__}",
                    "Accept-Encoding": "identity",
                    **headers,
                    **login,
                },
                preload_content=False,
                retries=urllib3.Retry(
                    total=None,
                    connect=0,
                    read=0,
                    other=0,
                    status=0,
                    redirect=REDIRECTS,
                    respect_retry_after_header=False,
                    # Who redirects us elsewhere does not get our login there.
                    remove_headers_on_redirect=["Authorization", "Cookie", *login],
                ),
            )
        except LocationValueError as error:
            raise UserError(
                f"dataset.source={self.prefix} is not a URL that can be asked ({error})"
            ) from None
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            if isinstance(reason, ResponseError) or "CERTIFICATE_VERIFY_FAILED" in str(reason):
                raise UserError(f"{url}: {reason}") from None
            raise TransientError(_words(reason)) from None
        self.reached = True
        try:
            yield response
        except HTTPError as error:
            raise TransientError(_words(error)) from None
        finally:
            response.close()


class _HttpResponse:
    """The body of a response."""

    def __init__(self, response: BaseHTTPResponse, url: str) -> None:
        self._response = response
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        self.ranged = response.status == 206
        self.content_type = response.headers.get("Content-Type", "")
        self.begin: int | None = 0
        self.end = total = length = _length(response)
        if self.ranged:
            self.begin, self.end = (int(said[1]), int(said[2]) + 1) if said else (None, None)
            total = int(said[3]) if said and said[3] != "*" else None
        self.exact = not self.ranged or (self.end or 0) - (self.begin or 0) == length
        etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        self.origin = Origin(url, etag, modified, total, self.ranged)

    def read(self, most: int) -> bytes:
        """Return the next bytes; none at the end."""
        try:
            return self._response.read1(most, decode_content=False) or b""
        except HTTPError as error:
            raise TransientError(_words(error)) from None

    def close(self) -> None:
        """Close the reading side: a thread that waits for bytes gets none."""
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._response.shutdown()


def _pool(prefix: str, timeout: float, connections: int) -> urllib3.PoolManager:
    """Return a pool that goes through the environment's proxy, but never to this machine through one."""
    limits = urllib3.Timeout(connect=timeout, read=timeout)
    parts = urllib.parse.urlsplit(prefix)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or _is_loopback(host) or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager(timeout=limits, maxsize=connections)
    login = urllib.parse.urlsplit(proxy)
    headers = None
    if login.username:
        pair = f"{urllib.parse.unquote(login.username)}:{urllib.parse.unquote(login.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=pair)
    return urllib3.ProxyManager(proxy, timeout=limits, maxsize=connections, proxy_headers=headers)


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


def _retry_after(response: BaseHTTPResponse) -> float | None:
    said = response.headers.get("Retry-After", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


def _words(error: BaseException) -> str:
    """Return the end of urllib3's message: what the system said."""
    text = str(error)
    if "BadStatusLine" in text:
        return "the answer is no HTTP"
    if "IncompleteRead" in text:
        return "the connection ended early"
    return text[text.find("[Errno") :].strip("()'\" ") if "[Errno" in text else text.rsplit(": ", 1)[-1]
