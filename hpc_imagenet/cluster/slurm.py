"""Query and control Slurm jobs: squeue, sacct, scancel, scontrol. Submission is in sbatch.py."""

from __future__ import annotations

import functools
import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import CANCELLED, ENDED, FAILED, FINISHED, QUEUED, RUNNING

_STATES = {
    "PENDING": QUEUED,
    "CONFIGURING": QUEUED,
    "REQUEUED": QUEUED,
    "REQUEUE_HOLD": QUEUED,
    "REQUEUE_FED": QUEUED,
    "RESV_DEL_HOLD": QUEUED,
    "SPECIAL_EXIT": QUEUED,
    "EXPEDITING": QUEUED,  # since 25.11
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
# Fields of squeue with their widths; wide, since an array's id can be long and a reason can name nodes.
# exit_code is the last: since 23.02 squeue may print nothing for it, which moves the columns after it.
_COLUMNS = (("jobarrayid", 48), ("state", 24), ("restartcnt", 12), ("reason", 160), ("exit_code", 12))
UNKNOWN_CAUSE = "it has ended, and Slurm's accounting does not answer: the cause is unknown"
CLUSTERS_VARIABLE = "SLURM_CLUSTERS"  # the cluster, of several behind one login node, as of --clusters
_TIMEOUT = 60.0  # s for one command; Slurm's own time-outs are shorter
_MAX_CACHE_AGE = 15.0  # s
_CACHE_FRACTION = 0.1  # of the time since polling began, for which a reply is reused

# By command: time of the reply (s, time.monotonic) and the reply.
_reply_cache: dict[tuple[str, ...], tuple[float, subprocess.CompletedProcess[str]]] = {}


@dataclass(frozen=True)
class JobStatus:
    """State of a job according to Slurm."""

    state: str  # as in runs/attempt.py; empty if Slurm did not answer
    reason: str = ""
    restarts: int = 0  # number of requeues


def is_available() -> bool:
    """Whether Slurm's commands are on the PATH."""
    return shutil.which("squeue") is not None


def this_job() -> str | None:
    """Return the id of the Slurm job of this process, `123` or `123_4`, or None."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def this_step() -> str | None:
    """Return the step id of this process (one step per srun of a job), or None."""
    return os.environ.get("SLURM_STEP_ID")


def this_node_list() -> str | None:
    """Return the nodes of this step, else of this job, as Slurm writes them: `n1` or `n[1-4,7]`; or None."""
    return os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")


def query_jobs(job_ids: Iterable[str], since: float | None = None) -> dict[str, JobStatus]:
    """Return the status of jobs by id, from squeue and, for jobs that have left the queue, from sacct.

    squeue is current; sacct may lag and show transient states, so it is queried only for jobs that squeue no
    longer lists. A job that Slurm reports as completed has failed: it would have written an outcome. Jobs
    unknown to Slurm are missing from the result; if Slurm does not answer, every job has an empty state. If
    only sacct fails, jobs that have left the queue have failed with the reason `UNKNOWN_CAUSE`.

    Args:
        job_ids: ids such as `123`, or `123_4` for the task of an array.
        since: as in `run_command`.
    """
    ids = set(job_ids)
    if not ids or not is_available():
        return {}
    arrays = ",".join(sorted({job.partition("_")[0] for job in ids}))
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS)
    query = ["squeue", "--noheader", "--array", "--states=all", f"--Format={columns}", f"--jobs={arrays}"]
    done = run_command(*query, since=since)
    if "REVOKED" in done.stdout:  # another cluster of the federation has started a job
        done = run_command(*query, "--federation", since=since)
    # squeue fails with "Invalid job id" if the only queried job is unknown to it.
    if done.returncode and "Invalid job id" not in done.stderr:
        error = (done.stderr.strip().splitlines() or ["squeue failed"])[-1].removeprefix("slurm_load_jobs ")
        return {job: JobStatus("", f"Slurm does not answer ({error})") for job in ids}
    found = {}
    for job, name, restarts, reason, status in map(_split_columns, done.stdout.splitlines()):
        job = job.removesuffix("+0")  # of a heterogeneous job, whose first part has the id of the job
        if job in ids:
            if reason == "JobHeldAdmin":  # scontrol release is refused to its user (scontrol(1))
                reason = f"{reason}: only the operators of the cluster can release it"
            elif re.search(r"JobHeld|\bheld\b", reason):  # it stays queued until it is released
                reason = f"{reason}: scontrol release {job}"
            # Since 23.02 CODE:SIGNAL, before that the status of wait().
            code = f"{int(status) >> 8}:{int(status) & 0x7F}" if status.isdigit() else status
            found[job] = _status_from(name, reason, code, int(restarts) if restarts.isdigit() else 0)
    missing = ids - found.keys()
    return found | _ended_jobs(missing, since) if missing and shutil.which("sacct") else found


def _ended_jobs(ids: Set[str], since: float | None) -> dict[str, JobStatus]:
    """Return the status of jobs that have left the queue, by sacct; jobs that it does not know are missing.

    The tasks of an array that were cancelled while they were pending have one record together, `12_[0-5]`: it
    stands for all that have none of their own. The list in it may be cut, so that it is not read.
    """
    # By array: for the id of a task sacct prints no record of several tasks.
    arrays = ",".join(sorted({job.partition("_")[0] for job in ids}))
    fields = "--format=JobID,State,ExitCode"
    query = ["sacct", "--noheader", "--parsable2", "--allocations", fields, f"--jobs={arrays}"]
    if clusters := os.environ.get(CLUSTERS_VARIABLE):  # which sacct alone does not read
        query.append(f"--clusters={clusters}")
    done = run_command(*query, since=since)
    if done.returncode and "storage is disabled" not in done.stderr:
        return dict.fromkeys(ids, JobStatus(FAILED, UNKNOWN_CAUSE))
    records: dict[str, JobStatus] = {}
    together: dict[str, JobStatus] = {}  # by array
    for line in done.stdout.splitlines():
        job, name, code, *_ = (*line.split("|"), "", "")
        array, pending, _ = job.partition("_[")
        (together if pending else records)[array] = _status_from(name, "", code)
    found = {job: records.get(job) or together.get(job.partition("_")[0]) for job in ids}
    # A job that squeue does not list is not running.
    return {job: status for job, status in found.items() if status and status.state in ENDED}


def own_job_state() -> str:
    """Return Slurm's state of the job of this process, such as RUNNING; empty if unknown."""
    job = this_job()
    if job is None or not is_available():
        return ""
    return _first_line(run_command("squeue", "--noheader", "--format=%T", f"--jobs={job}").stdout)


def end_time() -> float | None:
    """Return the end time of the job of this process, s since 1970; None without a limit or a job."""
    job = this_job()
    return (
        None
        if job is None
        else _time(run_command("squeue", "--noheader", "--format=%e", f"--jobs={job}").stdout)
    )


def expected_start(job_id: str, since: float | None = None) -> float | None:
    """Return when Slurm expects to start a queued job, s since 1970, or None if unknown."""
    return _time(
        run_command("squeue", "--noheader", "--start", "--format=%S", f"--jobs={job_id}", since=since).stdout
    )


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(_first_line(text)).timestamp()  # Slurm prints local time
    except ValueError:  # N/A, or empty
        return None


def _first_line(text: str) -> str:
    """Return the first line of squeue's output: of a heterogeneous job it prints one for each part."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("CLUSTER: ")]
    return lines[0] if lines else ""


def user_associations(column: str) -> list[str]:
    """Return the accounts or QOS (`column`) in the user's associations; empty without accounting."""
    command = ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", f"format={column}")
    text = run_command(*command).stdout
    return list(dict.fromkeys(name for line in text.splitlines() for name in line.split(",") if name))


def requeue_this_job() -> str:
    """Requeue the job of this process.

    Returns:
        Slurm's error message; empty on success.
    """
    _reply_cache.clear()
    done = run_command("scontrol", "requeue", str(this_job()))
    return done.stderr.strip() if done.returncode else ""


def cancel_job(job_id: str) -> None:
    """Cancel a job, or a step such as `123.4`; a job that has already ended is no error.

    Raises:
        UserError: Slurm refused or did not answer.
    """
    done = run_command("scancel", job_id)
    _reply_cache.clear()
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scancel {job_id}: {done.stderr.strip() or 'failed'}: try again")


def cancel_jobs(job_ids: Sequence[str]) -> bool:
    """Cancel several jobs with one command: one request a job would take minutes on a busy controller.

    Returns:
        Whether each job has been cancelled or had ended already; if not, `cancel_job` raises the reason.
    """
    done = run_command("scancel", *job_ids)
    _reply_cache.clear()
    refusals = [line for line in done.stderr.splitlines() if line and "Invalid job id" not in line]
    return done.returncode == 0 or bool(done.stderr and not refusals)


@functools.cache
def max_array_size() -> int:
    """Return the maximum number of tasks of an array: the cluster's MaxArraySize (highest index plus 1)."""
    found = re.search(
        r"^MaxArraySize\s*=\s*(\d+)", run_command("scontrol", "show", "config").stdout, re.MULTILINE
    )
    return max(1, int(found[1])) if found else 1001  # Slurm's default


def run_command(*command: str, since: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. If it cannot be run or times out, return code 1 with the error in stderr.

    Args:
        command: the command and its arguments.
        since: when the caller began polling (`time.monotonic`); the last reply is then reused for 10 % of
            the time since, at most 15 s, so that many waiting clients do not overload Slurm's controller.
            None: always run the command.
    """
    now = time.monotonic()
    if since is not None and (cached := _reply_cache.get(command)):
        received, done = cached
        if now - received < min(_MAX_CACHE_AGE, _CACHE_FRACTION * (now - since)):
            return done
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except (subprocess.TimeoutExpired, OSError) as error:
        done = subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error}")
    if since is not None:
        cache = list(_reply_cache.items())
        for old in [each for each, (received, _) in cache if now - received > _MAX_CACHE_AGE]:
            _reply_cache.pop(old, None)
        _reply_cache[command] = now, done
    return done


def _split_columns(line: str) -> list[str]:
    cells, at = [], 0
    for _, width in _COLUMNS:
        cells.append(line[at : at + width].strip())
        at += width
    return cells


def _status_from(name: str, reason: str, code: str, restarts: int = 0) -> JobStatus:
    """Return the JobStatus for Slurm's state name, reason and exit code (`CODE:SIGNAL`)."""
    base_name = name.split()[0] if name else ""  # sacct prints `CANCELLED by 1000`
    state = _STATES.get(base_name, RUNNING)
    if state == FINISHED:
        return JobStatus(FAILED, "Slurm reports it as completed, but it wrote no outcome", restarts)
    if state in (FAILED, CANCELLED):
        detail = f"exit code {code}" if state == FAILED else reason.split(",")[0]
        # The only useful reason of a cancelled job is a failed dependency.
        shown = state == FAILED or detail.startswith("Dependency")
        return JobStatus(state, f"Slurm: {name.lower().replace('_', ' ')}" + f" ({detail})" * shown, restarts)
    return JobStatus(state, reason if state == QUEUED and reason != "None" else "", restarts)
