"""When the attempts of a run were queued, running and requeued, and on which nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpc_imagenet.runs.attempt import QUEUED, RUNNING, Attempt, instant
from hpc_imagenet.runs.usage_records import last_seen

REQUEUED = "requeued"  # in the queue again, after it has run


@dataclass(frozen=True)
class Interval:
    """A part of an attempt: `kind` is queued, running or requeued; begin and end in s since 1970."""

    kind: str
    begin: float
    end: float


def intervals(attempt: Attempt, state: str = "") -> list[Interval]:
    """Return the intervals of an attempt, in order.

    A start that was requeued, or that left no outcome, ends when it was last known to run. Where a clock has
    jumped back, an interval is empty rather than negative.

    Args:
        attempt: the attempt.
        state: the state of the run, of its newest attempt: if queued or running, the last interval ends now.
    """
    submitted, outcome, starts = attempt.submitted, attempt.outcome, starts_of(attempt)
    ended = seconds_since_1970(outcome.time if outcome else None)
    stopped = ended  # when the last start stopped; later the attempt may be in the queue again
    if ended is None:
        seen = last_seen(attempt)
        stopped = seen.timestamp() if seen else None
        ended = time.time() if state in (QUEUED, RUNNING) else stopped
        stopped = ended if state == RUNNING else stopped
    begin = seconds_since_1970(submitted.get("time"))
    found: list[Interval] = []
    for number, start in enumerate(starts):
        at = seconds_since_1970(start.get("time"))
        if at is None:
            continue
        if begin is not None:
            found.append(_interval(REQUEUED if found else QUEUED, begin, at))
        if number + 1 < len(starts):
            begin = max(at, seconds_since_1970(start.get("stopped")) or at)
            found.append(_interval(RUNNING, at, begin))
        elif stopped is not None and ended is not None:
            found.append(_interval(RUNNING, at, stopped))
            if stopped < ended:
                found.append(_interval(REQUEUED, stopped, ended))
    if not starts and begin is not None and ended is not None:
        found.append(_interval(QUEUED, begin, ended))
    return found


def starts_of(attempt: Attempt) -> list[dict[str, Any]]:
    """Return the starts of an attempt, oldest first: time, host, nodes; of requeued ones also stopped."""
    started = attempt.started
    earlier = started.get("earlier")
    starts = [*(earlier if isinstance(earlier, list) else ()), *([started] if started else ())]
    return [start for start in starts if isinstance(start, dict)]


def nodes_of(attempt: Attempt) -> list[str]:
    """Return where an attempt has run, each place once, as Slurm writes nodes: `n1`, `n[1-4]`."""
    named = [start.get("nodes") or start.get("host") for start in starts_of(attempt)]
    return list(dict.fromkeys(str(name) for name in named if name))


def running_hours(parts: Sequence[Interval]) -> float:
    """Return the hours in which a job was running."""
    return sum(part.end - part.begin for part in parts if part.kind == RUNNING) / 3600


def seconds_since_1970(text: Any) -> float | None:
    """Return an ISO 8601 time as s since 1970; None if there is none or it is damaged."""
    moment = instant(text)
    return moment.timestamp() if moment else None


def _interval(kind: str, begin: float, end: float) -> Interval:
    return Interval(kind, begin, max(begin, end))
