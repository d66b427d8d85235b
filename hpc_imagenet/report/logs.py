"""Print the logs of a run: stdout and stderr of its newest or another attempt, optionally followed.

Lines of submitit about its own work are left out, and so are escape sequences, which a terminal would obey.
The log files keep both.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import one_line, printable
from hpc_imagenet.launch.retries.diagnosis import diagnose
from hpc_imagenet.launch.states import state
from hpc_imagenet.runs.attempt import FINISHED, Attempt, log_rank
from hpc_imagenet.runs.store import Run

_POLL_INTERVAL = 0.3  # s
_BLOCK = 1 << 20  # bytes read at a time
_SUBMITIT = re.compile(r"submitit (?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \(\d{4}-\d\d-\d\d [\d:,.]+\) - ")


def show_logs(
    run: Run,
    follow: bool = False,
    rank: int | None = None,
    attempt: int | None = None,
    lines: int | None = None,
) -> None:
    """Print the logs of an attempt; with `follow`, until the run has ended.

    If the attempt has several ranks, each line begins with its rank, as `srun --label` prints it.

    Args:
        run: the run.
        follow: whether to go on until the run has ended.
        rank: the only rank whose lines are printed; None: all ranks.
        attempt: number of the attempt; None: the newest, also when it changes meanwhile.
        lines: number of last lines of each file that are printed; None: all lines.

    Raises:
        UserError: no such attempt or rank, or `lines` is negative.
    """
    if lines is not None and lines < 0:
        raise UserError(f"-n {lines}: give a number of lines, 0 or more")
    earlier = _earlier_attempt(run, attempt)
    files: dict[Path, _LogFile] = {}
    began = time.monotonic()
    while True:
        last = not follow or earlier is not None or not state(run, began).active
        shown = earlier or run.attempt
        paths = shown.logs() if shown else []
        labelled = rank is None and len({log_rank(path) for path in paths}) > 1
        for path in _of_rank(paths, rank, run) if last else paths:
            if rank is None or log_rank(path) == rank:
                log = files.setdefault(path, _LogFile(path))
                for line in log.new_lines(last, lines):
                    print(f"{log_rank(path)}: {line}" if labelled else line)
        sys.stdout.flush()
        if last:
            break
        time.sleep(_POLL_INTERVAL)
    _print_end(run, earlier, any(log.offset for log in files.values()))


def _earlier_attempt(run: Run, number: int | None) -> Attempt | None:
    """Return the attempt of this number; None for the newest."""
    attempts = run.attempts()
    if number is None or (attempts and number == attempts[-1].number):
        return None
    for attempt in attempts:
        if attempt.number == number:
            return attempt
    numbers = " ".join(str(attempt.number) for attempt in attempts) or "none yet"
    raise UserError(f"{run.id} has no attempt {number}; its attempts: {numbers}")


def _of_rank(paths: list[Path], rank: int | None, run: Run) -> list[Path]:
    found = [path for path in paths if rank is None or log_rank(path) == rank]
    if paths and not found:
        ranks = " ".join(map(str, sorted({log_rank(path) for path in paths})))
        raise UserError(f"{run.id} has no log of rank {rank}; its ranks: {ranks}")
    return found


def _print_end(run: Run, earlier: Attempt | None, has_output: bool) -> None:
    """Print how the attempt ended, to stderr, if that has a reason or there was no output."""
    outcome, final = earlier.outcome if earlier else None, state(run)
    name, reason = (outcome.state, outcome.reason) if outcome else (final.name, final.reason)
    if earlier and not outcome:
        name, reason = "ended", "without an outcome"
    found = diagnose(run, earlier, final) if name != FINISHED else None
    text = found.text if found and found.text else reason
    if text or not has_output:
        print(f"{run.id} · {name} · {one_line(text) or 'no output'}", file=sys.stderr)
    shown = earlier or run.attempt
    outcome = shown.outcome if shown else None
    advice = found.command if found else ((outcome and outcome.result) or {}).get("advice")
    if final.waiting:
        advice = f"retry {run.id} submits it when other jobs have ended"
    if advice:
        print(one_line(advice), file=sys.stderr)


class _LogFile:
    """A log file that may grow.

    Attributes:
        offset: number of bytes that have been read.
    """

    def __init__(self, path: Path) -> None:
        self.offset = 0
        self._looked = False  # also at a file that was still empty
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character
        self._rest = ""  # a line whose end has not been written yet

    def new_lines(self, last: bool, limit: int | None) -> Iterable[str]:
        """Return the lines since the last call, as printed; with `last`, an incomplete one as well.

        `limit`: of the lines that the file has at the first call, only so many are returned.
        """
        first, self._looked = not self._looked, True
        lines = (shown for line in self._read(last) if (shown := _shown(line)) is not None)
        return deque(lines, limit) if first and limit is not None else lines

    def _read(self, last: bool) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:  # the run may be deleted
            file.seek(self.offset)
            while block := file.read(_BLOCK):
                self.offset += len(block)
                *complete, self._rest = (self._rest + self._decoder.decode(block)).split("\n")
                yield from complete
        if last and (rest := self._rest + self._decoder.decode(b"", final=True)):
            self._rest = ""
            yield rest


def _shown(line: str) -> str | None:
    """Return a line as printed: of a progress bar its newest text; None for a line of submitit."""
    line = line.rstrip("\r").rpartition("\r")[2]
    return None if _SUBMITIT.match(line) else printable(line)
