"""Credentials for HTTP servers: cookies, headers or a netrc.

The secret is in the environment or in a file that only its owner can read. It is sent to the host of
dataset.source only, and appears in no config, state file, log or error.
"""

from __future__ import annotations

import base64
import http.cookiejar
import itertools
import logging
import netrc
import os
import re
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home, read_private

log = logging.getLogger(__name__)

COOKIE = "HPC_IMAGENET_COOKIE"  # environment variable with the value of the header Cookie
HEADER = "HPC_IMAGENET_HEADER"  # environment variable with a full header: `Authorization: Bearer …`
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]+)")
_NETRC = re.compile(r"\s*(machine|default)\s")


class HttpCredentials:
    """Headers that authenticate requests to the host of a URL prefix.

    Args:
        prefix: dataset.source.
        path: download.login: a file of mode 600 with cookies (as browsers export them), a netrc or headers;
            None for the environment, else ~/.netrc.

    Raises:
        UserError: other users may read the file, or its content is none of these.
    """

    def __init__(self, prefix: str, path: str | None = None) -> None:
        self._headers: dict[str, str] = {}
        self._jar: http.cookiejar.MozillaCookieJar | None = None
        host = urllib.parse.urlsplit(prefix).hostname or ""
        if path is not None:
            self._load_file(expand_home(path), host)
        elif os.environ.get(COOKIE) or os.environ.get(HEADER):
            if cookie := os.environ.get(COOKIE):
                self._headers |= _parse_header(f"Cookie: {cookie}", f"the environment variable {COOKIE}")
            if header := os.environ.get(HEADER):
                self._headers |= _parse_header(header, f"the environment variable {HEADER}")
        else:
            # Without a home folder there is no such file, which is no error.
            default_path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))  # noqa: PTH111
            if default_path.is_file() and _netrc_has_host(default_path, host):
                self._load_file(default_path, host)
        if (self._headers or self._jar is not None) and prefix.startswith("http:"):
            log.warning("%s: the login is sent unencrypted; use https:// if the server supports it", prefix)

    def headers(self, url: str) -> dict[str, str]:
        """Return the headers for a request of `url`."""
        if self._jar is None:
            return dict(self._headers)
        request = urllib.request.Request(url)
        self._jar.add_cookie_header(request)
        cookie = request.get_header("Cookie")
        return {"Cookie": cookie} if cookie else {}

    def _load_file(self, path: Path, host: str) -> None:
        text = read_private(path, "download.login")
        if text.startswith(("# Netscape HTTP Cookie File", "# HTTP Cookie File")):
            self._jar = _load_cookies(path)
        elif _NETRC.match(_without_comments(text)):
            try:
                entry = netrc.netrc(str(path)).authenticators(host)
            except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
                raise UserError(
                    f"{path}: not a valid netrc; its lines are, in UTF-8: machine HOST login NAME password "
                    "PASSWORD"
                ) from None
            if entry is None:
                raise UserError(
                    f"{path}: a netrc without an entry for {host}; add one: "
                    f"machine {host} login NAME password PASSWORD"
                )
            pair = base64.b64encode(f"{entry[0]}:{entry[2] or ''}".encode()).decode()
            self._headers = {"Authorization": f"Basic {pair}"}
        else:
            for line in _without_comments(text).splitlines():
                if line.strip():
                    self._headers |= _parse_header(line.strip(), f"download.login={path}")
            if not self._headers:
                raise UserError(f"download.login={path} is empty; write headers, a netrc or cookies to it")


def _load_cookies(path: Path) -> http.cookiejar.MozillaCookieJar:
    jar = http.cookiejar.MozillaCookieJar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of an invalid line with a traceback
            jar.load(str(path), ignore_discard=True, ignore_expires=True)
    except (http.cookiejar.LoadError, OSError, UnicodeDecodeError):
        raise UserError(
            f"download.login={path}: not a valid cookie file; export the cookies in Netscape's format, in "
            "UTF-8"
        ) from None
    for cookie in jar:
        # Browsers write 0 for session cookies, which a cookie jar takes for expired ones.
        cookie.expires = cookie.expires or None
    return jar


def _netrc_has_host(path: Path, host: str) -> bool:
    """Whether a netrc has an entry for a host; if not, the file need not be private."""
    try:
        tokens = path.read_text(errors="replace").split()
    except OSError:
        return False
    return ("machine", host) in itertools.pairwise(tokens)


def _parse_header(line: str, origin: str) -> dict[str, str]:
    match = _HEADER.fullmatch(line)
    if not match:  # the line is not shown: it may be the secret
        raise UserError(f"{origin}: not a header; write NAME: VALUE, in printable ASCII")
    return {match[1]: match[2]}


def _without_comments(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
