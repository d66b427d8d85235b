"""The probe: every task of its job measures what it has and writes one report file; it judges nothing.

runs/.doctor/<time>/<stage>/
    request.json        what to measure, written by the doctor
    report-<rank>.json  written by each task when it starts, and replaced when it is complete
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from hpc_imagenet import __version__
from hpc_imagenet.cluster.dist_env import DistEnv, from_environment
from hpc_imagenet.doctor.check_result import gigabytes
from hpc_imagenet.io.atomic_files import write_json

PEER_TIMEOUT = 20.0  # s in which the tasks of all nodes must connect to rank 0
IMPORT_TIMEOUT = 120.0  # s; torch has thousands of files, and the file system may be slow at first
_REPLY_TIMEOUT = 10.0  # s for a server
_DRIVER_TIMEOUT = 60.0  # s for nvidia-smi
_MIN_FREE_BYTES, _MIN_FREE_INODES = 10**9, 10_000  # a folder with less counts as full

# Prints the name of each step before it begins: after a crash the last line names the one that failed.
_IMPORT_SCRIPT = """
import importlib, json, sys
for module in sys.argv[1:]:
    print(module, flush=True)
    importlib.import_module(module)
if torch := sys.modules.get("torch"):
    print("torch.cuda", flush=True)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(json.dumps({"torch": names, "cuda": torch.version.cuda or torch.version.hip}))
"""


def run_probe(folder: str) -> None:
    """Measure what `request.json` in `folder` lists and write this task's report.

    Every task reports its identity, cores and installation; the first task of each node reports the rest.

    Raises:
        OSError: the folder does not exist here, or is not writable.
    """
    request = json.loads(Path(folder, "request.json").read_bytes())
    dist_env = from_environment()
    report_file = Path(folder, f"report-{dist_env.rank}.json")
    first = dist_env.local_rank == 0
    report: dict[str, Any] = {
        "size": dist_env.size,
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "nodelist": os.environ.get("SLURM_JOB_NODELIST", ""),
        "cores": len(os.sched_getaffinity(0)),
        "visible_gpus": _visible_gpus(),
        **installation(),
        "complete": not first,
    }
    write_json(report_file, report)
    if not first:
        return
    with _connect_peers(dist_env) as peer:
        report |= {"complete": True, "peer": peer, "memory": probe_memory()}
        folders = {"workspace": folder, "cluster.scratch": request["scratch"]}
        folders |= {f"${name}": os.environ.get(name) for name in ("SLURM_TMPDIR", "TMPDIR")}
        paths = {name: Path(os.path.expandvars(each)) for name, each in folders.items() if each}
        report["disks"] = {name: probe_disk(path.expanduser()) for name, path in paths.items()}
        if request["source"]:
            report["source"] = probe_disk(Path(request["source"]), write=False)
        if request["url"]:
            report["internet"] = probe_internet(request["url"])
        if request["packages"]:
            report["packages"], torch = probe_imports(request["packages"])
            report["gpus"] = {**probe_gpus(), **torch}
        write_json(report_file, report)


def installation() -> dict[str, str]:
    """Return the versions and paths of Python and of this package."""
    code = str(Path(__file__).resolve().parents[1])
    return {"python": platform.python_version(), "package": __version__, "code": code}


def probe_disk(path: Path, write: bool = True) -> dict[str, Any]:
    """Return path, kind (file system type), free (bytes), full, and error (or empty text) of a folder.

    `text` describes the folder. With `write` also write a temporary file in it, which is removed at once.
    """
    found: dict[str, Any] = {"path": str(path), "kind": "", "free": 0, "full": False, "error": ""}
    try:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "no such folder")
        status = os.statvfs(path)
        found["kind"], found["free"] = filesystem_type(path), status.f_bavail * status.f_frsize
        inodes = f" and {status.f_favail:,} inodes" if status.f_files else ""  # else without a limit
        found["text"] = f"{path}: {gigabytes(found['free'])}{inodes} free ({found['kind']})"
        few_inodes = status.f_files > 0 and status.f_favail < _MIN_FREE_INODES
        found["full"] = few_inodes or found["free"] < _MIN_FREE_BYTES
        if not write:
            next(path.iterdir(), None)
        else:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        found["error"] = error.strerror or str(error)
        found["text"] = f"{path}: {found['error']}"
    return found


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds a path, such as nfs4 or ext4; empty if unknown."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    path = path.resolve()
    return next((mounts[folder] for folder in (path, *path.parents) if folder in mounts), "")


def probe_memory() -> dict[str, float]:
    """Return bytes of memory: total of the node, and usable (limited by cgroups and Slurm)."""
    total = psutil.virtual_memory().total
    per_node, per_cpu = (os.environ.get(f"SLURM_MEM_PER_{unit}", "") for unit in ("NODE", "CPU"))
    if not per_node and per_cpu.isdigit():
        per_node = str(int(per_cpu) * int(os.environ.get("SLURM_CPUS_ON_NODE", 1)))
    granted = int(per_node) * 2**20 if per_node.isdigit() else 0  # 0: all
    return {"total": total, "usable": min(total, granted or total, *_cgroup_limits())}


def _cgroup_limits() -> Iterator[float]:
    """Yield the memory limits in bytes of this process's cgroup and its parents, for cgroups 1 and 2."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):
                group = Path(f"/sys/fs/cgroup/{controllers}{name}")
                file = "memory.limit_in_bytes" if controllers else "memory.max"
                for folder in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError):
                        yield float(int((folder / file).read_text()))  # `max` is not a number


def probe_internet(url: str) -> dict[str, Any]:
    """Send a HEAD request; return host, proxy (its host, or empty), status (HTTP, or None), and error."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    bypass = urllib.request.proxy_bypass(host)
    proxy = "" if bypass else urllib.request.getproxies().get(parts.scheme, "")
    # The proxy's URL may hold a password: only its host is reported.
    found = {"host": host, "proxy": urllib.parse.urlsplit(proxy).hostname or "", "status": None, "error": ""}
    agent = {"User-Agent": f"hpc-imagenet/{__version__}"}
    try:
        request = urllib.request.Request(url, method="HEAD", headers=agent)
        with urllib.request.build_opener().open(request, timeout=_REPLY_TIMEOUT) as reply:
            return {**found, "status": reply.status}
    except urllib.error.HTTPError as error:  # also a reply
        return {**found, "status": error.code}
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return {**found, "error": getattr(reason, "strerror", None) or str(reason)}


def probe_imports(
    packages: Sequence[str], timeout: float = IMPORT_TIMEOUT
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Import packages, each given as `module=package`, in a new process: a crash is reported as an error.

    No result within `timeout` s is an error too.

    Returns:
        versions (of each package, or None) and error; and what torch reports, None if the import failed:
        torch (names of the GPUs that it finds) and cuda (version that it was built for).
    """
    modules, names = zip(*(pair.split("=") for pair in packages), strict=True)
    output, error = _run(sys.executable, "-c", _IMPORT_SCRIPT, *modules, timeout=timeout)
    last = (output.splitlines() or ["python"])[-1]
    gpus = json.loads(last) if last.startswith("{") else {"torch": None, "cuda": None}
    versions = {name: package_version(name) for name in names}
    return {"versions": versions, "error": f"import of {last}: {error}" if error else ""}, gpus


def package_version(name: str) -> str | None:
    """Return the version of an installed package without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe_gpus() -> dict[str, Any]:
    """Return granted (GPUs by Slurm, or None), driver (text on each GPU that it lists), error (or empty)."""
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    granted = int(count) if count.isdigit() else _visible_gpus()
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    output, error = _run("nvidia-smi", *query, timeout=_DRIVER_TIMEOUT)
    cards = [line.split(", ") for line in output.splitlines() if line.count(", ") == 2 and not error]
    driver = [f"{name} ({memory}, driver {version})" for name, memory, version in cards]
    return {"granted": granted, "driver": driver, "error": error}


def _run(*command: str, timeout: float) -> tuple[str, str]:
    """Return the stdout of a command and its error, or an empty string."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except OSError as error:
        return "", f"no {command[0]} ({error.strerror})"
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else ""
        return output, f"no result within {timeout:.0f} s"
    if done.returncode < 0:
        return done.stdout, f"killed by {signal.Signals(-done.returncode).name}"
    lines = (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()
    return done.stdout, lines[-1] if done.returncode else ""


def _visible_gpus() -> int | None:
    """Return the number of GPUs in CUDA_VISIBLE_DEVICES; None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else sum(part.strip() not in ("", "-1") for part in visible.split(","))


@contextlib.contextmanager
def _connect_peers(dist_env: DistEnv, timeout: float = PEER_TIMEOUT) -> Iterator[dict[str, Any] | None]:
    """Connect to rank 0 from the first task of every other node, on the port that a training would use.

    Rank 0 listens; when the block ends it waits until the others have connected. Yields host and port of
    rank 0 and the error (or empty); None on a single node.
    """
    host, port, deadline = dist_env.master, dist_env.port, time.monotonic() + timeout
    peer = {"host": host, "port": port, "error": ""}
    with contextlib.ExitStack() as stack:
        try:
            if dist_env.rank:
                _connect(host, port, deadline)
            elif dist_env.nodes > 1:
                server = stack.enter_context(_listen(port))
                stack.callback(_accept, server, dist_env.nodes - 1, deadline)
        except OSError as error:
            peer["error"] = f"{host}:{port}: {error.strerror or error}"
        yield peer if dist_env.nodes > 1 else None


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 is switched off; a port that is in use fails again below
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=256)


def _accept(server: socket.socket, connections: int, deadline: float) -> None:
    with contextlib.suppress(TimeoutError):
        for _ in range(connections):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            server.accept()[0].close()


def _connect(host: str, port: int, deadline: float) -> None:
    """Connect to a task that may not listen yet."""
    while True:
        try:
            return socket.create_connection((host, port), _REPLY_TIMEOUT).close()
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


if __name__ == "__main__":
    run_probe(sys.argv[1])
