"""What a node finds out about itself when the doctor asks; every task of the probe's job comes through here.

    runs/.doctor/<time>/<stage>/
        ask.json            what is to be found out, by the doctor
        hello-<rank>.json   at once, by every task: who I am and what I was given
        echo-<rank>.json    the doctor has seen the hello, and when: for the clocks
        met-<rank>.json     this node has called all others
        report-<rank>.json  the rest, by the first task of each node

Nothing here judges; nodes.py and hardware.py do. Torch is tried in a process of its own, so that an import
which crashes is one more thing found out.
"""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet import __version__
from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.launch.dist_env import DistEnv, from_environment

PATIENCE = 20.0  # s for what another side is to do: the doctor's echo, a node's hello
IMPORTING = 120.0  # s for the imports: torch is a thousand files, and the file system may be cold
_ANSWER = 10.0  # s for a server or a node

# Imports each module named behind it and tells a line about each, so that a crash shows how far it came.
_IMPORTS = """
import importlib, importlib.metadata, json, sys
for pair in sys.argv[1:]:
    module, _, package = pair.partition("=")
    told = {"package": package, "version": None, "error": ""}
    try:
        told["version"] = importlib.metadata.version(package)
        imported = importlib.import_module(module)
        if module == "torch":
            told["cuda"] = imported.version.cuda or imported.version.hip
            told["gpus"] = [imported.cuda.get_device_name(i) for i in range(imported.cuda.device_count())]
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(told), flush=True)
"""


@dataclass(frozen=True)
class Probe:
    """The callable that submitit pickles, as `job.Task` is for a run."""

    folder: str

    def __call__(self) -> None:
        """Look around; see `look`."""
        run_probe(Path(self.folder))


def run_probe(folder: Path) -> None:
    """Say hello, find out what `ask.json` in `folder` wants to know, and report it.

    Raises:
        OSError: the folder is not here, or cannot be written.
    """
    ask = json.loads((folder / "ask.json").read_bytes())
    dist_env = from_environment()
    with _listening(dist_env) as (ports, taken):
        hello = {
            "rank": dist_env.rank,
            "size": dist_env.size,
            "nodes": dist_env.nodes,
            "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "first": dist_env.local_rank == 0,  # of its node
            "nodelist": os.environ.get("SLURM_JOB_NODELIST", ""),
            "cores": len(os.sched_getaffinity(0)),
            "visible": _visible(),
            "ports": ports,
            "taken": taken,
            "python": platform.python_version(),
            "executable": sys.executable,
            "package": __version__,
            "code": str(Path(__file__).resolve().parents[1]),
            "sent": time.time(),
        }
        write_json(folder / f"hello-{dist_env.rank}.json", hello)
        if dist_env.local_rank != 0:
            return
        report: dict[str, Any] = {"rank": dist_env.rank, "node": hello["node"]}
        report["clock"] = _clock(folder, dist_env.rank, float(str(hello["sent"])))
        report["disks"] = {"workspace": probe_disk(folder)}
        if dist_env.nodes > 1:
            report["peers"] = _peers(folder, dist_env)
    report["memory"] = probe_memory()
    for name, place in _places(ask.get("scratch")).items():
        report["disks"][name] = probe_disk(place)
    if url := ask.get("url"):
        report["internet"] = probe_internet(url)
    if source := ask.get("source"):
        report["source"] = probe_disk(Path(source), writes=False)
    if ask.get("gpus"):
        report["gpus"] = probe_gpus()
    if packages := ask.get("packages"):
        report["packages"] = probe_imports(packages)
    write_json(folder / f"report-{dist_env.rank}.json", report)


def probe_disk(path: Path, writes: bool = True) -> dict[str, Any]:
    """Return what a folder is like: path, kind (of file system), free (bytes), inodes, error.

    Inodes are None where they are not counted. `writes` tries to write in it as well; nothing is left there.
    """
    found: dict[str, Any] = {
        "path": str(path),
        "kind": filesystem_type(path),
        "free": None,
        "inodes": None,
        "error": "",
    }
    try:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "no such folder")
        room = os.statvfs(path)
        found["free"] = room.f_bavail * room.f_frsize
        found["inodes"] = room.f_favail if room.f_files else None
        if writes:
            with tempfile.TemporaryFile(dir=path) as trial:
                trial.write(b"\0" * 4096)
                trial.flush()
                os.fsync(trial.fileno())
        else:
            next(path.iterdir(), None)
    except OSError as error:
        found["error"] = error.strerror or str(error)
    return found


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds a path, such as nfs4 or ext4; empty if unknown."""
    best, found = -1, ""
    with contextlib.suppress(OSError):
        whole = path.resolve()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            place = Path(before.split()[4].replace("\\040", " "))
            depth = len(place.parts)
            if (place == whole or place in whole.parents) and depth >= best:  # the last one lies on top
                best, found = depth, after.split()[0]
    return found


def probe_memory() -> dict[str, float | None]:
    """Return the bytes of the machine, of this job's cgroup, and of Slurm's word for this node."""
    total: float | None = None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024
    told: float | None = None
    if each := os.environ.get("SLURM_MEM_PER_NODE", ""):
        told = float(each) * 2**20 if each.isdigit() else None
    elif (each := os.environ.get("SLURM_MEM_PER_CPU", "")).isdigit():
        told = float(each) * 2**20 * int(os.environ.get("SLURM_CPUS_ON_NODE", 1))
    limits = [limit for limit in _cgroup_limits() if total is None or limit < total]
    return {"total": total, "limit": min(limits, default=None), "slurm": told or None}


def probe_internet(url: str) -> dict[str, Any]:
    """Ask a server for its headers, through the environment's proxy where there is one.

    Returns:
        host, proxy (empty: none), status (of HTTP, None where there was no answer), error.
    """
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if urllib.request.proxy_bypass(host):
        proxy = ""
    # A proxy's address may hold a password.
    shown = urllib.parse.urlsplit(proxy).hostname or "" if proxy else ""
    found: dict[str, Any] = {"host": host, "proxy": shown, "status": None, "error": ""}
    agent = {"User-Agent": f"hpc-imagenet/{__version__}"}
    try:
        if not proxy:
            socket.create_connection((host, port), _ANSWER).close()
        request = urllib.request.Request(url, method="HEAD", headers=agent)
        with urllib.request.build_opener().open(request, timeout=_ANSWER) as answer:
            found["status"] = answer.status
    except urllib.error.HTTPError as error:  # it answered
        found["status"] = error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        found["error"] = getattr(reason, "strerror", None) or str(reason)
    return found


def probe_gpus() -> dict[str, Any]:
    """Return how many GPUs Slurm says it gave (None: it says nothing), and those that the driver names.

    The driver's list has name, driver and memory (MiB) for each; error says why it is empty.
    """
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    count = int(given) if given.isdigit() else _visible()
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    found: dict[str, Any] = {"given": count, "cards": [], "error": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        found["error"] = "no nvidia-smi" if isinstance(error, FileNotFoundError) else str(error)
        return found
    if done.returncode:
        found["error"] = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["nvidia-smi failed"]
        found["error"] = found["error"][0]
        return found
    for line in done.stdout.splitlines():
        name, driver, size, *_ = (*(cell.strip() for cell in line.split(",")), "", "", "")
        found["cards"].append(
            {"name": name, "driver": driver, "memory": int(size) if size.isdigit() else None}
        )
    return found


def _visible() -> int | None:
    """Return how many GPUs CUDA_VISIBLE_DEVICES leaves to this process; None where it says nothing."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else sum(part.strip() not in ("", "-1") for part in visible.split(","))


def probe_imports(packages: Sequence[str]) -> list[dict[str, Any]]:
    """Import each `module=package` in a Python of its own.

    Returns:
        For each: package, version, error; for torch also cuda (what it was built for) and gpus (names).
    """
    command = [sys.executable, "-c", _IMPORTS, *packages]
    printed, why = "", ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORTING, check=False)
        printed = done.stdout
        if done.returncode < 0:
            why = f"the import was ended by {signal.Signals(-done.returncode).name}"
        elif done.returncode:
            why = (done.stderr.strip().splitlines() or ["python failed"])[-1]
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        why = f"the import took more than {IMPORTING:.0f} s"
    told = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    for pair in packages[len(told) :]:
        told.append({"package": pair.partition("=")[2], "version": None, "error": why or "it told nothing"})
    return told


@contextlib.contextmanager
def _listening(dist_env: DistEnv) -> Iterator[tuple[list[int], str]]:
    """Listen on the port that a training would meet on, and on a free one, where there are nodes to meet.

    Yields:
        The ports, and why the first is not among them.
    """
    with contextlib.ExitStack() as kept:
        ports, taken = [], ""
        for port in (dist_env.port, 0) if dist_env.nodes > 1 and dist_env.local_rank == 0 else ():
            try:
                ports.append(kept.enter_context(_server(port)).getsockname()[1])
            except OSError as error:
                taken = f"port {port}: {error.strerror}"
        yield ports, taken


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        # Where IPv6 is switched off the machine refuses; a port that is taken is refused below once more.
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=256)


def _clock(folder: Path, rank: int, sent: float) -> dict[str, float] | None:
    """Return four moments, on two clocks: hello sent (here), seen, answered (there), echo seen (here).

    The offset of the clocks then lies within half the way there and back, as NTP has it. None: no echo came.
    """
    echo = _await(folder, [f"echo-{rank}.json"])
    return {"sent": sent, **echo[0], "back": time.time()} if echo else None


def _peers(folder: Path, dist_env: DistEnv) -> dict[str, Any]:
    """Call every other node by its name on all its ports, and stay to be called.

    Returns:
        nodes (how many others said hello where this one could see it), failed (a line each).
    """
    step = dist_env.local_size
    others = [rank for rank in range(0, dist_env.size, step) if rank != dist_env.rank]
    hellos = _await(folder, [f"hello-{rank}.json" for rank in others])
    failed = []
    for other in hellos:
        for port in other["ports"]:
            try:
                socket.create_connection((other["node"], port), timeout=_ANSWER).close()
            except socket.gaierror:
                failed.append(f"{other['node']} is no name here")
                break
            except OSError as error:
                failed.append(f"{other['node']}:{port} {error.strerror or error}")
    write_json(folder / f"met-{dist_env.rank}.json", {})
    _await(folder, [f"met-{rank}.json" for rank in others])
    return {"nodes": len(hellos), "failed": failed}


def _await(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the files of these names as soon as all are there, or those that came in time."""
    found: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + PATIENCE
    while len(found) < len(names):
        there = {
            path.name for path in folder.iterdir()
        }  # on a network file system this makes the node look again
        for name in names:
            if name in there and name not in found and (value := read_json(folder / name)) is not None:
                found[name] = value
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return [found[name] for name in names if name in found]


def _places(scratch: str | None) -> dict[str, Path]:
    """Return the node's own folders that a job may use, by the names that users know them by."""
    places: dict[str, Path] = {}
    if scratch:
        places["cluster.scratch"] = Path(os.path.expandvars(scratch)).expanduser()
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        if place := os.environ.get(name):
            places[f"${name}"] = Path(place)
    return places


def _cgroup_limits() -> Iterator[float]:
    """Yield every limit on the way from this process's cgroup to the root; of both versions of cgroups."""
    read: Callable[[Path], str] = lambda path: path.read_text().strip()  # noqa: E731
    with contextlib.suppress(OSError):
        for line in read(Path("/proc/self/cgroup")).splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory") and "memory" not in controllers.split(","):
                continue
            root = Path("/sys/fs/cgroup") if not controllers else Path("/sys/fs/cgroup/memory")
            file = "memory.max" if not controllers else "memory.limit_in_bytes"
            place = root / name.lstrip("/")
            for folder in (place, *place.parents):
                if folder == root.parent:
                    break
                with contextlib.suppress(OSError, ValueError):
                    yield float(int(read(folder / file)))  # `max` is no number


if __name__ == "__main__":
    run_probe(Path(sys.argv[1]))
