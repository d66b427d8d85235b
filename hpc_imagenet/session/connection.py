"""What a running session tells of itself in its attempt's folder; no secret is in it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.runs.store import Attempt

NOTE = "session.json"
WARNING = 600.0  # s before a session's end


@dataclass(frozen=True)
class ConnectionInfo:
    """Where a session's server listens, and until when.

    `way` is loopback, socket or address; `fingerprint` is the SHA-256 of its certificate where it speaks TLS.
    """

    host: str
    way: str
    port: int  # with a socket: the one that a tunnel takes on the other side
    socket: str | None
    fingerprint: str | None
    notebooks: str  # the folder that Jupyter shows
    ends: float  # s since 1970
    idle_minutes: float | None
    restarts: int  # of the attempt when this was written
    job: str | None = None  # as srun wants it: also in an array a number

    def save(self, attempt: Attempt) -> None:
        """Write it into the attempt's folder."""
        write_json(attempt.folder / NOTE, asdict(self))


def load_connection_info(attempt: Attempt) -> ConnectionInfo | None:
    """Return the note of the attempt's present start; None until its server answers."""
    values: dict[str, Any] | None = read_json(attempt.folder / NOTE)
    if values is None or values["restarts"] != attempt.started.get("restarts", 0):
        return None
    return ConnectionInfo(**values)


def end_warning(ends: float) -> str:
    """Return the line that warns of a session's end (s since 1970); empty while that is far."""
    left = ends - time.time()
    if left >= WARNING:
        return ""
    minutes = max(1, round(left / 60))
    clock = time.strftime("%H:%M", time.localtime(ends))
    return (
        f"this session ends in {minutes} {'minute' if minutes == 1 else 'minutes'}, at {clock}: "
        "save your work; resume takes it up again"
    )


def notebook_folder(run_folder: Path) -> Path:
    """Return the folder that Jupyter shows: it stays from one start of a session to the next."""
    return run_folder / "notebooks"
