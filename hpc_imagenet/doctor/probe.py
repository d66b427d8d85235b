"""The probe: every task of its job measures what it has and writes one report file; it judges nothing.

runs/.doctor/<time>/<stage>/
    request.json        what to measure, written by the doctor
    report-<rank>.json  written by each task when it starts, and replaced when it is complete
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.metadata
import json
import os
import platform
import re
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from hpc_imagenet import __version__
from hpc_imagenet.cluster.dist_env import DistEnv, from_environment
from hpc_imagenet.doctor.check_result import NO_RESULT, gigabytes
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.io.atomic_files import write_json

PEER_TIMEOUT = 20.0  # s in which the tasks of all nodes must connect to rank 0
IMPORT_TIMEOUT = 300.0  # s; torch has thousands of files, and a cold file system takes minutes for them
_REPLY_TIMEOUT = 10.0  # s for a server
_DRIVER_TIMEOUT = 60.0  # s for nvidia-smi
_KERNEL_TIMEOUT = 120.0  # s for all GPUs, which compute at the same time; torch has been read by then
_KILL_TIMEOUT = 5.0  # s for the end of a process that was killed
_MIN_FREE_BYTES, _MIN_FREE_INODES = 10**9, 10_000  # a folder with less counts as full

# Prints the name of each module before its import, and what is known of torch before it calls the driver:
# after a crash the last line shows what failed. The names of GPUs need no context on them.
_IMPORT_SCRIPT = """
import importlib, json, sys
for module in sys.argv[1:]:
    print(module, flush=True)
    importlib.import_module(module)
if torch := sys.modules.get("torch"):
    found = {"torch": [], "problem": "", "cuda": torch.version.cuda or torch.version.hip}
    print(json.dumps(found), flush=True)
    try:
        for i in range(torch.cuda.device_count()):  # NVML counts GPUs that torch cannot use, too
            found["torch"].append(torch.cuda.get_device_name(i))
    except Exception as error:
        found["problem"] = (f"GPU {i}: " if found["torch"] else "") + (str(error) or repr(error))
    print(json.dumps(found))
"""

# A name says nothing about kernels: torch may have none for this GPU, or the GPU may be broken.
_KERNEL_SCRIPT = """
import sys, torch
try:
    (torch.ones(8, device=f"cuda:{sys.argv[1]}") + 1).sum().item()
except Exception as error:
    sys.exit((str(error) or repr(error)).splitlines()[0])
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
        report["disks"] = {name: probe_disk(path) for name, path in paths.items()}
        if request["source"]:
            report["source"] = probe_disk(Path(request["source"]), write=False)
        if request["url"]:
            report["internet"] = probe_internet(request["url"])
        if request["packages"]:
            report["packages"], torch = probe_imports(request["packages"])
            gpus = probe_gpus()
            if torch["torch"]:
                own = gpus_of_job(len(torch["torch"]), gpus["granted"], request["gpus"])
                torch["torch"], failed = probe_kernels(torch["torch"], own)
                torch["problem"] = "; ".join(filter(None, [torch["problem"], failed]))
            report["gpus"] = {**gpus, **torch}
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
        path = expand_home(path)
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
    except (OSError, UserError) as error:
        found["error"] = getattr(error, "strerror", None) or str(error)
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
        # Like urllib3, which downloads: a path may have spaces.
        parts = parts._replace(path=urllib.parse.quote(parts.path, safe="%/:=&~+!$,;'@()*[]"))
        request = urllib.request.Request(parts.geturl(), method="HEAD", headers=agent)
        with urllib.request.build_opener().open(request, timeout=_REPLY_TIMEOUT) as reply:
            return {**found, "status": reply.status}
    except urllib.error.HTTPError as error:  # also a reply
        return {**found, "status": error.code}
    except http.client.HTTPException as error:  # such as the answer of a port of TLS
        return {**found, "error": f"the reply is not HTTP: {error!r}"}
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
        torch (names of the GPUs that it finds), cuda (version that it was built for), and problem (why it
        cannot use the driver, or empty).
    """
    modules, names = zip(*(pair.split("=") for pair in packages), strict=True)
    output, error = _run(sys.executable, "-c", _IMPORT_SCRIPT, *modules, timeout=timeout)
    last = (output.splitlines() or ["python"])[-1]
    versions = {name: package_version(name) for name in names}
    if not last.startswith("{"):
        error = error and f"import of {last}: {error}"
        return {"versions": versions, "error": error}, {"torch": None, "cuda": None}
    gpus = json.loads(last)  # all packages were imported: an error is one of the driver
    return {"versions": versions, "error": ""}, {**gpus, "problem": _reason(error or gpus["problem"])}


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


def gpus_of_job(found: int, granted: int | None, at_most: int | None) -> int:
    """Return how many of the GPUs that torch finds, from the first, may compute: none of another job.

    Where Slurm does not confine a job to its devices, one without CUDA_VISIBLE_DEVICES finds all of the node.

    Args:
        found: GPUs that torch finds.
        granted: GPUs granted by Slurm, None if unknown.
        at_most: at most so many; None: all of the job.
    """
    if "SLURM_JOB_ID" in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ:
        found = min(found, granted or 0)
    return found if at_most is None else min(found, at_most)


def probe_kernels(
    names: Sequence[str], count: int, timeout: float = _KERNEL_TIMEOUT
) -> tuple[list[str], str]:
    """Run a kernel on each of the first `count` GPUs, at the same time, within `timeout` s.

    Each has a process of its own: after an error of CUDA a process can use no GPU at all, and a GPU that
    hangs must not hide the others.

    Returns:
        `names` without those of the GPUs that failed, and the errors of those GPUs (or empty).
    """

    def error_of(index: int) -> str:
        return _reason(_run(sys.executable, "-c", _KERNEL_SCRIPT, str(index), timeout=timeout)[1])

    with ThreadPoolExecutor(max(1, count)) as threads:
        errors = [*threads.map(error_of, range(count)), *[""] * (len(names) - count)]
    failed: dict[str, list[str]] = {}
    for index, error in enumerate(errors):
        failed.setdefault(error, []).append(str(index))
    problems = [f"GPU {' '.join(indices)}: {error}" for error, indices in failed.items() if error]
    return [name for name, error in zip(names, errors, strict=True) if not error], "; ".join(problems)


def _reason(message: str) -> str:
    """Return what torch's message about a GPU says in its first sentence, or the error of CUDA in it."""
    line = next(iter(message.strip().splitlines()), "")
    if cuda := re.search(r"Error \d+: .+", line):
        return cuda[0]
    return re.split(r"\. (?=[A-Z])", line)[0].rstrip(".")


def _run(*command: str, timeout: float) -> tuple[str, str]:
    """Return the stdout of a command and its error, or an empty string."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return "", f"no {command[0]} ({error.strerror})"
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot be killed
            process.communicate(timeout=_KILL_TIMEOUT)
        output = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else ""
        return output, f"{NO_RESULT} {timeout:.0f} s"
    if process.returncode < 0:
        return stdout, f"killed by {signal.Signals(-process.returncode).name}"
    lines = (stderr.strip() or stdout.strip() or "failed").splitlines()
    return stdout, lines[-1] if process.returncode else ""


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
