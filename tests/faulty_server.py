"""An HTTP server with configurable faults: `with serving(folder, faulty(Faults(…))) as url`."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from hpc_imagenet.demo.http_server import Handler, serving

__all__ = ["Faults", "faulty", "serving"]

LOGIN_PAGE = b"<!DOCTYPE html>\n<html><title>Log in</title></html>" + b" " * 600


@dataclass
class Faults:
    """Faults of the server and counters of its requests.

    Of each list, one item is consumed per GET; after the last one that fault no longer occurs.
    """

    drops: list[int] = field(default_factory=list)  # bytes of a body before the connection is broken
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # (status, headers)
    etags: list[str] = field(default_factory=list)  # the last one is kept
    ranges: bool = True  # False: Range is ignored
    if_range: bool = True  # False: If-Range is ignored
    validators: bool = True  # False: neither ETag nor Last-Modified is sent
    length: bool = True  # False: no Content-Length; the file ends with the connection
    length_error: int = 0  # bytes added to the Content-Length
    html: str = ""  # "typed": a login page; "untyped": the same, sent as application/octet-stream
    pause: float = 0.0  # s before each chunk
    chunk_size: int = 1 << 16  # bytes
    stalls: list[float] = field(default_factory=list)  # s of delay before a body
    max_concurrent: int = 1000  # GETs; further ones are answered with 503
    redirect: str = ""  # URL prefix that every request is redirected to
    only: str = ".tar"  # only requests whose path contains this have faults
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, path, Range)
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request
    sent: int = 0  # bytes of bodies, approximate: updated without a lock
    concurrent: int = 0  # GETs being answered
    peak_concurrent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def faulty(faults: Faults) -> type[Handler]:
    """Return a request handler with the given faults."""

    class Faulty(Handler):
        _stall: float
        _drop: int | None
        _etag: str | None

        def _is_faulty(self) -> bool:
            return faults.only in self.path and self.command == "GET"

        def _answer(self, body: bool) -> None:
            faults.requests.append((self.command, self.path, self.headers.get("Range")))
            faults.headers.append(dict(self.headers))
            with faults.lock:
                faults.concurrent += self._is_faulty()
                faults.peak_concurrent = max(faults.peak_concurrent, faults.concurrent)
                too_many = faults.concurrent > faults.max_concurrent
            try:
                if self._is_faulty() and too_many:
                    self._send_empty(503, {})
                else:
                    self._answer_faulty(body)
            finally:
                with faults.lock:
                    faults.concurrent -= self._is_faulty()

        def _send_empty(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def _answer_faulty(self, body: bool) -> None:
            if not faults.ranges:
                del self.headers["Range"]
            if not faults.if_range:
                del self.headers["If-Range"]
            if faults.redirect:
                self._send_empty(302, {"Location": faults.redirect + self.path})
            elif self._is_faulty() and faults.statuses:
                self._send_empty(*faults.statuses.pop(0))
            elif self._is_faulty() and faults.html:
                self.send_response(HTTPStatus.OK)
                media_type = (
                    "text/html; charset=utf-8" if faults.html == "typed" else "application/octet-stream"
                )
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(LOGIN_PAGE)))
                self.end_headers()
                self.wfile.write(LOGIN_PAGE)
            else:
                self._take_faults()
                super()._answer(body)

        def _take_faults(self) -> None:
            """Take the faults of this request before it is answered: the next one may come before its end."""
            self._stall, self._drop, self._etag = 0.0, None, faults.etags[0] if faults.etags else None
            if self._is_faulty():
                self._stall = faults.stalls.pop(0) if faults.stalls else 0.0
                self._drop = faults.drops.pop(0) if faults.drops else None
                if len(faults.etags) > 1:
                    faults.etags.pop(0)

        def etag(self, path: Path) -> str:
            return self._etag or super().etag(path)

        def send_header(self, keyword: str, value: str) -> None:
            if keyword == "Content-Length" and not faults.length and faults.only in self.path:
                self.close_connection = True
                return
            if keyword == "Content-Length" and self._is_faulty():
                value = str(int(value) + faults.length_error)
            if keyword in ("ETag", "Last-Modified") and not faults.validators:
                return
            super().send_header(keyword, value)

        def send_body(self, file: BinaryIO, begin: int, end: int) -> None:
            if not self._is_faulty():
                return super().send_body(file, begin, end)
            time.sleep(self._stall)
            stop = end if self._drop is None else begin + self._drop
            file.seek(begin)
            while begin < min(stop, end):
                time.sleep(faults.pause)
                sent = self.wfile.write(file.read(min(faults.chunk_size, min(stop, end) - begin)))
                begin += sent
                faults.sent += sent
            if stop < end or faults.length_error > 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            return None

    return Faulty
