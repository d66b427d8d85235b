"""Exceptions shared between packages, and helpers to word an error in one line."""

from __future__ import annotations

import difflib
from collections.abc import Collection

EXIT_REQUEUE = 75  # exit code of a task whose job should be started again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """An error that the user can fix: one line with what is wrong, where, and what to type instead.

    The command line prints `error: <line>` without a traceback and exits with 2; a job writes the line
    into its outcome and exits with 1. Raise it for bad input only: a bug of this package keeps its traceback.

    Attributes:
        printed: output of the command up to the error, when called from Python, such as the doctor's report.
    """

    printed = ""


class Preempted(Exception):
    """A signal stopped the stage, which has saved its work; the job is to be requeued."""


class PeerLost(Exception):
    """Another task of this job has ended, so this one cannot continue; the job is to be requeued."""


class Superseded(Exception):
    """A later start of this job holds the run's lease: this process must stop without writing."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".!")


def did_you_mean(name: str, valid: Collection[str]) -> str:
    """Return `; did you mean: a, b` for a misspelt name, else all valid names if there are at most 12."""
    close = difflib.get_close_matches(name, valid, n=4, cutoff=0.5)
    if close:
        return f"; did you mean: {', '.join(close)}"
    return f"; one of: {', '.join(valid)}" if 0 < len(valid) <= 12 else ""
