"""Hostile HTTP servers: what they answer for the archive of the validation images."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from cases import FILES, Case, write_archives
from run_stage import config_of, run_stage

from hpc_imagenet.data.download import receipt
from hpc_imagenet.demo.http_server import Handler, serving
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.work import download

Reply = Callable[[bytes, str | None], bytes]  # of the archive's bytes and the Range header; what is sent


def reply(status: str, *headers: str, body: bytes = b"") -> bytes:
    """Return a response."""
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode("latin-1") + body


def fixed(status: str, *headers: str, body: bytes = b"") -> Reply:
    """Return a server that answers every request alike."""
    return lambda data, requested: reply(status, *headers, body=body)


def ranged(content_range: str, extra: int = 0, *headers: str) -> Reply:
    """Return a server that answers 206 with a Content-Range of its own and `extra` bytes too many."""

    def answer(data: bytes, requested: str | None) -> bytes:
        text = content_range.format(last=len(data) - 1, total=len(data))
        length = f"Content-Length: {len(data) + extra}"
        return reply("206 Partial Content", text, length, *headers, body=data + b"x" * extra)

    return answer


def whole(*headers: str, lack: int = 0, length: str | None = "") -> Reply:
    """Return a server that sends the archive without its last bytes. `length`: Content-Length; None: none."""

    def answer(data: bytes, requested: str | None) -> bytes:
        shown = [] if length is None else [f"Content-Length: {length or len(data)}"]
        return reply("200 OK", *shown, *headers, body=data[: len(data) - lack])

    return answer


def chunked(*parts: bytes) -> Reply:
    """Return a server that sends these chunks."""
    return lambda data, requested: reply("200 OK", "Transfer-Encoding: chunked", body=b"".join(parts))


def run(answer: Reply | None = None, tls: str = "", limit: int = 0) -> Callable[[Path], str]:
    """Return the work of a case: download from a server that gives this answer for one archive."""

    def work(folder: Path) -> str:
        write_archives(folder / "source", {})
        served = (folder / "source" / FILES["val"]).read_bytes()

        class Hostile(Handler):
            def _answer(self, body: bool) -> None:
                if answer is None or FILES["val"] not in self.path:
                    super()._answer(body)
                    return
                self.wfile.write(answer(served, self.headers.get("Range")))
                self.close_connection = True

        server = secure(folder, Hostile, tls) if tls else serving(folder / "source", Hostile)
        with server as url:
            config = config_of(folder / "workspace", url)
            config.download.timeout = 5
            kept = folder / "workspace" / "archives" / "numbers"
            try:
                result = run_stage(download, config)
            except UserError:
                assert receipt.missing_receipts(kept, FILES.values()), "a refused archive looks whole"
                raise
        assert (kept / FILES["val"]).read_bytes() == served, "other bytes than the server has"
        return f"{result['files']} archives"

    return work


@contextlib.contextmanager
def secure(folder: Path, handler: type[Handler], names: str) -> Iterator[str]:
    """Serve over TLS with a self-signed certificate for `names`."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        f"/CN={names}",
    ]
    command += ["-keyout", str(folder / "key"), "-out", str(folder / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, folder=folder / "source"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_FAILED = "failed attempts in a row; check dataset.source or increase download.retries"
_HTML = b"<!DOCTYPE html><title>Log in</title>" + b" " * 600

_ANSWERS: list[tuple[str, Reply, str]] = [
    (
        "redirect to a file",
        fixed("302 Found", "Location: file:///etc/passwd", "Content-Length: 0"),
        "not a valid URL",
    ),
    (
        "redirect to FTP",
        fixed("302 Found", "Location: ftp://127.0.0.1/x", "Content-Length: 0"),
        "not a valid URL",
    ),
    (
        "redirect to gopher",
        fixed("302 Found", "Location: gopher://127.0.0.1:22/_x", "Content-Length: 0"),
        "not a valid URL",
    ),
    (
        "redirect to itself",
        fixed("302 Found", f"Location: /{FILES['val']}", "Content-Length: 0"),
        "too many redirects",
    ),
    (
        "redirect to a closed port",
        fixed("302 Found", "Location: http://127.0.0.1:9/x", "Content-Length: 0"),
        _FAILED,
    ),
    ("redirect without a Location", fixed("302 Found", "Content-Length: 0"), "302"),
    ("redirect to nonsense", fixed("302 Found", "Location: http://[::1/x", "Content-Length: 0"), "URL"),
    ("Content-Length too small", whole(length="100"), "not a tar but a file of unknown format"),
    ("Content-Length too large", whole(length="999999"), _FAILED),
    ("Content-Length of 10^18 - 1", whole(length="9" * 18), "free"),
    ("Content-Length of 5,000 digits", whole(length="9" * 5000), "ok: 3 archives"),
    ("Content-Length of -1", whole(length="-1"), "ok: 3 archives"),
    ("Content-Length of ²", whole(length="²"), "ok: 3 archives"),
    ("Content-Length twice, unequal", whole("Content-Length: 5"), "multiple unmatching values"),
    ("no Content-Length", whole(length=None), "ok: 3 archives"),
    ("no Content-Length, cut inside an image", whole(length=None, lack=8500), "truncated at byte 1740"),
    ("empty body", fixed("200 OK", "Content-Length: 0"), "not a tar but an empty file"),
    ("no content", fixed("204 No Content"), "(status 204)"),
    ("body of a login page", fixed("200 OK", f"Content-Length: {len(_HTML)}", body=_HTML), "is an HTML page"),
    ("gzip although identity was requested", whole("Content-Encoding: gzip"), "ok: 3 archives"),
    ("an unknown encoding", whole("Content-Encoding: x-nonsense"), "ok: 3 archives"),
    ("chunk of a negative size", chunked(b"-5\r\nhello\r\n0\r\n\r\n"), _FAILED),
    ("chunk of 2^64 bytes", chunked(b"ffffffffffffffff\r\nhello"), _FAILED),
    ("chunk size that is not a number", chunked(b"zz\r\nhello\r\n"), _FAILED),
    ("chunks that end early", chunked(b"5\r\nhello\r\n"), _FAILED),
    (
        "another range than requested",
        ranged("Content-Range: bytes 5-{last}/{total}"),
        "another range than requested",
    ),
    ("range without a Content-Range", ranged("X: y"), "another range than requested"),
    ("range that is no number", ranged("Content-Range: bytes a-b/c"), "another range than requested"),
    (
        "range of 5,000 digits",
        ranged("Content-Range: bytes 0-{last}/" + "9" * 5000),
        "another range than requested",
    ),
    (
        "range with a total of 10^17",
        ranged("Content-Range: bytes 0-{last}/" + "9" * 17, 0, 'ETag: "1"'),
        "not enough free space",
    ),
    (
        "range whose end is before its begin",
        ranged("Content-Range: bytes 0-0/1"),
        "although the whole file was requested",
    ),
    (
        "range with more bytes than it says",
        ranged("Content-Range: bytes 0-{last}/{total}", 5000),
        "although the whole file",
    ),
    (
        "range with more bytes than the file has",
        ranged("Content-Range: bytes 0-0/1", 0, 'ETag: "1"'),
        _FAILED,
    ),
    ("416 for every range", fixed("416 Range Not Satisfiable", "Content-Length: 0"), _FAILED),
    ("404", fixed("404 Not Found", "Content-Length: 0"), "does not exist"),
    ("403", fixed("403 Forbidden", "Content-Length: 0"), "forbidden"),
    (
        "401 with a realm of escape sequences",
        fixed("401 No", "WWW-Authenticate: Basic realm=\x1b[2J", "Content-Length: 0"),
        "401",
    ),
    ("503 with Retry-After: 0", fixed("503 Busy", "Retry-After: 0", "Content-Length: 0"), _FAILED),
    ("503 with Retry-After: -5", fixed("503 Busy", "Retry-After: -5", "Content-Length: 0"), _FAILED),
    ("503 with Retry-After: ²", fixed("503 Busy", "Retry-After: ²", "Content-Length: 0"), _FAILED),
    (
        "503 with Retry-After in the year 99999",
        fixed("503 Busy", "Retry-After: Fri, 31 Dec 99999 23:59:59 GMT"),
        _FAILED,
    ),
    ("503 with Retry-After of 5,000 digits", fixed("503 Busy", "Retry-After: " + "9" * 5000), _FAILED),
    ("status 999", fixed("999 Nonsense", "Content-Length: 0"), ""),
    ("a status line that is no number", lambda data, requested: b"HTTP/1.1 abc\r\n\r\n", _FAILED),
    ("no HTTP at all", lambda data, requested: b"SSH-2.0-OpenSSH_9.6\r\n", "the response is not HTTP"),
    ("nothing at all", lambda data, requested: b"", _FAILED),
    ("a header line of 1 MB", fixed("200 OK", "X: " + "x" * (1 << 20)), _FAILED),
    ("10,000 headers", fixed("200 OK", *(f"X{n}: y" for n in range(10_000))), _FAILED),
    (
        "an ETag of escape sequences",
        ranged("Content-Range: bytes 0-{last}/{total}", 0, 'ETag: "\x1b]0;x\x07"'),
        "ok: 3 archives",
    ),
    (
        "an ETag that changes",
        lambda data, requested: ranged("Content-Range: bytes 0-{last}/{total}", 0, f'ETag: "{id(object())}"')(
            data, requested
        ),
        "ok: 3",
    ),
]

CASES = [Case("http", name, run(answer), expected) for name, answer, expected in _ANSWERS]
CASES += [
    Case(
        "http",
        "TLS with a certificate that is self-signed",
        run(tls="127.0.0.1"),
        "CERTIFICATE_VERIFY_FAILED",
    ),
    Case(
        "http", "TLS with a certificate of another host", run(tls="example.org"), "CERTIFICATE_VERIFY_FAILED"
    ),
]
