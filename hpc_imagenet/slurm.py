"""Asking Slurm: squeue for what is in the queue, sacct for what has left it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

from hpc_imagenet.runs import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING

_STATES = {
    "PENDING": QUEUED,
    "CONFIGURING": QUEUED,
    "REQUEUED": QUEUED,
    "REQUEUE_HOLD": QUEUED,
    "REQUEUE_FED": QUEUED,
    "RESIZING": RUNNING,
    "RUNNING": RUNNING,
    "COMPLETING": RUNNING,
    "SIGNALING": RUNNING,
    "STAGE_OUT": RUNNING,
    "STOPPED": RUNNING,
    "SUSPENDED": RUNNING,
    "PREEMPTED": FAILED,
    "BOOT_FAIL": FAILED,
    "DEADLINE": FAILED,
    "FAILED": FAILED,
    "NODE_FAIL": FAILED,
    "OUT_OF_MEMORY": FAILED,
    "TIMEOUT": FAILED,
    "CANCELLED": CANCELLED,
    "REVOKED": CANCELLED,
    "COMPLETED": FINISHED,
}


def reachable() -> bool:
    """Whether Slurm's commands are on the PATH."""
    return shutil.which("squeue") is not None


def this_job() -> str | None:
    """Return the id of the Slurm job that this process is part of, `123` or `123_4`, or None."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def ask(job_ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return (state, reason) of each job that Slurm still knows; ids as `123` or `123_4` for an array's task.

    squeue is right at once about what is in the queue; sacct may lag and show passing states, so it is asked
    only for what squeue no longer has. A job that ended well by Slurm's word and wrote no outcome did not
    end well: its state is failed.
    """
    wanted = set(job_ids)
    if not wanted or not reachable():
        return {}
    mains = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    queue = _lines(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={mains}"]
    )
    answers = {job: _told(name, reason) for job, name, reason in queue if job in wanted}
    left = sorted(wanted - answers.keys())
    if left and shutil.which("sacct"):
        fields = "--format=JobID,State,ExitCode"
        mains = ",".join(left)
        for job, name, code in _lines(
            ["sacct", "--noheader", "--parsable2", "--allocations", fields, f"--jobs={mains}"]
        ):
            if job in wanted:
                answers[job] = _told(name, f"exit code {code}")
    return answers


def _lines(command: list[str]) -> list[list[str]]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]


def _told(name: str, reason: str) -> tuple[str, str]:
    word = name.split()[0] if name else ""  # sacct says `CANCELLED by 1000`
    state = _STATES.get(word, RUNNING)
    if state == FINISHED:
        return FAILED, "Slurm calls it completed, but it left no outcome"
    if state in (FAILED, CANCELLED):
        return state, f"Slurm: {name.lower().replace('_', ' ')} ({reason})"
    return state, reason if state == QUEUED and reason != "None" else ""
