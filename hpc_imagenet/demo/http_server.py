"""HTTP server of a folder on the loopback interface, for the demo and the tests.

It replaces the real archive server in the demo and the tests, with the features that the download stage uses:
HEAD, Range, If-Range, ETag. Source: RFC 9110.
"""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 18


class Handler(BaseHTTPRequestHandler):
    """Request handler for GET and HEAD of the files in one folder."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path) -> None:
        self.folder = folder
        super().__init__(*args)

    def handle(self) -> None:
        """Handle requests until the client closes the connection, cleanly or not."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        """Respond to HEAD, without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Respond to GET with the file or one range of it."""
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the client keeps the log."""

    def etag(self, path: Path) -> str:
        """Return the strong ETag of a file."""
        stat = path.stat()
        return f'"{stat.st_size:x}-{stat.st_mtime_ns:x}"'

    def _answer(self, body: bool) -> None:
        path = self._path()
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as file:
            self.send_file(path, file, body)

    def send_file(self, path: Path, file: BinaryIO, body: bool) -> None:
        """Send the status, the headers and, if `body`, the requested bytes."""
        size = path.stat().st_size
        begin, end = 0, size
        byte_range = self._range(size) if self.headers.get("If-Range") in (None, self.etag(path)) else None
        if byte_range is not None:
            begin, end = byte_range
            if begin >= end:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(HTTPStatus.OK)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", self.etag(path))
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if body:
            self.send_body(file, begin, end)

    def send_body(self, file: BinaryIO, begin: int, end: int) -> None:
        """Send the bytes [begin, end) of a file."""
        file.seek(begin)
        while begin < end and (chunk := file.read(min(CHUNK, end - begin))):
            self.wfile.write(chunk)
            begin += len(chunk)

    def _path(self) -> Path | None:
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        root = self.folder.resolve()
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None

    def _range(self, size: int) -> tuple[int, int] | None:
        """Return the requested bytes [begin, end), or None for the whole file."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or match[1] == match[2] == "":
            return None
        if not match[1]:
            return max(0, size - int(match[2])), size
        return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


@contextlib.contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[str]:
    """Serve `folder` from a thread within the block; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, folder=folder))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
