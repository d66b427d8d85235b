"""What the items of gpu.py share: their options, and how they report a line.

An item runs in a process of its own. Each line that it reports is a JSON object behind `MARK` on its stdout,
which gpu.py prints as text at once and keeps in gpu.json; all other output is shown only if the item fails.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MARK = "@gpu "


@dataclass(frozen=True)
class Options:
    """Options of an item.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        toy: whether to use the smallest sizes that run all of the code; figures then mean nothing.
        folder: where the item may write; it is shared by all items of a run.
        timm: timm's benchmark.py; None: it is not there.
    """

    device: str
    toy: bool
    folder: Path
    timm: Path | None = None


def report(line: str, ok: bool | None = None, **figures: float | str | list[float]) -> None:
    """Print one result.

    Args:
        line: the text, without a line break.
        ok: whether a check passed; None: it is a figure, not a check.
        figures: the same as numbers, for gpu.json.
    """
    print("\n" + MARK + json.dumps({"line": line, "ok": ok, **figures}), flush=True)
