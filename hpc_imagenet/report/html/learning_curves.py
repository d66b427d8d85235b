"""Learning curves of a run, from its metrics.csv, reduced to a number of points that a page can hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

# Column of metrics.csv: its key in the page.
_STEP_SERIES = {"train_loss": "train_loss", "learning_rate": "lr"}
_VAL_SERIES = {"val_loss": "val_loss", "val_top1": "top1"}
_EPOCH_SERIES = {"images_per_second": "rate", "data_wait": "wait"}

Curves = dict[str, dict[str, list[float | None]]]


def read_curves(path: Path, points: int) -> Curves:
    """Return the curves in a metrics.csv.

    Args:
        path: the file; it may be missing, or have incomplete lines, which are left out.
        points: maximum number of points of each curve.

    Returns:
        `steps` (train_loss and lr, measured within epochs), `val` (val_loss, top1) and `speed` (rate in
        images/s, wait in 0 to 1), each with `x`, in epochs. Absent where nothing was recorded.
    """
    try:
        stat = path.stat()
    except OSError:
        return {}
    return _read_unchanged(path, points, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4096)  # a page that is served live reads only what has changed
def _read_unchanged(path: Path, points: int, _modified: int, _size: int) -> Curves:
    try:
        header, *lines = path.read_text(errors="replace").splitlines() or [""]
    except OSError:  # such as no permission: another user's run
        return {}
    columns = header.split(",")
    if not {"step", "epoch"} <= set(columns):
        return {}
    # No value of this file has quotes or commas, and csv.reader takes three times as long.
    rows = [fields for line in lines if len(fields := line.split(",")) == len(columns)]
    at = {name: columns.index(name) for name in columns}
    per_epoch = _steps_per_epoch(rows, at)
    curves: Curves = {}
    for key, names in (("steps", _STEP_SERIES), ("val", _VAL_SERIES), ("speed", _EPOCH_SERIES)):
        names = {column: name for column, name in names.items() if column in at}
        if not names:
            continue
        pick = itemgetter(*(at[column] for column in names))
        found = [row for row in rows if "".join(pick(row))]
        if not found:
            continue
        kept = thin_out(found, points)
        curve = {"x": [_epochs(row, at, per_epoch) for row in kept]}
        curve |= {name: [_number(row[at[column]]) for row in kept] for column, name in names.items()}
        curves[key] = {name: values for name, values in curve.items() if any(v is not None for v in values)}
    return {key: curve for key, curve in curves.items() if "x" in curve}


def thin_out(rows: Sequence[Any], points: int) -> list[Any]:
    """Return at most `points` evenly spaced rows, with the first and the last."""
    if len(rows) <= points:
        return list(rows)
    step = (len(rows) - 1) / (points - 1)
    return [rows[round(number * step)] for number in range(points)]


def _steps_per_epoch(rows: Sequence[Sequence[str]], at: dict[str, int]) -> float | None:
    """Return the steps of an epoch by the last validation, which comes at the end of its epoch."""
    for row in reversed(rows):
        if "val_loss" in at and row[at["val_loss"]]:
            step, epoch = _number(row[at["step"]]), _number(row[at["epoch"]])
            if step and epoch is not None and epoch >= 0:
                return step / (epoch + 1)
    return None


def _epochs(row: Sequence[str], at: dict[str, int], per_epoch: float | None) -> float | None:
    step = _number(row[at["step"]])
    if per_epoch and step is not None:
        return _round(step / per_epoch)
    return _number(row[at["epoch"]])


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return _round(value) if math.isfinite(value) else None  # JSON has no NaN


def _round(value: float) -> float:
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
