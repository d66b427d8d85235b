"""Durations between times of records, where clocks may have jumped, and durations as text."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone

_UNITS = (("w", 604_800), ("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))


def seconds_between(begin: datetime | None, end: datetime | None) -> float | None:
    """Return the s from `begin` to `end` (None: now), 0 if a clock has jumped back; None without a begin."""
    if begin is None:
        return None
    return max(0.0, ((end or datetime.now(timezone.utc)) - begin).total_seconds())


def clock(seconds: float | None) -> str:
    """Return a duration in s as 0:07, 12:05 or 3:04:09; empty for None."""
    if seconds is None:
        return ""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def span(seconds: float | None) -> str:
    """Return a duration in s by its largest unit: 7s, 12m, 3h, 4d or 60w; empty for None."""
    if seconds is None:
        return ""
    unit, length = next(((u, n) for u, n in _UNITS if seconds >= (2 * n if u == "w" else n)), ("s", 1))
    return f"{int(seconds // length)}{unit}"


def parse_span(text: str) -> float | None:
    """Return the s of a duration such as 90s, 30m, 12h, 2d or 1w; None if it is not one."""
    lengths = dict(_UNITS)
    number, unit = text[:-1], text[-1:]
    with contextlib.suppress(ValueError):
        if unit in lengths and 0 < float(number) < float("inf"):
            return float(number) * lengths[unit]
    return None
