"""The live job table of `jobs --watch`: fills the terminal, follows its size, `q` leaves.

By curses, which sends only the characters that have changed: a few bytes per second over a slow connection.
"""

from __future__ import annotations

import contextlib
import locale
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.report.jobs_table import COLOURS, table_lines
from hpc_imagenet.report.terminal_text import Line
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, PRUNED, QUEUED, RUNNING

_INTERVAL = 2.0  # s between two readings of the runs
_SHARE = 0.1  # of the time that reading may take: 10,000 runs are read less often
_REDRAW = 12  # Ctrl-L: draw everything again
_ORDER = (RUNNING, QUEUED, FAILED, CANCELLED, PRUNED, FINISHED)


def watch_jobs(rows: Callable[[float], list[dict[str, Any]]]) -> None:
    """Show rows until `q` or Ctrl-C. Running runs are first; arrow and page keys scroll.

    Args:
        rows: returns the rows of `jobs_table.job_rows`; it is given when polling began.

    Raises:
        UserError: this is no terminal, or one that curses does not know.
    """
    try:
        import curses
    except ImportError:
        raise UserError(
            "jobs --watch: this Python has no curses: use watch -n 5 python -m hpc_imagenet jobs"
        ) from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("jobs --watch needs a terminal: use jobs --json here, or wait=true when submitting")
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    rows(time.monotonic())  # an error is printed on the normal screen
    try:
        curses.wrapper(lambda window: _Screen(curses, window).run(rows))
    except KeyboardInterrupt:
        return
    except curses.error as error:
        raise UserError(
            f"jobs --watch: {error}: set TERM to a terminal of this machine, such as xterm"
        ) from None


class _Screen:
    """The whole terminal. `curses` is the module, which not every Python has."""

    def __init__(self, curses: Any, window: Any) -> None:
        self._curses, self._window = curses, window
        self._styles = {"": curses.A_NORMAL, "bold": curses.A_BOLD}
        with contextlib.suppress(curses.error):  # a terminal without colours
            curses.use_default_colors()
            for number, name in enumerate(dict.fromkeys(COLOURS.values()), 1):
                curses.init_pair(number, getattr(curses, f"COLOR_{name.upper()}"), -1)
                self._styles[name] = curses.color_pair(number)
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        self._encoding = locale.getpreferredencoding(False)
        self._top = 0  # first row that is shown

    def run(self, rows: Callable[[float], list[dict[str, Any]]]) -> None:
        began = time.monotonic()
        while True:
            reading = time.monotonic()
            table = sorted(rows(began), key=_rank)
            took = time.monotonic() - reading
            if self._show(table, until=reading + max(_INTERVAL, took / _SHARE)):
                return

    def _show(self, table: Sequence[dict[str, Any]], until: float) -> bool:
        """Draw the table and handle keys and new sizes until then (`time.monotonic`); True: leave."""
        curses = self._curses
        while True:
            page = max(1, self._window.getmaxyx()[0] - 2)  # rows between the header and the last line
            self._top = max(0, min(self._top, len(table) - page))
            self._draw(table, page)
            self._window.timeout(max(1, int(1000 * (until - time.monotonic()))))
            key = self._window.getch()
            if key in (ord("q"), ord("Q")):  # not Escape, which begins the keys that a slow line splits
                return True
            steps = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, curses.KEY_PPAGE: -page, curses.KEY_NPAGE: page}
            steps |= {ord("k"): -1, ord("j"): 1, ord(" "): page, curses.KEY_HOME: -len(table)}
            steps |= {curses.KEY_END: len(table)}
            self._top += steps.get(key, 0)
            if key in (curses.KEY_RESIZE, _REDRAW):
                self._window.clear()  # after a change of size the terminal may have moved what it shows
            if time.monotonic() >= until:
                return False

    def _draw(self, table: Sequence[dict[str, Any]], page: int) -> None:
        width = self._window.getmaxyx()[1] - 1  # writing the last column would move the cursor to a new line
        self._window.erase()
        shown = table[self._top : self._top + page]
        for number, line in enumerate(table_lines(shown, width)):
            self._write(number, line)
        self._write(page + 1, [(summary_line(table)[:width], "bold")])
        self._window.refresh()

    def _write(self, number: int, line: Line) -> None:
        with contextlib.suppress(self._curses.error):  # the terminal has just become smaller
            self._window.move(number, 0)
            for part, style in line:
                text = part.encode(self._encoding, "replace")
                self._window.addstr(text, self._styles.get(style, self._styles[""]))


def summary_line(table: Sequence[dict[str, Any]]) -> str:
    """Return how to leave, the time of the table, and how many runs are in each state."""
    states = [row["state"] for row in table]
    counts = [f"{states.count(state):,} {state}" for state in _ORDER if state in states]
    return " · ".join(["q leaves", time.strftime("%H:%M:%S"), *(counts or ["no runs"])])


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    """Return the sort key: by state, the newest first."""
    age = row["age"]
    return _ORDER.index(row["state"]), float("inf") if age is None else age
