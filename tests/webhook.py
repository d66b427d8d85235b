"""A webhook that keeps the messages which Apprise sends to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "s3cr3t-token"  # in the path of the URL


@dataclass
class Webhook:
    url: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.messages]

    @contextlib.contextmanager
    def serve(self, listener: socket.socket | None = None) -> Iterator[Webhook]:
        """Serve on a free port of loopback, or on a socket that listens already, as host `login`."""
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.messages.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=listener is None)
        if listener is not None:
            server.socket.close()
            server.socket = listener
        host, port = "login" if listener else "127.0.0.1", server.socket.getsockname()[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"json://{host}:{port}/{TOKEN}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
