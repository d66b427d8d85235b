"""A way to a port on which connections can be cut."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator


class Relay:
    """Passes bytes between its own `port` and `to`.

    Attributes:
        up: bytes that went up to the server.
        cuts: each time that `up` reaches the first of these, all connections break …
        pause: … and nobody answers for so many s.
    """

    def __init__(self) -> None:
        self.to = 0
        self.up = 0
        self.cuts: list[int] = []
        self.pause = 0.0
        self._away = 0.0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                relay._carry(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    @contextlib.contextmanager
    def running(self) -> Iterator[Relay]:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def back(self) -> None:
        """Answer again."""
        self._away = 0.0

    def _carry(self, client: socket.socket) -> None:
        if time.monotonic() < self._away:
            return
        with socket.create_connection(("127.0.0.1", self.to)) as server:
            pair = {client, server}
            with self._lock:
                self._open |= pair
            back = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
            back.start()
            self._pump(client, server, True)
            back.join()
            with self._lock:
                self._open -= pair

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                if up:
                    self._count(len(data))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, size: int) -> None:
        with self._lock:
            self.up += size
            if not self.cuts or self.up < self.cuts[0]:
                return
            self.cuts.pop(0)
            self._away = time.monotonic() + self.pause
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
