"""The validations in a training's metrics.csv."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any


def validation_rows(path: Path) -> list[dict[str, Any]]:
    """Return step, epoch (from 1), top1, top5 (0 to 1) and loss of each validation in a metrics.csv."""
    rows = []
    # A power failure can leave bytes that are no text.
    with (
        contextlib.suppress(FileNotFoundError, csv.Error),
        path.open(newline="", errors="replace") as file,
    ):
        for line in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # being written, or no validation
                scores = {name: float(line[f"val_{name}"]) for name in ("top1", "top5", "loss")}
                rows.append({"step": int(line["step"]), "epoch": int(line["epoch"]) + 1, **scores})
    return rows
