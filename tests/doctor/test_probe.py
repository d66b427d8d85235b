"""Measurements of the probe, on this machine."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.doctor import probe


@pytest.fixture
def server() -> Iterator[str]:
    """URL of an HTTP server that replies 404."""

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


def test_http_error_counts_as_reply(server: str) -> None:
    assert probe.probe_internet(server)["status"] == 404


def test_internet_error_and_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # does not listen, and reserves the port
        port = closed.getsockname()[1]
        found = probe.probe_internet(f"http://127.0.0.1:{port}/")
        assert (found["status"], found["error"]) == (None, "Connection refused")
        # The proxy gets the request; its password is not reported.
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "")
        found = probe.probe_internet("http://image-net.org/")
    assert found["proxy"] == "127.0.0.1"
    assert found["error"] == "Connection refused"
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.abort()", "import of crashes: killed by SIGABRT"),
        ("import no_such", "import of crashes: ModuleNotFoundError: No module named 'no_such'"),
        ("import time; time.sleep(60)", "import of crashes: no result within 1 s"),
    ],
)
def test_failed_import_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str
) -> None:
    (tmp_path / "crashes.py").write_text(code)
    (tmp_path / "works.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, gpus = probe.probe_imports(["works=psutil", "crashes=no-such-package", "json=numpy"], timeout=1.0)
    assert found["error"] == error
    assert found["versions"]["psutil"]
    assert found["versions"]["no-such-package"] is None
    assert gpus == {"torch": None, "cuda": None}


def test_import_without_error() -> None:
    found, _ = probe.probe_imports(["psutil=psutil"])
    assert found["error"] == ""


def test_driver_lists_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.probe_gpus()["error"] == "no nvidia-smi (No such file or directory)"
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.1'\n")
    command.chmod(0o755)
    assert probe.probe_gpus()["driver"] == ["NVIDIA H200 (143771 MiB, driver 570.1)"]
    command.write_text("#!/bin/sh\necho 'no driver loaded'\nexit 9\n")
    assert (probe.probe_gpus()["driver"], probe.probe_gpus()["error"]) == ([], "no driver loaded")


def peers(*ranks: int, host: str = "localhost") -> dict[int, str]:
    """Return the error of the peer check of each rank, of two nodes with one task each."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    errors: dict[int, str] = {}

    def run(rank: int) -> None:
        with probe._connect_peers(DistEnv(rank, size=2, master=host, port=port), timeout=1.0) as peer:
            assert peer
            errors[rank] = peer["error"].replace(str(port), "PORT")

    threads = [Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # the later ones start later, as tasks of a job do
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_peers_connect_in_any_order(ranks: tuple[int, ...]) -> None:
    assert peers(*ranks) == {0: "", 1: ""}


def test_peer_errors() -> None:
    assert peers(0) == {0: ""}  # the error of the other rank is in its own report
    assert peers(1) == {1: "localhost:PORT: Connection refused"}
    assert "no.such.host.invalid:PORT: " in peers(1, host="no.such.host.invalid")[1]
    assert peers(0, 0)[0].startswith("localhost:PORT: Address already in use")


def test_single_node_has_no_peers() -> None:
    with probe._connect_peers(DistEnv()) as peer:
        assert peer is None


def test_probe_reports_every_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"scratch": str(tmp_path), "packages": [], "url": "", "source": str(tmp_path)}
    (tmp_path / "request.json").write_text(json.dumps(request))
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "1"}
    for rank in ("0", "1"):
        for name, value in {**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}.items():
            monkeypatch.setenv(name, value)
        probe.run_probe(str(tmp_path))
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert first["complete"]
    assert second["complete"]
    assert set(first) - set(second) == {"peer", "memory", "disks", "source"}
    assert 0 < first["memory"]["usable"] <= first["memory"]["total"]
    assert first["disks"]["cluster.scratch"]["error"] == first["source"]["error"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("report-0.json", "report-1.json", "request.json"),
    ]


def test_disk_is_measured_and_left_empty(tmp_path: Path) -> None:
    found = probe.probe_disk(tmp_path)
    assert found["error"] == ""
    assert found["free"] > 0
    assert f"{tmp_path}: " in found["text"]
    assert found["kind"]
    assert list(tmp_path.iterdir()) == []
    assert probe.probe_disk(tmp_path / "none")["error"] == "no such folder"
    assert probe.filesystem_type(Path("/proc/self")) == "proc"


@pytest.mark.parametrize(
    ("bytes_free", "inodes", "inodes_free", "full"),
    [
        (10**12, 10**7, 10**6, False),
        (10**12, 0, 0, False),  # a file system without a limit of inodes
        (10**6, 10**7, 10**6, True),
        (10**12, 10**7, 3, True),
    ],
)
def test_disk_is_full_without_bytes_or_inodes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bytes_free: int,
    inodes: int,
    inodes_free: int,
    full: bool,
) -> None:
    status = SimpleNamespace(f_bavail=bytes_free, f_frsize=1, f_files=inodes, f_favail=inodes_free)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    found = probe.probe_disk(tmp_path)
    assert found["full"] == full
    assert (f"{inodes_free:,} inodes free" in found["text"]) == bool(inodes)
