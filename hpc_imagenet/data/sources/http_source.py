"""A URL prefix as a source: HTTP(S) through urllib3 and the environment's proxy.

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

MAX_REDIRECTS = 5


class HttpSource:
    """Files under a URL prefix; a `RangeSource`.

    Args:
        prefix: dataset.source.
        timeout: seconds without a byte after which a connection counts as broken.
        connections: size of the connection pool.
        login: credentials, sent to the host of the prefix only.
    """

    def __init__(self, prefix: str, timeout: float, connections: int, login: HttpCredentials) -> None:
        self.prefix = prefix
        self.reached = False
        self._login = login
        self._pool = _connection_pool(prefix, timeout, connections)

    def url(self, file: str) -> str:
        """Return the URL of a file."""
        return f"{self.prefix.rstrip('/')}/{urllib.parse.quote(file)}"

    def size(self, file: str) -> int | None:
        """Return the size of a file in bytes by HEAD; None if the server does not report it."""
        with self._request("HEAD", file, {}) as response:
            return _content_length(response) if response.status == 200 else None

    @contextlib.contextmanager
    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> Iterator[_HttpResponse]:
        """Request bytes [begin, end) of a file; see `RangeSource.open`."""
        headers = {}
        if end is not None:
            headers["Range"] = f"bytes={begin}-{end - 1}"
            if origin and origin.validator:
                headers["If-Range"] = origin.validator
        with self._request("GET", file, headers) as raw:
            status = raw.status
            if status == 416:
                raise ContentChanged("the file on the server has become shorter")
            if status not in (200, 206):
                if status in (408, 425, 429) or status >= 500:
                    raise TransientError(f"the server responded with status {status}", _retry_after(raw))
                raise NotAvailable(status)
            response = _HttpResponse(raw, self.url(file))
            if status == 206:
                if response.begin != begin:
                    raise TransientError("the server sent another range than requested")
                # Some servers support ranges but ignore If-Range.
                if origin and not origin.matches(response.origin):
                    raise ContentChanged("the file has changed on the server")
            yield response
            # A connection is reused only if no more bytes can arrive on it, according to both headers.
            if response.consistent_length and raw.length_remaining == 0:
                raw.release_conn()

    @contextlib.contextmanager
    def _request(self, method: str, file: str, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Send a request; convert transient failures to TransientError and permanent ones to UserError."""
        url = self.url(file)
        login = self._login.headers(url)
        try:
            # identity: ranges and sizes refer to the file itself, not to a compressed form of it.
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
                    redirect=MAX_REDIRECTS,
                    respect_retry_after_header=False,
                    # A redirect to another host must not take the login there.
                    remove_headers_on_redirect=["Authorization", "Cookie", *login],
                ),
            )
        except (LocationValueError, ValueError) as error:  # ValueError: of urllib.parse, for a redirect
            raise UserError(
                f"dataset.source={self.prefix}: not a valid URL, or a redirect to none ({error}); write "
                "https://HOST/FOLDER"
            ) from None
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            if isinstance(reason, ResponseError) or "CERTIFICATE_VERIFY_FAILED" in str(reason):
                raise UserError(f"{url}: {reason}") from None
            raise TransientError(_error_reason(reason)) from None
        self.reached = True
        try:
            yield response
        except HTTPError as error:
            raise TransientError(_error_reason(error)) from None
        finally:
            response.close()


class _HttpResponse:
    """The body of a response; a `Response`.

    Attributes:
        begin: offset of the first byte; None if unknown.
        consistent_length: whether Content-Range and Content-Length agree.
    """

    def __init__(self, response: BaseHTTPResponse, url: str) -> None:
        self._response = response
        number = "([0-9]{1,18})"
        content_range = re.fullmatch(
            rf"bytes {number}-{number}/([0-9]{{1,18}}|\*)",
            response.headers.get("Content-Range", "").strip(),
        )
        self.ranged = response.status == 206
        self.content_type = response.headers.get("Content-Type", "")
        self.begin: int | None = 0
        self.end = total = length = _content_length(response)
        if self.ranged:
            self.begin, self.end = (
                (int(content_range[1]), int(content_range[2]) + 1) if content_range else (None, None)
            )
            total = int(content_range[3]) if content_range and content_range[3] != "*" else None
        self.consistent_length = not self.ranged or (self.end or 0) - (self.begin or 0) == length
        etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        self.origin = Origin(url, etag, modified, total, self.ranged)

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; b"" at the end."""
        try:
            return self._response.read1(size, decode_content=False) or b""
        except HTTPError as error:
            raise TransientError(_error_reason(error)) from None

    def close(self) -> None:
        """Shut down the reading side, which ends a blocked read in another thread."""
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._response.shutdown()


def _connection_pool(prefix: str, timeout: float, connections: int) -> urllib3.PoolManager:
    """Return a connection pool that uses the environment's proxy, except for loopback addresses.

    Raises:
        UserError: the proxy is not valid; its URL is not shown, as it may hold a password.
    """
    timeouts = urllib3.Timeout(connect=timeout, read=timeout)
    parts = urllib.parse.urlsplit(prefix)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or _is_loopback(host) or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager(timeout=timeouts, maxsize=connections)
    if "://" not in proxy:  # as curl and wget take it
        proxy = f"http://{proxy}"
    try:
        login = urllib.parse.urlsplit(proxy)
        headers = None
        if login.username:
            pair = f"{urllib.parse.unquote(login.username)}:{urllib.parse.unquote(login.password or '')}"
            headers = urllib3.make_headers(proxy_basic_auth=pair)
        return urllib3.ProxyManager(proxy, timeout=timeouts, maxsize=connections, proxy_headers=headers)
    except (HTTPError, ValueError):
        raise UserError(
            f"the environment variable {parts.scheme}_proxy is not a proxy that can be used; set it to "
            "http://HOST:PORT, with % escapes in a password"
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _content_length(response: BaseHTTPResponse) -> int | None:
    return _number(response.headers.get("Content-Length", ""))


def _number(text: str) -> int | None:
    """Return a number of ASCII digits below 10**18; None for anything else, such as `²` or 5,000 digits."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _retry_after(response: BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    if (seconds := _number(value)) is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _error_reason(error: BaseException) -> str:
    """Return the short reason at the end of a urllib3 error."""
    text = str(error)
    if "BadStatusLine" in text:
        return "the response is not HTTP"
    if "IncompleteRead" in text:
        return "the connection ended early"
    return text[text.find("[Errno") :].strip("()'\" ") if "[Errno" in text else text.rsplit(": ", 1)[-1]
