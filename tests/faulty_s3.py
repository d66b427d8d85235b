"""A proxy before a server of S3, with the faults of real ones: `with proxy(endpoint, Faults(…)) as url`."""

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
    "500": "the server answers 500",
    "503": "the server answers 503 SlowDown",
    "reset": "the connection is reset, in the middle of a body where there is one",
    "half": "the work is done, and half of the answer is lost",
    "garbage": "the answer is no XML and has no headers",
    "sum": "the server gives back the checksum of other bytes",
    "flip": "a byte of an object changes on its way down",
}


@dataclass
class Faults:
    """What goes wrong; `seed` decides with which request it begins."""

    seed: int = 0
    every: int = 0  # so many requests one meets one of `kinds`; 0: none
    kinds: tuple[str, ...] = tuple(KINDS)
    only: bytes = b""  # requests whose first line contains this
    answers: list[bytes] = field(default_factory=list)  # each instead of the server's, from the front
    away: float = 0.0  # until then (monotonic) nobody answers at all
    seen: int = 0  # requests that could have met one
    made: dict[str, int] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)  # the first line of each request
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, line: bytes) -> str | None:
        with self.lock:
            self.lines.append(line)
            if self.only not in line or not self.every:
                return None
            self.seen += 1
            if self.seen % self.every != self.seed % self.every:
                return None
            return random.Random(f"{self.seed} {self.seen}").choice(self.kinds)

    def count(self, kind: str) -> None:
        with self.lock:
            self.made[kind] = self.made.get(kind, 0) + 1


def answer(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + body


_INSTEAD = {
    "500": answer("500", "InternalError"),
    "503": answer("503", "SlowDown"),
    "garbage": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<htm",
}


@contextlib.contextmanager
def proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Pass requests on to `endpoint`, one a connection, with faults."""
    port = int(endpoint.rpartition(":")[2])

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                _pass_on(self.request, port, faults)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _pass_on(client: socket.socket, port: int, faults: Faults) -> None:
    if time.monotonic() < faults.away:
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
    kind = faults.draw(line)
    with faults.lock:
        instead = faults.answers.pop(0) if faults.answers and faults.only in line else None
    if kind == "reset":
        faults.count(kind)
        if left > 0:
            client.recv(1 + left // 2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return
    if instead is None and kind in _INSTEAD:
        faults.count(kind)
        instead = _INSTEAD[kind]
    if instead is not None:
        while left > 0 and (more := client.recv(65536)):
            left -= len(more)
        client.sendall(instead)
        return
    head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close"
    with socket.create_connection(("127.0.0.1", port)) as server:
        server.sendall(head + b"\r\n\r\n" + body)
        while left > 0 and (more := client.recv(min(left, 1 << 16))):
            server.sendall(more)
            left -= len(more)
        if left > 0:
            return  # the client is gone
        if kind is None:
            while more := server.recv(1 << 16):
                client.sendall(more)
            return
        answered = b""
        while more := server.recv(1 << 16):
            answered += more
    spoilt = _spoil(kind, answered, line)
    if spoilt != answered:
        faults.count(kind)
    client.sendall(spoilt)


def _spoil(kind: str, answered: bytes, line: bytes) -> bytes:
    if kind == "half":
        return answered[: len(answered) // 2]
    if kind == "sum":
        wrong = b"\r\nx-amz-checksum-crc32: AAAAAA==" if b"PUT" in line and b"/shards/" in line else b""
        head, end, body = answered.partition(b"\r\n\r\n")
        return re.sub(rb"(?i)\r\nx-amz-checksum-crc32:[^\r]*", b"", head) + wrong + end + body
    head, _, body = answered.partition(b"\r\n\r\n")
    if line.startswith(b"GET") and b"/shards/" in line and head.split()[1] in (b"200", b"206") and body:
        return answered[:-1] + bytes([answered[-1] ^ 1])
    return answered
