"""The exceptions that cross rooms; `UserError` is the one that is shown to a user without a traceback."""

from __future__ import annotations

import difflib

EXIT_REQUEUE = (
    75  # exit code of a task that can go on when its job is started again (EX_TEMPFAIL of sysexits.h)
)


class UserError(Exception):
    """Something a user can mend: one line that says what is wrong, where, and what would be right.

    The door prints `error: <line>` and exits with 2; a job writes the line into its outcome and exits
    with 1. Raise it for bad input only: a defect of this package keeps its traceback.

    Attributes:
        printed: from Python, what a verb had printed by then, such as all that the doctor found.
    """

    printed = ""


class Preempted(Exception):
    """A stage was asked to stop by a signal and has saved its work; the job is to be requeued."""


class PeerLost(Exception):
    """Another task of this job is gone, so this one cannot go on; the job is to be requeued."""


class Superseded(Exception):
    """Another copy of this job, begun later, has the run: this one writes nothing more and ends."""


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".!")


def did_you_mean(name: str, valid: tuple[str, ...] | list[str]) -> str:
    """Return the words `; near: a, b` for a misspelt name, or all valid names where there are few."""
    close = difflib.get_close_matches(name, valid, n=4, cutoff=0.5)
    if close:
        return f"; near: {', '.join(close)}"
    return f"; one of: {', '.join(valid)}" if len(valid) <= 12 else ""
