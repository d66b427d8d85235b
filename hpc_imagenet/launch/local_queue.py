"""This machine as a cluster: a queue in the record, and the processes that work through it.

    runs/.queue/<host>/
        worker.lock     held by the one worker of this host while it lives
        worker.log
        <order>.entry   an attempt that waits or runs: {run, attempt}

A job is a process tree of its own; neither the terminal nor the worker takes it along when it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from hpc_imagenet.io.atomic_files import read_json, write_json, write_json_once
from hpc_imagenet.runs.store import Attempt, Run, RunStore

CPUS_VARIABLE = "HPC_IMAGENET_CPUS"  # environment variable: the CPUs that a task of a local job may use
GRACE = 10.0  # s between SIGTERM and SIGKILL
_DEVICES = Path("/dev")
_CLOCK = 2.0  # s by which two readings of one process's start may differ


def queue_folder(store: RunStore) -> Path:
    """Return this host's queue; other hosts that share the workspace have their own."""
    return store.folder / ".queue" / socket.gethostname()


def enqueue(store: RunStore, attempts: Iterable[tuple[Run, Attempt]]) -> None:
    """Put attempts at the queue's end, in order. `ensure_worker` is for when they are noted as submitted."""
    folder = queue_folder(store)
    folder.mkdir(parents=True, exist_ok=True)
    moment = time.time_ns()
    for place, (run, attempt) in enumerate(attempts):
        write_json_once(
            folder / f"{moment:020d}-{place:05d}.entry", {"run": run.id, "attempt": attempt.number}
        )


def ensure_worker(store: RunStore) -> None:
    """Start a worker unless one lives; it stands in a session of its own and outlives the terminal."""
    if is_worker_alive(store):
        return
    folder = queue_folder(store)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "hpc_imagenet.launch.local_worker", str(store.folder.parent)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=job_environment(),
            cwd="/",
            start_new_session=True,
        )
    with contextlib.suppress(psutil.NoSuchProcess):
        write_json(folder / "worker.json", process_identity(worker.pid))


def is_worker_alive(store: RunStore) -> bool:
    """Whether somebody holds the worker's lock."""
    try:
        with (queue_folder(store) / "worker.lock").open("rb") as lock:
            # Shared: of two who look at once, neither takes the other for a worker.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_worker_expected(store: RunStore) -> bool:
    """Whether a worker lives or is just starting; for telling a state, not for deciding to start one."""
    note = read_json(queue_folder(store) / "worker.json")
    return is_worker_alive(store) or (note is not None and _same(note) is not None)


def job_environment() -> dict[str, str]:
    """Return the environment for a job: this package can be imported from anywhere, installed or not.

    A job has another working directory, so relative entries of PYTHONPATH become absolute ones.
    """
    given = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = dict.fromkeys([str(Path(__file__).resolve().parents[2]), *given])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def process_identity(pid: int | None = None) -> dict[str, Any]:
    """Return what tells a process from a later one with the same number."""
    process = psutil.Process(pid)
    return {"pid": process.pid, "born": process.create_time()}


def record_process(attempt: Attempt, pid: int | None = None, **details: Any) -> None:
    """Write which process carries the attempt out; by default this one."""
    write_json(attempt.folder / "process.json", {**process_identity(pid), **details})


def process_record(attempt: Attempt) -> dict[str, Any]:
    """Return what `note_process` wrote; empty while the attempt waits."""
    return read_json(attempt.folder / "process.json") or {}


def processes(attempt: Attempt) -> list[psutil.Process]:
    """Return the living processes that carry the attempt out: the controller and the task that began it."""
    notes = [note for note in (process_record(attempt), attempt.started) if "pid" in note]
    return [process for note in notes if (process := _same(note))]


def _same(note: dict[str, Any]) -> psutil.Process | None:
    """Return the process that `identity` described, if it lives."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(note["pid"])
        born = abs(process.create_time() - note["born"]) < _CLOCK
        return process if born and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def is_alive(attempt: Attempt) -> bool:
    """Whether a process of the attempt lives on this host."""
    return bool(processes(attempt))


def started_elsewhere(attempt: Attempt) -> bool:
    """Whether another living process of this host has begun the attempt.

    A worker killed between the start of a job and its note of that leaves the next one to start it again.
    """
    note = attempt.started
    if "pid" not in note or note.get("host") != socket.gethostname() or note["pid"] == os.getpid():
        return False
    return _same(note) is not None


def kill(attempt: Attempt, grace: float = GRACE) -> None:
    """End the attempt's processes and all their children: SIGTERM, and SIGKILL after `grace` seconds."""
    tree: dict[int, psutil.Process] = {}
    for process in processes(attempt):
        with contextlib.suppress(psutil.NoSuchProcess):
            tree |= {p.pid: p for p in (process, *process.children(recursive=True))}
    for process in tree.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(list(tree.values()), timeout=grace)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def available_gpus() -> list[str]:
    """Return the GPUs that this process may hand out, as CUDA_VISIBLE_DEVICES names them; torch is not asked.

    That is by number, or as `GPU-…` and `MIG-…`. Numbers count what is there: of a container that has only
    /dev/nvidia3 it is 0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number, _ in enumerate(_DEVICES.glob("nvidia[0-9]*"))]
    names = [name.strip() for name in visible.split(",")]
    # As CUDA reads it, the first that is none, such as -1, ends the list.
    return list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))
