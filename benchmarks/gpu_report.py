"""Options of the items of gpu.py, and how they report a result.

An item runs in its own process. Each result is a JSON object after `MARK` on its stdout, which gpu.py
prints at once and saves in gpu.json; other output is shown only if the item fails.
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
        timm: timm's benchmark.py; None: not available.
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
