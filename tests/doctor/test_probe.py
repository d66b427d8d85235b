"""Measurements of the probe, on this machine."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize(("path", "requested"), [("/My Folder", b"/My%20Folder"), ("/a%20b", b"/a%20b")])
def test_a_reply_that_is_not_http_is_reported(path: str, requested: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        received = []

        def reply() -> None:
            connection, _ = server.accept()
            with connection:
                received.append(connection.recv(1000))
                connection.sendall(b"\x15\x03\x01 no\r\n\r\n")

        thread = Thread(target=reply, daemon=True)
        thread.start()
        found = probe.probe_internet(f"http://127.0.0.1:{server.getsockname()[1]}{path}")
        thread.join()
    assert found["status"] is None
    assert "the reply is not HTTP" in found["error"]
    assert found["error"].isprintable()
    assert received[0].split()[1] == requested


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
        ("import time; time.sleep(60)", "import of crashes: no result within 5 s"),
    ],
)
def test_failed_import_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str
) -> None:
    (tmp_path / "crashes.py").write_text(code)
    (tmp_path / "works.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    timeout = 5.0 if "sleep" in code else probe.IMPORT_TIMEOUT
    packages = ["works=psutil", "crashes=no-such-package", "json=numpy"]
    found, gpus = probe.probe_imports(packages, timeout=timeout)
    assert found["error"] == error
    assert found["versions"]["psutil"]
    assert found["versions"]["no-such-package"] is None
    assert gpus == {"torch": None, "cuda": None}


# A torch that finds GPUs; `driver` is what it does when it first calls the driver, `kernel` for each kernel.
TORCH = """
import os
import time
from pathlib import Path
from types import SimpleNamespace

def name(index):
    {driver}
    return f"H200-{{index}}"

def ones(size, device):
    index, here = int(device.removeprefix("cuda:")), Path(__file__).parent
    (here / f"kernel-{{index}}").touch()
    {kernel}
    return Tensor()

class Tensor:
    __add__ = sum = item = lambda self, *_: self

version = SimpleNamespace(cuda="13.0")
cuda = SimpleNamespace(device_count=lambda: 8, get_device_name=name)
"""


@pytest.fixture
def fake_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(driver: str = "pass", kernel: str = "pass") -> Path:
        (tmp_path / "torch.py").write_text(TORCH.format(driver=driver, kernel=kernel))
        return tmp_path

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040)"


@pytest.mark.parametrize(
    ("driver", "names", "problem"),
    [
        (f"raise RuntimeError('{TOO_OLD}. Please update your GPU driver from the URL: x')", 0, TOO_OLD),
        (
            "raise RuntimeError('Unexpected error from cudaGetDeviceCount(). Did you run some? '"
            "'Error 802: system not yet initialized')",
            *(0, "Error 802: system not yet initialized"),
        ),
        ("assert index < 7, 'Invalid device id'", 7, "GPU 7: Invalid device id"),
        ("os.abort()", 0, "killed by SIGABRT"),
        ("pass", 8, ""),
    ],
)
def test_a_driver_that_torch_cannot_use_is_no_failed_import(
    fake_torch: Callable[..., Path], driver: str, names: int, problem: str
) -> None:
    fake_torch(driver)
    found, gpus = probe.probe_imports(["torch=torch"])
    assert found["error"] == ""
    assert gpus == {"torch": [f"H200-{i}" for i in range(names)], "problem": problem, "cuda": "13.0"}


def test_every_gpu_computes_and_the_broken_ones_are_named(fake_torch: Callable[..., Path]) -> None:
    # Each waits until all have begun, which they would never do one after another.
    kernel = """
    while len(list(here.glob("kernel-*"))) < 8:
        time.sleep(0.01)
    if index in (1, 4):
        raise RuntimeError("CUDA error: no kernel image is available\\nSearch for it in the manual.")
    if index == 6:
        os.abort()"""
    fake_torch(kernel=kernel)
    names, problem = probe.probe_kernels([f"H200-{i}" for i in range(8)], 8)
    assert names == [f"H200-{i}" for i in (0, 2, 3, 5, 7)]
    assert problem == "GPU 1 4: CUDA error: no kernel image is available; GPU 6: killed by SIGABRT"


@pytest.mark.parametrize(
    ("variables", "at_most", "computing"),
    [
        ({"SLURM_JOB_ID": "1"}, None, 0),  # Slurm granted none: those that torch finds are of other jobs
        ({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "2"}, None, 2),
        (
            {"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            None,
            8,
        ),
        ({}, None, 8),
        ({}, 1, 1),  # a training in the foreground
        ({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "2"}, 0, 0),  # a training on CPUs
    ],
)
def test_no_gpu_of_another_job_computes(
    fake_torch: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    at_most: int | None,
    computing: int,
) -> None:
    folder = fake_torch()
    for name in ("SLURM_JOB_ID", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    request = {"scratch": None, "packages": ["torch=torch"], "gpus": at_most, "url": "", "source": ""}
    (folder / "request.json").write_text(json.dumps(request))
    probe.run_probe(str(folder))
    report = json.loads((folder / "report-0.json").read_text())
    assert report["gpus"]["torch"] == [f"H200-{i}" for i in range(8)]
    assert report["gpus"]["problem"] == report["packages"]["error"] == ""
    assert {path.name for path in folder.glob("kernel-*")} == {f"kernel-{i}" for i in range(computing)}


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
    timeout = 1.0 if len(set(ranks)) == 1 else 10.0  # both connect, however late the other is

    def run(rank: int) -> None:
        with probe._connect_peers(DistEnv(rank, size=2, master=host, port=port), timeout=timeout) as peer:
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
