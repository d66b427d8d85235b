"""Cache of what was read of runs that have ended, in one file per kind.

The records of 10,000 runs are 50,000 small files: seconds on a disk, minutes on a network file system. A run
that has ended changes only when it is submitted again, or when what Slurm knows of it is kept, which changes
the modification time of its folder or of `attempts/`. The cache file in `runs/.user-<uid>/` holds both times
beside what was read. It may be deleted at any time.
"""

from __future__ import annotations

import abc
import contextlib
import json
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.runs.concurrent_reads import read_concurrently
from hpc_imagenet.runs.store import Run, RunStore

_SETTLED = 2.0  # s since the last change of a run: some file systems round their times to a second

_Times = tuple[int, int]  # modification times in ns: of the run's folder, of its attempts/
_T = TypeVar("_T")


class EndedRunCache(abc.ABC, Generic[_T]):
    """One value per run of a workspace; those of ended runs come from the cache file where it is current.

    A cache file that is missing, damaged or of another version is replaced. One that this user may not write
    is only read.
    """

    file: str  # name of the cache file
    version: int | str  # changed when `encode` or what `read_run` finds changes

    @abc.abstractmethod
    def read_run(self, run: Run) -> tuple[_T, bool]:
        """Return the value of a run, and whether it is final: the run has ended."""

    @abc.abstractmethod
    def encode(self, value: _T) -> list[Any]:
        """Return a value as JSON."""

    @abc.abstractmethod
    def decode(self, encoded: list[Any]) -> _T:
        """Return the value that was encoded."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._path = store, store.own_folder / self.file
        self._entries: dict[str, tuple[_Times, _T]] = {}
        self._unsaved = 0
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            self._entries = self._decode_file(self._path.read_bytes())

    def read(self, runs: Sequence[Run]) -> dict[str, _T]:
        """Return the value of each run by its id, without those that this user may not read."""
        # Before the records are read: a change in between makes an entry outdated, not wrong.
        times = dict(zip(runs, read_concurrently(_modification_times, runs), strict=True))
        values = {
            run: entry[1] for run in runs if (entry := self._entries.get(run.id)) and entry[0] == times[run]
        }
        changed = [(run, times[run]) for run in runs if run not in values]
        for (run, last), found in zip(changed, read_concurrently(self._read, changed), strict=True):
            if found:
                values[run], is_final = found
                if last and is_final:
                    self._entries[run.id] = last, values[run]
                    self._unsaved += 1
        return {run.id: values[run] for run in runs if run in values}

    def _read(self, changed: tuple[Run, _Times | None]) -> tuple[_T, bool] | None:
        """Return the value of a run and whether it may be kept, or None if this user may not read the run."""
        run, times = changed
        try:
            value, is_final = self.read_run(run)
        except PermissionError:
            self._store.leave_out(run)
            return None
        return value, bool(is_final and times and abs(time.time() - max(times) / 1e9) > _SETTLED)

    def save(self, runs: Iterable[Run]) -> None:
        """Write the cache file if much of it is new. `runs`: all of the workspace; others are dropped."""
        if self._unsaved <= len(self._entries) // 100:
            return  # so few are read faster than the file is written
        self._unsaved = 0
        kept = {
            run.id: [*entry[0], *self.encode(entry[1])]
            for run in runs
            if (entry := self._entries.get(run.id)) is not None
        }
        content = json.dumps({"version": self.version, "runs": kept}, separators=(",", ":")).encode()
        with contextlib.suppress(OSError, UserError):
            self._store.make_own_folder()
            with atomic_write(self._path) as file:
                file.write(b"%08x\n" % zlib.crc32(content) + content)

    def _decode_file(self, encoded: bytes) -> dict[str, tuple[_Times, _T]]:
        """Return the entries of a cache file; none if it is damaged or of another version."""
        checksum, _, content = encoded.partition(b"\n")
        if (
            int(checksum, 16) != zlib.crc32(content)
            or (read := json.loads(content))["version"] != self.version
        ):
            return {}
        return {
            run_id: ((folder, attempts), self.decode(fields))
            for run_id, (folder, attempts, *fields) in read["runs"].items()
        }


def _modification_times(run: Run) -> _Times | None:
    with contextlib.suppress(OSError):
        return run.folder.stat().st_mtime_ns, (run.folder / "attempts").stat().st_mtime_ns
    return None
