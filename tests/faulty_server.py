"""An HTTP server with the faults of real ones: `with serving(folder, faulty(Faults(…))) as url`."""

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

LOGIN = b"<!DOCTYPE html>\n<html><title>Log in</title></html>" + b" " * 600


@dataclass
class Faults:
    """What goes wrong. Lists are used up from the front, one item a GET; then all is well."""

    drops: list[int] = field(default_factory=list)  # break the connection after that many bytes of a body
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # with these headers
    etags: list[str] = field(default_factory=list)  # the last one stays
    ranges: bool = True  # False: Range is not understood
    if_range: bool = True  # False: If-Range is not understood
    validators: bool = True  # False: neither ETag nor date
    length: bool = True  # False: no Content-Length, the end of the connection ends the file
    lie: int = 0  # added to the Content-Length
    html: str = ""  # "typed": a login page; "untyped": one that calls itself a binary file
    pause: float = 0.0  # s before each piece of `piece` bytes
    piece: int = 1 << 16
    stalls: list[float] = field(default_factory=list)  # s of silence before a body
    most: int = 1000  # GETs at a time; more are answered 503
    redirect: str = ""  # everything is elsewhere: under this URL
    only: str = ".tar"  # faults are for paths that contain this
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, path, Range)
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request
    sent: int = 0  # bytes of bodies, about
    busy: int = 0  # GETs being answered
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def faulty(faults: Faults) -> type[Handler]:
    """Return a handler with these faults."""

    class Faulty(Handler):
        def _mine(self) -> bool:
            return faults.only in self.path and self.command == "GET"

        def _answer(self, body: bool) -> None:
            faults.seen.append((self.command, self.path, self.headers.get("Range")))
            faults.headers.append(dict(self.headers))
            with faults.lock:
                faults.busy += self._mine()
                faults.busiest = max(faults.busiest, faults.busy)
                too_many = faults.busy > faults.most
            try:
                if self._mine() and too_many:
                    self._refuse(503, {})
                else:
                    self._do_answer(body)
            finally:
                with faults.lock:
                    faults.busy -= self._mine()

        def _refuse(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def _do_answer(self, body: bool) -> None:
            if not faults.ranges:
                del self.headers["Range"]
            if not faults.if_range:
                del self.headers["If-Range"]
            if faults.redirect:
                self._refuse(302, {"Location": faults.redirect + self.path})
            elif self._mine() and faults.statuses:
                self._refuse(*faults.statuses.pop(0))
            elif self._mine() and faults.html:
                self.send_response(HTTPStatus.OK)
                kind = "text/html; charset=utf-8" if faults.html == "typed" else "application/octet-stream"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(LOGIN)))
                self.end_headers()
                self.wfile.write(LOGIN)
            else:
                super()._answer(body)

        def etag(self, path: Path) -> str:
            return faults.etags[0] if faults.etags else super().etag(path)

        def send_header(self, keyword: str, value: str) -> None:
            if keyword == "Content-Length" and not faults.length and faults.only in self.path:
                self.close_connection = True
                return
            if keyword == "Content-Length" and self._mine():
                value = str(int(value) + faults.lie)
            if keyword in ("ETag", "Last-Modified") and not faults.validators:
                return
            super().send_header(keyword, value)

        def send_body(self, file: BinaryIO, begin: int, end: int) -> None:
            if not self._mine():
                return super().send_body(file, begin, end)
            if len(faults.etags) > 1:  # the headers are out; whoever asks next sees another file
                faults.etags.pop(0)
            if faults.stalls:
                time.sleep(faults.stalls.pop(0))
            stop = begin + faults.drops.pop(0) if faults.drops else end
            file.seek(begin)
            while begin < min(stop, end):
                time.sleep(faults.pause)
                sent = self.wfile.write(file.read(min(faults.piece, min(stop, end) - begin)))
                begin += sent
                faults.sent += sent
            if stop < end or faults.lie > 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            return None

    return Faulty
