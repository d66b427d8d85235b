"""What the error logs of an attempt show: its last error line, the last frames, and which task failed first.

Everything here is text that programs wrote: it is matched, cut and printed, and nothing else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.io.printable import one_line
from hpc_imagenet.runs.attempt import Attempt, log_rank

_MAX_LENGTH = 200  # characters of a line that are quoted
_MESSAGE = 20  # last lines of a log in which an exception with a message of several lines is looked for
_FRAMES = 2  # last frames of a traceback that are quoted
# torch writes it before each line of a traceback of a process that belongs to a group.
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ")
# The last line of a traceback, an error of this package, a line of the shell, a C++ library or Apptainer.
_ERROR = re.compile(
    r"^(?:.*\berror: |(?:\w+\.)*\w*(?:Error|Exception|KeyboardInterrupt)\b|terminate called"
    r"|Fatal Python error|FATAL: "
    r"|\S+: .*(?:command not found|No module named|No such file or directory|cannot open shared object file))"
)
# Lines that may follow it: of the error itself, of Python's fault handler, of Slurm and submitit.
_REST = re.compile(r"^(?:\s|$|srun: |slurmstepd: |submitit |Thread 0x|Current thread|Extension modules)")
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
# Lines about the memory of a GPU, in lower case: of torch, CUDA and its libraries, and of a training.
DEVICE_MEMORY_LINE = (
    r"cuda out of memory|hip out of memory|cuda error: out of memory|cuda\w* failure .*out of memory"
    r"|torch\.(?:cuda\.)?outofmemoryerror|status_alloc(?:ation)?_failed"
    r"|images at a time are too many for (?!this machine)"
)
STUCK = "this task did not exit within"  # of a task that `CheckpointCallback` has terminated after an error
_PEER = re.compile(rf"lost another task of this job|{STUCK}")
# srun names a task when it ends: `srun: error: n2: task 1: Killed`.
_SRUN = re.compile(r"^srun: error: (?P<node>[\w.-]+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)$")
_LATER = re.compile(r"^(?:Terminated|Exited with exit code 75)\b")  # ends that follow that of another task


@dataclass(frozen=True)
class FirstFailure:
    """The task that failed first: its rank or ranks, its node if that is known, and its last error line."""

    ranks: str
    node: str
    line: str

    def __str__(self) -> str:
        place = f" on {self.node}" if self.node else ""
        return f"rank {self.ranks}{place} failed first: {self.line}"


@dataclass(frozen=True)
class ErrorLogs:
    """The last lines of stderr of each task, by rank."""

    by_rank: dict[int, list[str]]

    @property
    def lines(self) -> Iterator[str]:
        """All lines, rank 0 first."""
        for lines in self.by_rank.values():
            yield from lines

    def last_error(self) -> str:
        """Return the last error line of the first task that has one which is not about another task."""
        return next(filter(None, map(_last_error, self.by_rank.values())), "")

    def last_line(self) -> str:
        """Return the last line of all, which may be the error of a program that names it in its own way."""
        return quoted(next(reversed(list(self.lines)), ""))

    def last_frames(self) -> str:
        """Return the last frames of the traceback that belongs to `last_error`: `fit in fit.py:120`."""
        for lines in self.by_rank.values():
            if _last_error(lines):
                frames = [frame for line in lines if (frame := _FRAME.match(line))][-_FRAMES:]
                shown = [f"{frame['name']} in {Path(frame['file']).name}:{frame['line']}" for frame in frames]
                return one_line(" → ".join(shown))
        return ""

    def first_failure(self) -> FirstFailure | None:
        """Return the task whose end caused that of the others; None for one task, or if that is unknown."""
        if len(self.by_rank) < 2:
            return None
        for line in self.lines:
            if (ended := _SRUN.match(line)) and not _LATER.match(ended["how"]):
                rank = ended["ranks"].split(",")[0].split("-")[0]
                own = _last_error(self.by_rank.get(int(rank), []))
                return FirstFailure(ended["ranks"], ended["node"], own or one_line(ended["how"]))
        # The others report that a task was lost. One that was killed reports nothing.
        for rank, lines in self.by_rank.items():
            if not any(map(_PEER.search, lines)):
                return FirstFailure(str(rank), "", _last_error(lines) or "it ended without an error line")
        return None


def error_logs(attempt: Attempt) -> ErrorLogs:
    """Read the ends of an attempt's error logs; a file that disappears meanwhile is left out."""
    by_rank: dict[int, list[str]] = {}
    with contextlib.suppress(OSError):
        ranks = [log_rank(path) for path in attempt.logs() if path.suffix == ".err"]
        for rank, lines in zip(ranks, attempt.error_tails(), strict=False):
            by_rank[rank] = [RANK_PREFIX.sub("", line) for line in lines]
    return ErrorLogs(by_rank)


def quoted(text: str) -> str:
    """Return text from a log as one printable line of limited length."""
    line = one_line(text)
    return line if len(line) <= _MAX_LENGTH else f"{line[: _MAX_LENGTH - 1]}…"


def _last_error(lines: Sequence[str]) -> str:
    """Return the error line with which a log ends; an earlier error may have been survived."""
    at = next((i for i in reversed(range(len(lines))) if not _REST.match(lines[i])), -1)
    ends = [at] if at >= 0 else []
    begin = next(
        (i for i in reversed(range(len(lines))) if lines[i].startswith("Traceback (most recent")), None
    )
    if begin is not None:  # the message of an exception may have several lines
        ends += range(max(begin, len(lines) - _MESSAGE), len(lines))
    for i in ends:
        if _ERROR.match(lines[i]) and not _PEER.search(lines[i]):
            return quoted(lines[i].removeprefix("error: "))
    return ""
