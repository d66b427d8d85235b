"""A proxy in front of an S3 server that injects faults: `with proxy(endpoint, Faults(…)) as url`."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = {
    "500": "the server replies 500",
    "503": "the server replies 503 SlowDown",
    "reset": "the connection is reset, in the middle of the request body if there is one",
    "half": "the request is processed, and half of the response is lost",
    "garbage": "the response is not XML and has no headers",
    "sum": "the server returns the checksum of other bytes",
    "flip": "a byte of a downloaded object changes",
}


@dataclass
class Faults:
    """Faults to inject, and what was injected; `seed` decides which requests are hit."""

    seed: int = 0
    every: int = 0  # every so many requests, one of `kinds` is injected; 0: never
    kinds: tuple[str, ...] = tuple(KINDS)
    most: int = 1 << 30  # of `kinds` in all
    only: bytes = b""  # inject only into requests whose first line contains this
    responses: list[bytes] = field(default_factory=list)  # sent instead of the server's, in this order
    outage: float = 0.0  # s without a server, from the first PUT of a shard on
    unavailable_until: float = 0.0  # monotonic time until which all connections are closed
    matching: int = 0  # number of requests that match `only`
    injected: dict[str, int] = field(default_factory=dict)  # number of faults by kind
    request_lines: list[bytes] = field(default_factory=list)  # the first line of each request
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, line: bytes) -> str | None:
        """Return the fault for a request, if any."""
        with self.lock:
            self.request_lines.append(line)
            if self.outage and b"PUT" in line and b"/shards/" in line:
                self.unavailable_until, self.outage = time.monotonic() + self.outage, 0.0
            if self.only not in line or not self.every or sum(self.injected.values()) >= self.most:
                return None
            self.matching += 1
            if self.matching % self.every != self.seed % self.every:
                return None
            return random.Random(f"{self.seed} {self.matching}").choice(self.kinds)

    def count(self, kind: str) -> None:
        with self.lock:
            self.injected[kind] = self.injected.get(kind, 0) + 1


def response(status: str, code: str) -> bytes:
    """Return an S3 error response."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + body


_REPLACEMENTS = {
    "500": response("500", "InternalError"),
    "503": response("503", "SlowDown"),
    "garbage": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<htm",
}


@contextlib.contextmanager
def proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Forward requests to `endpoint`, one per connection, with faults; yield the proxy's URL."""
    port = int(endpoint.rpartition(":")[2])

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                _forward(self.request, port, faults)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _forward(client: socket.socket, port: int, faults: Faults) -> None:
    if time.monotonic() < faults.unavailable_until:
        return
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := client.recv(65536)):
            return
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    line = head.partition(b"\r\n")[0]
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    left = int(length[1]) - len(body) if length else 0
    if re.search(rb"(?i)\r\nexpect:", head):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
    kind = faults.choose(line)
    with faults.lock:
        replacement = faults.responses.pop(0) if faults.responses and faults.only in line else None
    if kind == "reset":
        faults.count(kind)
        if left > 0:
            client.recv(1 + left // 2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return
    if replacement is None and kind in _REPLACEMENTS:
        faults.count(kind)
        replacement = _REPLACEMENTS[kind]
    if replacement is not None:
        while left > 0 and (more := client.recv(65536)):
            left -= len(more)
        client.sendall(replacement)
        return
    head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close"
    with socket.create_connection(("127.0.0.1", port)) as server:
        server.sendall(head + b"\r\n\r\n" + body)
        while left > 0 and (more := client.recv(min(left, 1 << 16))):
            server.sendall(more)
            left -= len(more)
        if left > 0:
            return  # the client has disconnected
        if kind is None:
            while more := server.recv(1 << 16):
                client.sendall(more)
            return
        reply = b""
        while more := server.recv(1 << 16):
            reply += more
    altered = _alter(kind, reply, line)
    if altered != reply:
        faults.count(kind)
    client.sendall(altered)


def _alter(kind: str, reply: bytes, line: bytes) -> bytes:
    if kind == "half":
        return reply[: len(reply) // 2]
    if kind == "sum":
        wrong = b"\r\nx-amz-checksum-crc32: AAAAAA==" if b"PUT" in line and b"/shards/" in line else b""
        head, end, body = reply.partition(b"\r\n\r\n")
        return re.sub(rb"(?i)\r\nx-amz-checksum-crc32:[^\r]*", b"", head) + wrong + end + body
    head, _, body = reply.partition(b"\r\n\r\n")
    if line.startswith(b"GET") and b"/shards/" in line and head.split()[1] in (b"200", b"206") and body:
        return reply[:-1] + bytes([reply[-1] ^ 1])
    return reply
