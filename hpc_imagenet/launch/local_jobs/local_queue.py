"""The job queue of this machine: its entries in the workspace, its worker, and the processes of its jobs.

    runs/.user-<uid>/queue/<host>/      of one user, who alone can read and write it
        worker.lock     locked by the one worker of this host while it runs
        worker.json     process identity of the last worker
        worker.log
        <order>.entry   a queued or running attempt: {run, attempt, job}

A job is a process tree of its own: it keeps running when the terminal or the worker ends. The entries of runs
that share a loader have the same `job`, and their processes are in one tree.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json, write_json_once
from hpc_imagenet.launch.executor import State
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, QUEUED, RUNNING, Attempt, read_record
from hpc_imagenet.runs.store import Run, RunStore

NO_OUTCOME = "ended without an outcome (killed, out of memory, or the machine restarted): retry resumes it"
GRACE = 10.0  # s between SIGTERM and SIGKILL
_CLOCK = 2.0  # s: tolerance between two readings of a process's start time


def queue_folder(store: RunStore) -> Path:
    """Return this user's queue folder on this host; each host that shares the workspace has its own."""
    return store.own_folder / "queue" / socket.gethostname()


def make_queue_folder(store: RunStore) -> Path:
    """Make the queue folder, which no other user may read: who can open a lock's file can hold it.

    Raises:
        UserError: another user could write it.
    """
    return store.make_own_folder("queue", socket.gethostname(), private=True)


def enqueue(store: RunStore, jobs: Iterable[Sequence[tuple[Run, Attempt]]]) -> None:
    """Append the attempts of jobs to the queue, in order; most jobs have one.

    Call `ensure_worker` after recording them as submitted.
    """
    folder = make_queue_folder(store)
    moment = time.time_ns()
    for number, attempts in enumerate(jobs):
        for index, (run, attempt) in enumerate(attempts):
            job = f"{moment:020d}-{number:05d}"
            write_json_once(
                folder / f"{job}-{index:05d}.entry", {"run": run.id, "attempt": attempt.number, "job": job}
            )


def ensure_worker(store: RunStore) -> None:
    """Start a worker unless one is running, in a session of its own so that it outlives the terminal."""
    if is_worker_alive(store):
        return
    folder = make_queue_folder(store)
    with (folder / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "hpc_imagenet.launch.local_jobs.local_worker", str(store.folder.parent)],
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
    """Whether a worker of this host is running: its lock is held."""
    try:
        with (queue_folder(store) / "worker.lock").open("rb") as lock:
            # A shared lock: two concurrent checks must not take each other for a worker.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without flock, where the file exists while it is locked, or after a kill
        return find_process(read_record(queue_folder(store) / "worker.json")) is not None
    return False


def is_worker_expected(store: RunStore) -> bool:
    """Whether a worker is running or starting; to report a state, not to decide whether to start one."""
    identity = read_record(queue_folder(store) / "worker.json")
    return is_worker_alive(store) or find_process(identity) is not None


def job_environment() -> dict[str, str]:
    """Return the environment of a job, with a PYTHONPATH that finds this package, installed or not.

    A job has another working directory, so relative entries of PYTHONPATH are made absolute.
    """
    inherited = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = dict.fromkeys([str(Path(__file__).resolve().parents[3]), *inherited])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def process_identity(pid: int | None = None) -> dict[str, Any]:
    """Return pid and start of a process (default: this one); pids are reused, the pair is unique."""
    process = psutil.Process(pid)
    return {"pid": process.pid, "born": process.create_time(), **_start_since_boot(process.pid)}


def _start_since_boot(pid: int) -> dict[str, Any]:
    """Return which boot of the machine it is and when the process started, in ticks after the boot.

    The start time in s changes when the clock is set, since it is computed from the ticks: proc_pid_stat(5).
    Empty where there is no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return {"boot": boot, "ticks": int(fields[19])}
    except (OSError, ValueError, IndexError):
        return {}


def record_process(attempt: Attempt, pid: int | None = None, **details: Any) -> None:
    """Record in process.json which process runs the attempt; by default this one."""
    write_json(attempt.folder / "process.json", {**process_identity(pid), **details})


def process_record(attempt: Attempt) -> dict[str, Any]:
    """Return the content of process.json; empty while the attempt is queued."""
    return read_record(attempt.folder / "process.json")


def processes(attempt: Attempt) -> list[psutil.Process]:
    """Return the running processes of the attempt on this host: submitit's controller and rank 0."""
    identities = [record for record in (process_record(attempt), attempt.started) if "pid" in record]
    return [process for identity in identities if (process := find_process(identity))]


def find_process(identity: dict[str, Any]) -> psutil.Process | None:
    """Return the process with this `process_identity`, if it is running."""
    with contextlib.suppress(psutil.NoSuchProcess, KeyError, TypeError):  # a record may be damaged
        process = psutil.Process(identity["pid"])
        start = _start_since_boot(process.pid)
        if start and "ticks" in identity:
            same = all(identity.get(key) == value for key, value in start.items())
        else:
            same = abs(process.create_time() - identity["born"]) < _CLOCK
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def is_alive(attempt: Attempt) -> bool:
    """Whether a process of the attempt is running on this host."""
    return bool(processes(attempt))


def started_elsewhere(attempt: Attempt) -> bool:
    """Whether another running process of this host has started the attempt.

    If a worker is killed after starting a job and before recording it, the next worker starts the job again.
    """
    started = attempt.started
    if "pid" not in started or started.get("host") != socket.gethostname() or started["pid"] == os.getpid():
        return False
    return find_process(started) is not None


def kill(attempt: Attempt) -> None:
    """End the attempt's processes and all their children.

    Of runs that share a loader, those of the others go on.
    """
    own = processes(attempt)
    if attempt.submitted.get("shares_with"):
        own = [process for process in own if process.pid == attempt.started.get("pid")]
    end_processes(own)


def end_processes(roots: Iterable[psutil.Process]) -> None:
    """End processes and all their children: SIGTERM, then SIGKILL after `GRACE` seconds."""
    tree: dict[int, psutil.Process] = {}
    for process in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree |= {p.pid: p for p in (process, *process.children(recursive=True))}
    for process in tree.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(list(tree.values()), timeout=GRACE)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def is_elsewhere(attempt: Attempt) -> bool:
    """Whether the attempt was submitted on another host."""
    return bool(attempt.submitted.get("host") != socket.gethostname())


def state_of_process(attempt: Attempt) -> State:
    """Return the state of an attempt by its processes; on another host as last recorded."""
    if is_elsewhere(attempt):
        name = RUNNING if attempt.started else QUEUED
        return State(name, f"as last recorded: it runs on {attempt.submitted.get('host')}")
    return State(RUNNING) if is_alive(attempt) else State(FAILED, NO_OUTCOME)


def cancel_here(run: Run, attempt: Attempt, reason: str, ended: datetime | None = None) -> None:
    """Write the outcome of an attempt of this host and end its processes.

    Raises:
        UserError: it runs on another host.
    """
    host = attempt.submitted.get("host", socket.gethostname())
    if attempt.started and host != socket.gethostname():
        raise UserError(
            f"{run.id} runs on {host}: cancel it there (if {host} no longer exists, remove {attempt.folder})"
        )
    attempt.end(CANCELLED, reason, ended=ended)  # before the process ends: the first outcome is kept
    kill(attempt)
