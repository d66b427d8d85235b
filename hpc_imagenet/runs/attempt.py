"""Attempts of runs: what was submitted, when it started, how it ended, and its logs.

An attempt is claimed by creating its folder and ends with its outcome, which is written once: the first
writer wins. For an attempt without an outcome, launch/states.py queries Slurm or the local worker.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

from hpc_imagenet.io.atomic_files import read_json, write_json, write_json_once
from hpc_imagenet.runs.lease import restart_count

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED = "queued", "running", "finished", "failed", "cancelled"
PRUNED = "pruned"  # stopped by a search with its work saved; submitted again, it is trained to its end
ENDED = (FINISHED, FAILED, CANCELLED, PRUNED)
_TAIL_BYTES = 1 << 16
_TOO_LARGE = 1e300  # JSON can hold integers for which no float is large enough


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt."""

    state: str  # one of ENDED
    reason: str = ""  # one line: why it failed or was cancelled
    result: dict[str, Any] | None = None  # return value of the stage, such as top1 (0 to 1)
    time: str = ""  # ISO 8601, UTC


_OUTCOME_KEYS = tuple(field.name for field in fields(Outcome))


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run, in `attempts/<number>/`."""

    folder: Path

    @property
    def number(self) -> int:
        """The attempt's number, from 1."""
        return int(self.folder.name)

    @property
    def submitted(self) -> dict[str, Any]:
        """The content of submitted.json; empty until it is submitted.

        Keys: executor, job_id, logs, host, code, shares_with (ids of the runs that share its loader).
        """
        return read_record(self.folder / "submitted.json")

    @property
    def waiting(self) -> str:
        """Why it is not submitted yet: a limit of submitted jobs; empty if it does not wait for one."""
        return str(read_record(self.folder / "waiting.json").get("reason", ""))

    def wait(self, reason: str) -> None:
        """Record that the executor takes no more jobs for now."""
        write_json(self.folder / "waiting.json", {"reason": reason, "time": now()})

    def end_waiting(self) -> bool:
        """Claim a waiting attempt, to submit or to cancel it; False if another process has claimed it."""
        try:
            (self.folder / "waiting.json").unlink()
        except FileNotFoundError:
            return False
        return True

    @property
    def outcome(self) -> Outcome | None:
        """The outcome, or None while it has not ended."""
        return outcome_from(self.folder / "outcome.json")

    def submit(self, executor: str, **details: Any) -> None:
        """Record the executor of this attempt in submitted.json, with `details`."""
        write_json(self.folder / "submitted.json", {"executor": executor, "time": now(), **details})

    def start(self, **details: Any) -> None:
        """Record the start of the job on a node in started.json; a requeued job records it again."""
        previous = self.started
        earlier = previous.get("earlier", [])
        if previous:  # requeued
            from hpc_imagenet.runs.usage_records import last_seen  # which imports this module

            stopped = last_seen(self)
            kept = {key: previous[key] for key in ("time", "host", "nodes") if key in previous}
            earlier = [*earlier, {**kept, "stopped": record_time(stopped) if stopped else None}]
        start = {"time": now(), "host": socket.gethostname(), "restarts": restart_count(), **details}
        write_json(self.folder / "started.json", start | ({"earlier": earlier} if earlier else {}))

    @property
    def started(self) -> dict[str, Any]:
        """The content of started.json; empty at first.

        Keys: time, host, nodes, restarts, earlier (starts), requested (resources, as `requested_by`).
        """
        return read_record(self.folder / "started.json")

    @property
    def was_requeued(self) -> bool:
        """Whether Slurm has requeued the job of this process since the attempt started."""
        recorded = self.started.get("restarts")
        return restart_count() > (recorded if isinstance(recorded, int) else 0)

    def end(
        self,
        state: str,
        reason: str = "",
        result: dict[str, Any] | None = None,
        ended: datetime | None = None,
    ) -> bool:
        """Write the outcome; False if the attempt already has one, which is kept.

        `ended` is None for now; for an attempt of this job that has not started since Slurm requeued the job,
        when it was last seen.
        """
        if ended is None and self.was_requeued:
            from hpc_imagenet.runs.usage_records import last_seen  # which imports this module

            ended = last_seen(self)
        outcome = Outcome(state, reason, result, record_time(ended) if ended else now())
        return write_json_once(self.folder / "outcome.json", asdict(outcome))

    def logs(self) -> list[Path]:
        """Return the existing log files: stdout and stderr of every task, rank 0 first."""
        submitted = self.submitted
        folder = Path(submitted.get("logs", self.folder))
        job = submitted.get("job_id") or read_record(self.folder / "process.json").get("job_id", "*")
        found = [path for end in ("out", "err") for path in folder.glob(f"{job}_*log.{end}")]
        return sorted(found, key=lambda path: (log_rank(path), path.suffix == ".err", path.name))

    def error_tails(self) -> Iterator[list[str]]:
        """Yield the last lines of each task's stderr, rank 0 first."""
        for log in self.logs():
            if log.suffix == ".err":
                yield last_lines(log)


def last_lines(log: Path, begin: int = 0) -> list[str]:
    """Return the last lines of a log, of those after its first `begin` bytes."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - _TAIL_BYTES))
        text = file.read()
    return text.decode(errors="replace").strip().splitlines()


def log_rank(path: Path) -> int:
    """Return the rank whose output a log file holds, `<job>_<rank>_log.out` or `.err`."""
    rank = path.name.rpartition("_log.")[0].rpartition("_")[2]
    return int(rank) if rank.isdigit() else 0


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; empty if there is none, or if it is damaged.

    Records are written whole, but a copy of a workspace, or a power failure, can leave half of one.
    """
    with contextlib.suppress(ValueError, NotADirectoryError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a record is a finite number, and small enough for arithmetic with other numbers."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and abs(value) < _TOO_LARGE  # which NaN is not, either


def outcome_from(path: Path) -> Outcome | None:
    """Return the outcome in `path`, or None if there is none. A damaged one is a failure, never a success."""
    try:
        raw = read_json(path)
    except ValueError:
        raw = {}
    if raw is None:
        return None
    known = {key: raw[key] for key in _OUTCOME_KEYS if key in raw} if isinstance(raw, dict) else {}
    if known.get("state") not in ENDED:
        return Outcome(FAILED, f"{path.name} of this attempt is damaged: retry resumes it")
    if not isinstance(known.get("result"), dict):
        known["result"] = None
    return Outcome(**{**known, "reason": str(known.get("reason") or "")})


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return record_time(datetime.now(timezone.utc))


def record_time(moment: datetime) -> str:
    """Return a time as records have it: ISO 8601 in UTC, to the millisecond."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds")


def instant(text: Any) -> datetime | None:
    """Return the time of an ISO 8601 text, in UTC if it names no zone; None if it is not one."""
    try:  # four times for each row of a table of thousands, where contextlib.suppress is slow
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)
