"""Logins for sites that ask for one: a cookie, a header, or a netrc.

A secret stands in the environment or in a file that only its owner can read. It goes into the requests to the
host of dataset.source and nowhere else: no config, note, log or error has it.
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

log = logging.getLogger(__name__)

COOKIE = "HPC_IMAGENET_COOKIE"  # the value of the header Cookie
HEADER = "HPC_IMAGENET_HEADER"  # a whole header, such as `Authorization: Bearer …`
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]+)")
_NETRC = re.compile(r"\s*(machine|default)\s", re.MULTILINE)


class HttpCredentials:
    """What a site wants to know of who asks.

    Args:
        prefix: dataset.source: its host gets the login.
        path: download.login: a file of mode 600 that holds cookies (as browsers export them), a netrc or
            headers; None for the environment, else ~/.netrc.

    Raises:
        UserError: others may read the file, or it holds none of these.
    """

    def __init__(self, prefix: str, path: str | None = None) -> None:
        self._headers: dict[str, str] = {}
        self._jar: http.cookiejar.MozillaCookieJar | None = None
        host = urllib.parse.urlsplit(prefix).hostname or ""
        if path is not None:
            self._from_file(Path(path).expanduser(), host)
        elif os.environ.get(COOKIE) or os.environ.get(HEADER):
            if cookie := os.environ.get(COOKIE):
                self._headers |= _header(f"Cookie: {cookie}", f"the environment's {COOKIE}")
            if header := os.environ.get(HEADER):
                self._headers |= _header(header, f"the environment's {HEADER}")
        else:
            usual = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
            if usual.is_file() and _names(usual, host):
                self._from_file(usual, host)
        if (self._headers or self._jar is not None) and prefix.startswith("http:"):
            log.warning("%s: the login goes over the network as it is: https:// would hide it", prefix)

    def headers(self, url: str) -> dict[str, str]:
        """Return the headers to send with a request for `url`."""
        if self._jar is None:
            return dict(self._headers)
        request = urllib.request.Request(url)
        self._jar.add_cookie_header(request)
        cookie = request.get_header("Cookie")
        return {"Cookie": cookie} if cookie else {}

    def _from_file(self, path: Path, host: str) -> None:
        text = _read(path)
        if text.startswith(("# Netscape HTTP Cookie File", "# HTTP Cookie File")):
            self._jar = _cookies(path)
        elif _NETRC.match(_without_comments(text)):
            try:
                found = netrc.netrc(str(path)).authenticators(host)
            except (netrc.NetrcParseError, OSError):
                raise UserError(f"{path}: a netrc that cannot be read") from None
            if found is None:
                raise UserError(f"{path}: a netrc without a line for {host}")
            pair = base64.b64encode(f"{found[0]}:{found[2] or ''}".encode()).decode()
            self._headers = {"Authorization": f"Basic {pair}"}
        else:
            for line in _without_comments(text).splitlines():
                if line.strip():
                    self._headers |= _header(line.strip(), f"download.login={path}")
            if not self._headers:
                raise UserError(f"download.login={path} is empty: headers, a netrc or cookies make a login")


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise UserError(f"{path} holds a login and others may read it (mode {mode:o}): chmod 600 {path}")
        return path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"download.login={path} cannot be read ({error.strerror})") from None


def _cookies(path: Path) -> http.cookiejar.MozillaCookieJar:
    jar = http.cookiejar.MozillaCookieJar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of a bad line by a traceback
            jar.load(str(path), ignore_discard=True, ignore_expires=True)
    except (http.cookiejar.LoadError, OSError):
        raise UserError(f"download.login={path}: a file of cookies that cannot be read") from None
    for cookie in jar:
        # Browsers write 0 for those that end with the session, which ours has only begun.
        cookie.expires = cookie.expires or None
    return jar


def _names(path: Path, host: str) -> bool:
    """Whether a netrc speaks of a host, so that a file which does not need not be private."""
    try:
        words = path.read_text(errors="replace").split()
    except OSError:
        return False
    return ("machine", host) in itertools.pairwise(words)


def _header(line: str, where: str) -> dict[str, str]:
    # What cannot be sent is not shown either: it is a secret.
    match = _HEADER.fullmatch(line)
    if not match:
        raise UserError(f"{where} is no header of the form NAME: VALUE, in printable ASCII")
    return {match[1]: match[2]}


def _without_comments(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
