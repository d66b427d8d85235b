"""Text for a table in a terminal: cells of a number of columns, and lines with colours."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

Line = list[tuple[str, str]]
"""A line of a table: its parts with their styles, which rich understands."""


def fit(text: str, width: int, right: bool = False) -> str:
    """Return text as exactly `width` columns of a terminal: filled with spaces, or cut with an ellipsis.

    Args:
        text: without line breaks.
        width: columns.
        right: whether the spaces are before the text.
    """
    taken = columns(text)
    if taken <= width:
        spaces = " " * (width - taken)
        return spaces + text if right else text + spaces
    return set_cell_size(text, width - 1) + "…" if width else ""


def columns(text: str) -> int:
    """Return the number of terminal columns that a text takes."""
    return len(text) if text.isascii() else cell_len(text)


def print_lines(lines: Iterable[Line], console: Console) -> None:
    """Print lines, in their colours on a terminal.

    Not through rich, which takes seconds for 10,000 lines; it only gives the colours.
    """
    paint: dict[str, tuple[str, str]] = {}
    for line in lines:
        text = ""
        for part, style in line:
            if style not in paint:
                paint[style] = _escape_codes(console, style)
            before, after = paint[style]
            text += before + part + after
        console.file.write(f"{text.rstrip()}\n")


def _escape_codes(console: Console, style: str) -> tuple[str, str]:
    """Return what the terminal needs before and after text of a style; empty without colours."""
    with console.capture() as captured:
        console.print(Text("|", style), end="")
    before, _, after = captured.get().partition("|")
    return before, after
