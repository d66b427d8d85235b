"""Serve the report page on loopback, always with the current state of the workspace.

A loopback port of a login node can be reached by every user of that node, so the address contains a random
token.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import secrets
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.report.html.page import encode_data, render_page
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.runs.store import RunStore

_MAX_AGE = 5.0  # s for which collected data is served again
DATA = "data.json"


class ReportServer(ThreadingHTTPServer):
    """Server of the page at `url`; `serve_forever` runs it.

    Args:
        store: the runs of the workspace.
        port: port on 127.0.0.1; 0: any free one.
        with_images: whether thumbnails of val images are part of the page.

    Raises:
        UserError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, store: RunStore, port: int, with_images: bool) -> None:
        self.token = secrets.token_urlsafe(16)
        self._collect: Callable[[], dict[str, Any]] = lambda: collect(store, with_images)
        self._lock = threading.Lock()
        self._collected: tuple[float, dict[str, Any]] | None = None
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}: type another one, or 0 for any") from None

    @property
    def url(self) -> str:
        """Address of the page, with its token."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def data(self) -> dict[str, Any]:
        """Return the data of the page, collected at most `_MAX_AGE` seconds ago."""
        with self._lock:
            if self._collected is None or time.monotonic() - self._collected[0] > _MAX_AGE:
                data = self._collect()
                self._collected = time.monotonic(), data
            return self._collected[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a browser that has closed its connection, such as by a reload."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == f"/{self.server.token}/":
            self._send(render_page(self.server.data(), live=DATA), "text/html; charset=utf-8")
        elif self.path == f"/{self.server.token}/{DATA}":
            data = self.server.data()
            unchanged = {key: value for key, value in data.items() if key != "generated"}
            tag = f'"{hashlib.sha256(json.dumps(unchanged, default=str).encode()).hexdigest()[:16]}"'
            if self.headers.get("If-None-Match") == tag:
                self.send_response(HTTPStatus.NOT_MODIFIED)
                self.send_header("ETag", tag)
                self.end_headers()
            else:
                self._send(encode_data(data).encode(), "application/json", tag)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, body: bytes, kind: str, tag: str | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        if "gzip" in self.headers.get("Accept-Encoding", ""):  # a tunnel may be slow
            body = gzip.compress(body, 5)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing about requests."""
