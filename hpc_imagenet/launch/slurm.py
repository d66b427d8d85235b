"""Asking Slurm: squeue for what is in the queue, sacct for what has left it. Submits nothing."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import CANCELLED, ENDED, FAILED, FINISHED, QUEUED, RUNNING

_STATES = {
    "PENDING": QUEUED,
    "CONFIGURING": QUEUED,
    "REQUEUED": QUEUED,
    "REQUEUE_HOLD": QUEUED,
    "REQUEUE_FED": QUEUED,
    "SPECIAL_EXIT": QUEUED,
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
# Of squeue, in fixed width: the id may be long for a moment, and a reason names nodes.
_COLUMNS = (("jobarrayid", 48), ("state", 24), ("restartcnt", 12), ("exit_code", 12), ("reason", 160))
_PATIENCE = 60.0  # s; Slurm's own time-outs are shorter
_OLDEST = 15.0  # s that an answer serves at most
_SHARE = 0.1  # of the time that somebody has waited, for which the last answer serves

_reply_cache: dict[tuple[str, ...], tuple[float, subprocess.CompletedProcess[str]]] = {}  # when, and what


@dataclass(frozen=True)
class JobStatus:
    """What Slurm says of a job; `state` as in runs.py, or empty where Slurm did not answer."""

    state: str
    reason: str = ""
    restarts: int = 0  # how often Slurm has started it again


def is_available() -> bool:
    """Whether Slurm's commands are on the PATH."""
    return shutil.which("squeue") is not None


def this_job() -> str | None:
    """Return the id of the Slurm job that this process is part of, `123` or `123_4`, or None."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def this_step() -> str | None:
    """Return the number of the step, one srun of its job, that this process is part of, or None."""
    return os.environ.get("SLURM_STEP_ID")


def query_jobs(job_ids: Iterable[str], since: float | None = None) -> dict[str, JobStatus]:
    """Return Slurm's word on each job; ids as `123`, or `123_4` for an array's task. `since`: see `say`.

    squeue is right at once about what is in the queue; sacct may lag and show passing states, so it is asked
    only for what squeue no longer has. A job that ended well by Slurm's word and wrote no outcome did not
    end well: its state is failed. A job that Slurm has forgotten is not in the answer; where Slurm does not
    answer, every job has an answer without a state.
    """
    wanted = set(job_ids)
    if not wanted or not is_available():
        return {}
    mains = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS)
    question = ("squeue", "--noheader", "--array", "--states=all", f"--Format={columns}", f"--jobs={mains}")
    done = run_command(*question, since=since)
    if done.returncode and "Invalid job id" not in done.stderr:  # of one job that is gone, squeue says that
        why = (done.stderr.strip().splitlines() or ["squeue failed"])[-1].removeprefix("slurm_load_jobs ")
        return {job: JobStatus("", f"Slurm does not answer ({why})") for job in wanted}
    answers = {}
    for job, name, restarts, status, reason in map(_columns, done.stdout.splitlines()):
        if job in wanted:
            code = f"{int(status) >> 8}:{int(status) & 0x7F}" if status.isdigit() else ""
            answers[job] = _status_from(name, reason, code, int(restarts) if restarts.isdigit() else 0)
    left = sorted(wanted - answers.keys())
    if left and shutil.which("sacct"):
        fields = "--format=JobID,State,ExitCode"
        question = ("sacct", "--noheader", "--parsable2", "--allocations", fields, f"--jobs={','.join(left)}")
        for line in run_command(*question, since=since).stdout.splitlines():
            job, name, code, *_ = (*line.split("|"), "", "")
            told = _status_from(name, "", code)
            if job in wanted and told.state in ENDED:  # what squeue does not have is not running
                answers[job] = told
    return answers


def own_job_state() -> str:
    """Return Slurm's word for the job that this process is part of, such as RUNNING; empty if unknown."""
    job = this_job()
    if job is None or not is_available():
        return ""
    return run_command("squeue", "--noheader", "--format=%T", f"--jobs={job}").stdout.strip()


def end_time() -> float | None:
    """Return when Slurm will end the job that this process is part of, s since 1970; None if it will not."""
    job = this_job()
    return (
        None
        if job is None
        else _time(run_command("squeue", "--noheader", "--format=%e", f"--jobs={job}").stdout)
    )


def expected_start(job_id: str, since: float | None = None) -> float | None:
    """Return when Slurm expects to start a job that waits, s since 1970; None where it does not say."""
    return _time(
        run_command("squeue", "--noheader", "--start", "--format=%S", f"--jobs={job_id}", since=since).stdout
    )


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text.strip()).timestamp()  # Slurm tells local time
    except ValueError:  # N/A, or nothing
        return None


def requeue_this_job() -> str:
    """Send the job that this process is part of back to the queue.

    Returns:
        Why it was not done; empty if it was.
    """
    _reply_cache.clear()
    done = run_command("scontrol", "requeue", str(this_job()))
    return done.stderr.strip() if done.returncode else ""


def cancel_job(job_id: str) -> None:
    """Take a job from the queue or end it, or a step `123.4`; one that is gone already is no error.

    Raises:
        UserError: Slurm refused or did not answer.
    """
    done = run_command("scancel", job_id)
    _reply_cache.clear()
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scancel {job_id}: {done.stderr.strip() or 'failed'}: ask again")


@functools.cache
def max_array_size() -> int:
    """Return how many jobs one array may have on this cluster: MaxArraySize, the highest index plus one."""
    found = re.search(
        r"^MaxArraySize\s*=\s*(\d+)", run_command("scontrol", "show", "config").stdout, re.MULTILINE
    )
    return max(1, int(found[1])) if found else 1001  # Slurm's default


def run_command(*command: str, since: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; one that cannot be run or does not end has failed, and stderr says why.

    Args:
        command: with its arguments.
        since: when the caller began to ask this again and again (`time.monotonic`). The last answer then
            serves for a tenth of the time since, 15 s at most: a controller that hundreds ask every second
            has no time for its jobs. None: ask now.
    """
    now = time.monotonic()
    if since is not None and (last := _reply_cache.get(command)):
        heard, done = last
        if now - heard < min(_OLDEST, _SHARE * (now - since)):
            return done
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (subprocess.TimeoutExpired, OSError) as error:
        done = subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error}")
    if since is not None:
        for old in [each for each, (heard, _) in list(_reply_cache.items()) if now - heard > _OLDEST]:
            _reply_cache.pop(old, None)
        _reply_cache[command] = now, done
    return done


def _columns(line: str) -> list[str]:
    cells, at = [], 0
    for _, width in _COLUMNS:
        cells.append(line[at : at + width].strip())
        at += width
    return cells


def _status_from(name: str, reason: str, code: str, restarts: int = 0) -> JobStatus:
    """Return the answer for Slurm's words; `code` is the exit code and, behind a colon, the signal."""
    word = name.split()[0] if name else ""  # sacct says `CANCELLED by 1000`
    state = _STATES.get(word, RUNNING)
    if state == FINISHED:
        return JobStatus(FAILED, "Slurm calls it completed, but it left no outcome", restarts)
    if state in (FAILED, CANCELLED):
        more = f"exit code {code}" if state == FAILED else reason.split(",")[0]
        # Of a cancelled job only one reason says why: what it waited for has failed.
        shown = state == FAILED or more.startswith("Dependency")
        return JobStatus(state, f"Slurm: {name.lower().replace('_', ' ')}" + f" ({more})" * shown, restarts)
    return JobStatus(state, reason if state == QUEUED and reason != "None" else "", restarts)
