"""Who may write a run: of two copies at work on it, the one that began last.

Slurm starts the job of a lost node again, and behind the cut cable the old copy may still be training. So
every start takes the run over, under a number that only grows (attempt, restarts), and whoever is about to
write looks whether the run is still its own. One small file, read anew each time, is what shared file systems
keep coherent.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.errors import Superseded
from hpc_imagenet.io.atomic_files import read_json, write_json

LEASE_FILE = "lease.json"


def restart_count() -> int:
    """Return how often Slurm has started this job again; 0 elsewhere."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


@dataclass(frozen=True)
class Lease:
    """One start's claim to a run."""

    path: Path
    token: str

    def check(self) -> None:
        """Return if the run is still ours.

        Raises:
            Superseded: a later start has it.
        """
        holder = read_json(self.path)
        if holder is not None and holder["token"] != self.token:
            raise Superseded(
                f"attempt {holder['attempt']}, started {holder['restarts'] + 1} times, has taken over on "
                f"{holder['host']}"
            )


def acquire(run_folder: Path, attempt: int) -> Lease:
    """Take the run over from whoever has it.

    Raises:
        Superseded: who has it began later than we: a newer attempt, or a later restart of this one.
    """
    path, mine = run_folder / LEASE_FILE, (attempt, restart_count())
    holder = read_json(path)
    if holder is not None and (holder["attempt"], holder["restarts"]) > mine:
        raise Superseded(f"attempt {holder['attempt']} has taken over on {holder['host']}")
    token = uuid.uuid4().hex
    write_json(path, {"attempt": attempt, "restarts": mine[1], "host": socket.gethostname(), "token": token})
    return Lease(path, token)


def is_holder(run_folder: Path, attempt: int) -> bool:
    """Whether the newest start of the run is of this attempt and this restart of its job."""
    holder = read_json(run_folder / LEASE_FILE)
    return holder is not None and (holder["attempt"], holder["restarts"]) == (attempt, restart_count())
