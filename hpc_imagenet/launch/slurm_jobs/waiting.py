"""Runs that wait because Slurm takes no more jobs of this user: what is printed about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_imagenet.launch.submission import Submitted


def describe_waiting(entries: Sequence[Submitted], command: str = "") -> str:
    """Return one line about the runs that wait, with the command that submits them; empty if there are none.

    Args:
        entries: what a submission or a retry did.
        command: the arguments of `retry`; empty: the same command again.
    """
    waiting = [entry.run for entry in entries if entry.action == "waiting"]
    if not waiting:
        return ""
    attempt = waiting[0].attempt
    reason = attempt.waiting.removeprefix("waiting: ") if attempt else ""
    count = f"{len(waiting)} of {len(entries)} runs wait" if len(entries) > 1 else "the run waits"
    again = f"python -m hpc_imagenet retry {command}" if command else "this command again"
    return f"{count}: {reason}: when jobs have ended, {again} submits more"
