"""What the jobs table shows of each run, and a cache of it for runs that have ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any, NamedTuple

from hpc_imagenet.runs.attempt import Outcome
from hpc_imagenet.runs.ended_cache import EndedRunCache
from hpc_imagenet.runs.store import Run

_INFO = ("format", "stage", "model", "label", "created", "sweeps")
_SUBMITTED = ("executor", "job_id", "time", "shares_with")
_STARTED = ("time", "host", "nodes", "restarts")


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


class RecordCache(EndedRunCache[RunRecord]):
    """The records of a workspace's runs."""

    file = "ended.cache"
    version = 2  # raised when `RunRecord` or the keys that it keeps change

    def read_run(self, run: Run) -> tuple[RunRecord, bool]:
        """Read the records of a run."""
        record = read_run(run)
        return record, record.outcome is not None

    def encode(self, value: RunRecord) -> list[Any]:
        """Return the fields."""
        return [*value[:-1], astuple(value.outcome) if value.outcome else None]

    def decode(self, encoded: list[Any]) -> RunRecord:
        """Return the record of these fields."""
        return RunRecord(*[*encoded[:-1], Outcome(*encoded[-1])])


def _only(keys: Iterable[str], record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in keys if key in record}
