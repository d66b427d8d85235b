"""A TCP relay whose connections can be cut."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator


class Relay:
    """Forwards connections from its own `port` to `target_port`.

    Attributes:
        bytes_up: number of bytes sent to the server.
        round_trips: how often data went to the server after data came from it, the first time included.
        cut_at: values of `bytes_up` at which all connections are cut and an outage begins.
        outage: duration of an outage in s, in which no connection is accepted.
        delay: s that data takes, in each direction.
    """

    def __init__(self) -> None:
        self.target_port = 0
        self.bytes_up = self.round_trips = 0
        self._was_up = False
        self.cut_at: list[int] = []
        self.outage = 0.0
        self.delay = 0.0
        self._outage_until = 0.0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                relay._forward(self.request)

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

    def end_outage(self) -> None:
        """Accept connections again."""
        self._outage_until = 0.0

    def _forward(self, client: socket.socket) -> None:
        if time.monotonic() < self._outage_until:
            return
        with socket.create_connection(("127.0.0.1", self.target_port)) as server:
            pair = {client, server}
            with self._lock:
                self._open |= pair
            downstream = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
            downstream.start()
            self._pump(client, server, True)
            downstream.join()
            with self._lock:
                self._open -= pair

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay)
                with self._lock:
                    self.round_trips += up and not self._was_up
                    self._was_up = up
                target.sendall(data)
                if up:
                    self._count_up(len(data))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count_up(self, size: int) -> None:
        with self._lock:
            self.bytes_up += size
            if not self.cut_at or self.bytes_up < self.cut_at[0]:
                return
            self.cut_at.pop(0)
            self._cut()

    def cut(self) -> None:
        """Cut all connections; an outage begins."""
        with self._lock:
            self._cut()

    def _cut(self) -> None:
        self._outage_until = time.monotonic() + self.outage
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
