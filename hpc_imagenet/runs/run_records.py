"""What a table shows of each run, and a cache of it for runs that have ended.

The records of 10,000 runs are 50,000 small files: seconds on a disk, minutes on a network file system. A run
that has ended changes only when it is submitted again, which changes the modification time of its folder or
of `attempts/`. The cache file `runs/.user-<uid>/ended.cache` holds both times beside what was read. It may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import Any, NamedTuple

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.runs.attempt import Outcome
from hpc_imagenet.runs.store import Run, RunStore

CACHE_FILE = "ended.cache"
_VERSION = 2  # raised when `RunRecord` or the keys that it keeps change
_SETTLED = 2.0  # s since the last change of a run: some file systems round their times to a second
_THREADS = 16  # concurrent reads, since each is a round trip on a network file system
_INFO = ("format", "stage", "model", "label", "created", "sweeps")
_SUBMITTED = ("executor", "job_id", "time", "shares_with")
_STARTED = ("time", "host", "nodes", "restarts")

_Times = tuple[int, int]  # modification times in ns: of the run's folder, of its attempts/


class RunRecord(NamedTuple):  # a dataclass takes twice the time to make, of thousands
    """The records of a run and of its newest attempt; an empty dict where one is missing or damaged."""

    attempt: int  # number of the newest attempt; 0: none
    info: dict[str, Any]
    submitted: dict[str, Any]
    started: dict[str, Any]
    progress: dict[str, Any]
    outcome: Outcome | None


def read_run(run: Run) -> RunRecord:
    """Read the records of a run."""
    attempt = run.attempt
    return RunRecord(
        attempt=attempt.number if attempt else 0,
        info=_only(_INFO, run.info),
        submitted=_only(_SUBMITTED, attempt.submitted if attempt else {}),
        started=_only(_STARTED, attempt.started if attempt else {}),
        progress=run.progress,
        outcome=attempt.outcome if attempt else None,
    )


class RecordCache:
    """The records of a workspace's runs; those of ended runs come from the cache file where it is current.

    A cache file that is missing, damaged or of another version is replaced. One that this user may not write
    is only read.
    """

    def __init__(self, store: RunStore) -> None:
        self._store, self._path = store, store.own_folder / CACHE_FILE
        self._entries: dict[str, tuple[_Times, RunRecord]] = {}
        self._unsaved = 0
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            self._entries = _decode(self._path.read_bytes())

    def read(self, runs: Sequence[Run]) -> dict[str, RunRecord]:
        """Return the record of each run by its id, without those that this user may not read."""
        share = -(-len(runs) // _THREADS) or 1
        with ThreadPoolExecutor(_THREADS) as pool:
            shares = pool.map(self._read, (runs[at : at + share] for at in range(0, len(runs), share)))
            return {run_id: record for found in shares for run_id, record in found}

    def _read(self, runs: Iterable[Run]) -> list[tuple[str, RunRecord]]:
        found = []
        for run in runs:
            # Before the records are read: a change in between makes the entry outdated, not wrong.
            times = _modification_times(run)
            entry = self._entries.get(run.id)
            if entry and entry[0] == times:
                record = entry[1]
            else:
                try:
                    record = read_run(run)
                except PermissionError:
                    self._store.leave_out(run)
                    continue
                if record.outcome and times and abs(time.time() - max(times) / 1e9) > _SETTLED:
                    self._entries[run.id] = times, record
                    self._unsaved += 1
            found.append((run.id, record))
        return found

    def save(self, runs: Iterable[Run]) -> None:
        """Write the cache file if much of it is new. `runs`: all of the workspace; others are dropped."""
        if self._unsaved <= len(self._entries) // 100:
            return  # so few are read faster than the file is written
        self._unsaved = 0
        kept = {run.id: self._entries[run.id] for run in runs if run.id in self._entries}
        with contextlib.suppress(OSError, UserError):
            self._store.make_own_folder()
            with atomic_write(self._path) as file:
                file.write(_encode(kept))


def _modification_times(run: Run) -> _Times | None:
    with contextlib.suppress(OSError):
        return run.folder.stat().st_mtime_ns, (run.folder / "attempts").stat().st_mtime_ns
    return None


def _encode(entries: dict[str, tuple[_Times, RunRecord]]) -> bytes:
    runs = {run_id: [*times, *_fields(record)] for run_id, (times, record) in entries.items()}
    content = json.dumps({"version": _VERSION, "runs": runs}, separators=(",", ":")).encode()
    return b"%08x\n" % zlib.crc32(content) + content


def _decode(encoded: bytes) -> dict[str, tuple[_Times, RunRecord]]:
    """Return the entries of a cache file; none if it is damaged or of another version."""
    checksum, _, content = encoded.partition(b"\n")
    if int(checksum, 16) != zlib.crc32(content) or (read := json.loads(content))["version"] != _VERSION:
        return {}
    return {
        run_id: ((folder, attempts), RunRecord(*[*fields, Outcome(*outcome)]))
        for run_id, (folder, attempts, *fields, outcome) in read["runs"].items()
    }


def _fields(record: RunRecord) -> list[Any]:
    return [*record[:-1], astuple(record.outcome) if record.outcome else None]


def _only(keys: Iterable[str], record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in keys if key in record}
