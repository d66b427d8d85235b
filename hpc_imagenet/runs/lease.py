"""The lease of a run: of several copies of its job, only the one started last may write (a fencing token).

Slurm restarts the job of a lost node, but behind a network failure the old copy may still be training. Every
start therefore takes over the lease under an increasing number (attempt, restarts), and a process checks its
lease before it writes. The lease is one small file that is read again at every check, since shared file
systems keep that coherent.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import Superseded
from hpc_imagenet.io.atomic_files import read_json, write_json

LEASE_FILE = "lease.json"
_REVOKED = 10**9  # restarts: no restart of the same attempt can take the lease back


def restart_count() -> int:
    """Return how often Slurm has requeued this job; 0 outside Slurm."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


@dataclass(frozen=True)
class Lease:
    """The lease held by one start of a run's job."""

    path: Path
    token: str

    def check(self) -> None:
        """Raise if a later start has taken over the run.

        Raises:
            Superseded: another start holds the lease.
        """
        holder = _holder(self.path)
        if holder and holder["token"] != self.token:
            raise Superseded(
                f"attempt {holder['attempt']}, started {holder['restarts'] + 1} times, has taken over on "
                f"{holder['host']}"
            )


def acquire(run_folder: Path, attempt: int) -> Lease:
    """Take over the lease of a run for this process.

    Args:
        run_folder: folder of the run.
        attempt: number of the attempt.

    Raises:
        Superseded: the holder is newer: a later attempt, or a later restart of this one.
    """
    path = run_folder / LEASE_FILE
    holder = _holder(path)
    if _is_later(holder, attempt):
        raise Superseded(f"attempt {holder['attempt']} has taken over on {holder['host']}")
    token = uuid.uuid4().hex
    start = {"attempt": attempt, "restarts": restart_count(), "host": socket.gethostname(), "token": token}
    write_json(path, start)
    return Lease(path, token)


def revoke(run_folder: Path, attempt: int) -> None:
    """Take the lease from the process that holds it for an attempt; a later attempt can acquire it.

    The process stops at its next check, within about a second.
    """
    holder = {
        "attempt": attempt,
        "restarts": _REVOKED,
        "host": socket.gethostname(),
        "token": uuid.uuid4().hex,
    }
    write_json(run_folder / LEASE_FILE, holder)


def is_superseded(run_folder: Path, attempt: int) -> bool:
    """Whether the lease is held by a later attempt, or by a later restart of this attempt's job."""
    return _is_later(_holder(run_folder / LEASE_FILE), attempt)


def _is_later(holder: dict[str, Any], attempt: int) -> bool:
    return bool(holder) and (holder["attempt"], holder["restarts"]) > (attempt, restart_count())


def _holder(path: Path) -> dict[str, Any]:
    """Return the content of a lease file; empty if there is none, or if a power failure left half of it."""
    try:
        holder: Any = read_json(path)
    except ValueError:
        return {}
    types = {"attempt": int, "restarts": int, "host": str, "token": str}
    if not isinstance(holder, dict):
        return {}
    return holder if all(isinstance(holder.get(key), types[key]) for key in types) else {}
