"""What a probe looks at on a node, on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from hpc_imagenet.doctor import probe


@pytest.fixture
def server() -> Iterator[str]:
    """An HTTP server that has nothing, and its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    server.server_close()


def test_a_server_that_has_nothing_is_reached_all_the_same(server: str) -> None:
    assert probe.probe_internet(server)["status"] == 404


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens, and nobody else takes it
        port = closed.getsockname()[1]
        found = probe.probe_internet(f"http://127.0.0.1:{port}/")
        assert (found["status"], found["error"]) == (None, "Connection refused")
        # A proxy is asked instead; its password is shown nowhere.
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "")
        found = probe.probe_internet("http://image-net.org/")
    assert found["proxy"] == "127.0.0.1"
    assert found["error"] == "Connection refused"
    assert "secret" not in str(found)


def test_an_import_that_crashes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashes.py").write_text("import os; os.abort()")
    (tmp_path / "submitit_too.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = probe.probe_imports(
        ["submitit_too=submitit", "none=no-such-package", "crashes=submitit", "json=numpy"]
    )
    assert [bool(each["error"]) for each in told] == [False, True, True, True]
    assert "PackageNotFoundError" in told[1]["error"]
    assert "SIGABRT" in told[2]["error"]


def test_a_folder_is_told_as_it_is(tmp_path: Path) -> None:
    found = probe.probe_disk(tmp_path)
    assert found["error"] == ""
    assert found["free"] > 0
    assert found["kind"]
    assert list(tmp_path.iterdir()) == []
    assert probe.probe_disk(tmp_path / "none")["error"] == "no such folder"
    assert probe.filesystem_type(Path("/proc/self")) == "proc"
