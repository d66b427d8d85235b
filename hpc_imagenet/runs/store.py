"""The record: one folder a run, the only place that the door and the jobs both write.

    runs/<signature>-<label>/
        config.yaml        frozen at submission
        run.json           stage, model, label, needs, processing_run (see plan.Job), created
        attempts/<n>/      submitted.json, process.json (local), started.json, outcome.json, logs
        lease.json        which start of a job may write here (fence.py)
        progress.json      how far it is; replaced every second or so
        …                  metrics and checkpoints of a training

An attempt is claimed by making its folder and ends by its outcome, which is written once: the first writer
wins. What is written here is the truth about ended attempts; for the others `states.py` asks whoever runs
them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from hpc_imagenet.config.schema import Cluster, Config, cluster_from, from_dict
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write, read_json, write_json, write_json_once
from hpc_imagenet.runs.lease import Lease, restart_count

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED = "queued", "running", "finished", "failed", "cancelled"
ENDED = (FINISHED, FAILED, CANCELLED)
_TAIL = 1 << 16  # bytes
_SLURMS = ("srun: ", "slurmstepd: ", "submitit ERROR")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; `result` is what the stage returned, such as top1 (0 to 1)."""

    state: str  # one of ENDED
    reason: str = ""  # one line: why it failed or was cancelled
    result: dict[str, Any] | None = None
    time: str = ""  # ISO 8601, UTC


@dataclass(frozen=True)
class Attempt:
    """One try at a run, in `attempts/<number>/`."""

    folder: Path

    @property
    def number(self) -> int:
        """Count from 1."""
        return int(self.folder.name)

    @property
    def submitted(self) -> dict[str, Any]:
        """Who runs it: executor, job_id, logs, host, code … Empty until the submission is through."""
        return read_json(self.folder / "submitted.json") or {}

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None."""
        raw = read_json(self.folder / "outcome.json")
        return None if raw is None else Outcome(**raw)

    def submit(self, executor: str, **details: Any) -> None:
        """Note who will run this attempt."""
        write_json(self.folder / "submitted.json", {"executor": executor, "time": now(), **details})

    def start(self, **details: Any) -> None:
        """Note that the job has begun on a node; a requeued job notes it again."""
        write_json(
            self.folder / "started.json",
            {"time": now(), "host": socket.gethostname(), "restarts": restart_count(), **details},
        )

    @property
    def started(self) -> dict[str, Any]:
        """Where and when the job began: time, host, restarts. Empty until then."""
        return read_json(self.folder / "started.json") or {}

    def end(self, state: str, reason: str = "", result: dict[str, Any] | None = None) -> bool:
        """Write the outcome; False if this attempt has one already, which then stands."""
        outcome = Outcome(state, reason, result, now())
        return write_json_once(self.folder / "outcome.json", asdict(outcome))

    def logs(self) -> list[Path]:
        """Return the log files there are: stdout and stderr of every task, rank 0 first."""
        submitted = self.submitted
        folder = Path(submitted.get("logs", self.folder))
        job = submitted.get("job_id") or (read_json(self.folder / "process.json") or {}).get("job_id", "*")
        return sorted(path for end in ("out", "err") for path in folder.glob(f"{job}_*log.{end}"))

    def error_tails(self) -> Iterator[list[str]]:
        """Yield the last lines of the errors of each task, rank 0 first."""
        for log in self.logs():
            if log.suffix == ".err":
                with log.open("rb") as file:
                    file.seek(max(0, log.stat().st_size - _TAIL))
                    text = file.read()
                yield text.decode(errors="replace").strip().splitlines()

    def last_error_line(self) -> str:
        """Return the last line of its errors, if that line names an error; else nothing."""
        for told in self.error_tails():
            # What srun and Slurm say behind it is that the task is gone, not why.
            lines = [line.strip() for line in told if not line.startswith(_SLURMS)]
            if lines and any(word in lines[-1] for word in ("Error", "Exception", "error:")):
                return lines[-1].removeprefix("error: ")
        return ""


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.lease: Lease | None = None  # of the job that is at work on it in this process

    @property
    def info(self) -> dict[str, Any]:
        """What was asked for: stage, model, label, needs (run ids), created."""
        return read_json(self.folder / "run.json") or {}

    def config(self) -> Config:
        """Return the frozen config."""
        return from_dict(self.frozen())

    def cluster(self) -> Cluster:
        """Return the cluster settings of the run's stage; much cheaper than all of `config`."""
        frozen = self.frozen()
        return cluster_from(frozen, frozen["stage"]["name"])

    def frozen(self) -> dict[str, Any]:
        """Return the frozen config as plain values, of whatever version of the package wrote it."""
        with (self.folder / "config.yaml").open("rb") as file:
            values: dict[str, Any] = yaml.load(file, Loader=_Loader)
        return values

    def attempts(self) -> list[Attempt]:
        """Return all attempts, oldest first."""
        try:
            found = list((self.folder / "attempts").iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        numbered = [folder for folder in found if folder.name.isdigit()]  # the others are not ours
        return [Attempt(folder) for folder in sorted(numbered, key=lambda folder: int(folder.name))]

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt; its state is the run's."""
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def new_attempt(self) -> Attempt:
        """Claim the next attempt; of several callers at once each gets its own number."""
        last = self.attempt
        number = last.number + 1 if last else 1
        while True:
            folder = self.folder / "attempts" / str(number)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return Attempt(folder)

    @property
    def progress(self) -> dict[str, Any]:
        """How far it is: done, total, unit, rate (a second), note, time. Empty before the first word."""
        return read_json(self.folder / "progress.json") or {}


class Progress:
    """Tells the record how far a stage is, at most once a second.

    Raises:
        Superseded: another copy of the job has taken the run over.
    """

    def __init__(self, run: Run, every: float = 1.0) -> None:
        self._path = run.folder / "progress.json"
        self._fence = run.lease
        self._every = every
        self._last = float("-inf")
        self._begin = time.monotonic()
        self._first: float | None = None

    def __call__(self, done: float, total: float | None = None, unit: str = "", note: str = "") -> None:
        """Note that `done` of `total` `unit`s are there. The rate counts from the first call."""
        moment = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, moment
        if moment - self._last < self._every and done != total:
            return
        self._last = moment
        if self._fence:
            self._fence.check()
        elapsed = moment - self._begin
        rate = (done - self._first) / elapsed if elapsed > 0 else None
        write_json(
            self._path,
            {"done": done, "total": total, "unit": unit, "rate": rate, "note": note, "time": now()},
        )


class RunStore:
    """All runs of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self.folder = workspace / "runs"

    def run(self, run_id: str) -> Run:
        """Return the run of that id, whether it exists or not."""
        return Run(self.folder / run_id)

    def all(self) -> list[Run]:
        """Return all runs, oldest first."""
        if not self.folder.is_dir():
            return []
        names = [e.name for e in os.scandir(self.folder) if e.is_dir() and not e.name.startswith(".")]
        runs = [Run(self.folder / name) for name in names]
        return sorted(runs, key=lambda run: (run.info.get("created", ""), run.id))

    def find(self, prefix: str) -> Run:
        """Return the one run whose id or label begins with `prefix`.

        Raises:
            UserError: none, or several.
        """
        runs = self.all()
        found = [r for r in runs if prefix in (r.id, r.info.get("label"))] or [
            r for r in runs if r.id.startswith(prefix) or r.info.get("label", "").startswith(prefix)
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(f"no run {prefix} in {self.folder}: python -m hpc_imagenet jobs lists them")
        raise UserError(f"{prefix} may be {' or '.join(run.id for run in found)}: give more of it")

    def create(self, run_id: str, config: dict[str, Any], info: dict[str, Any]) -> Run:
        """Make the run's folder, or bring an unfinished run's frozen config up to what is asked now."""
        run = self.run(run_id)
        run.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(run.folder / "config.yaml") as file:
            file.write(yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode())
        created = run.info.get("created", now())
        write_json(run.folder / "run.json", {**info, "created": created})
        return run


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


# Written in C these do the same several times faster; a sweep freezes a hundred configs.
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
