"""Runs after srun returns and decides whether the job finished, failed, or must be requeued.

Tasks killed by Slurm or the kernel (a preemption, a time limit, kill -9, a lost node) cannot write an
outcome; the job's script sees only srun's exit code. The last line of the script is therefore

    python -m hpc_imagenet.launch.slurm_jobs.requeue FOLDER CODE

where FOLDER is submitit's folder of the job. A job that Slurm itself has cancelled, requeued or timed out
is left to Slurm.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.cluster import slurm
from hpc_imagenet.errors import EXIT_REQUEUE
from hpc_imagenet.launch.retries.error_logs import (
    DEVICE_MEMORY_LINE,
    RANK_PREFIX,
    STUCK,
    ErrorLogs,
    error_logs,
    quoted,
)
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.launch.tasks.start_task import read_task
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import FAILED, FINISHED, Attempt, last_lines
from hpc_imagenet.runs.store import Run, attempt_of

_LINES = 20  # last lines of the error log that are searched for a cause

# Signals of a crash that would repeat. Not SIGABRT (NCCL after a lost peer) nor SIGBUS (a file server that
# disappeared under a mapped file): these are transient.
_CRASHES = {128 + each: each.name for each in (signal.SIGILL, signal.SIGFPE, signal.SIGSEGV)}
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|out of (?:host )?memory", re.IGNORECASE)
_NOT_STARTED = re.compile(r"^srun: error: .*(task launch|communication|node failure|not responding|timed out|"
                          r"aborting|unable to)", re.IGNORECASE)  # fmt: skip


def requeue_or_fail(
    attempts: Sequence[tuple[Run, Attempt]], code: int, log: Path | None = None, begin: int = 0
) -> int:
    """Write the outcomes of the attempts of a job whose srun has ended, or requeue it.

    Args:
        attempts: the job's attempts with their runs: one, or those that share a loader.
        code: exit code of srun.
        log: error log of the job's first task; None: that of the attempt.
        begin: bytes of `log` that earlier starts of the job have written.

    Returns:
        The exit code for the job's script: 0 finished, 1 failed, EXIT_REQUEUE requeued or left to Slurm.
    """
    pending = [(run, attempt) for run, attempt in attempts if attempt.outcome is None]
    if not pending:
        return 0 if all(_has_finished(attempt) for _, attempt in attempts) else 1
    # An older holder is no reason: this start may have ended before its task could take the lease.
    if any(lease.is_superseded(run.folder, attempt.number) for run, attempt in pending):
        return EXIT_REQUEUE  # an old copy: a later start holds the lease

    def fail(reason: str) -> int:
        for _, each in pending:
            each.end(FAILED, reason)
        return 1

    run, attempt = pending[0]
    if slurm.own_job_state() not in ("RUNNING", ""):
        return EXIT_REQUEUE  # cancelled, requeued or timed out by Slurm, which reports that itself
    lines: list[str] = []
    with contextlib.suppress(OSError):  # rank 0's log, where srun and Slurm write their errors
        lines = last_lines(log, begin) if log and log.exists() else next(attempt.error_tails(), [])
    tail = lines[-_LINES:]
    # The logs of other ranks may begin with lines of earlier starts.
    logs = ErrorLogs({0: [RANK_PREFIX.sub("", line) for line in lines]}) if begin else error_logs(attempt)
    stuck = [line for each in logs.by_rank.values() for line in each[-_LINES:] if STUCK in line]
    if any(_OUT_OF_MEMORY.search(line) and not _is_of_device(line) for line in (*tail, *stuck)):
        fix = "raise cluster.memory_gb, or lower loader.workers, then run the command again"
        return fail(f"out of host memory: {fix}")
    if line := next(filter(_is_of_device, (*tail, *stuck)), ""):
        fix = "set a larger train.accumulate, or take a smaller model"
        return fail(f"out of device memory: {fix} ({quoted(line)})")
    reason = _transient_reason(code, tail)
    if not reason:
        line = logs.last_error() or (tail[-1] if tail else "none, its error log is empty")
        crash = f" ({_CRASHES[code]}: the program crashed)" if code in _CRASHES else ""
        return fail(f"exit code {code}{crash} without an outcome; last error line: {line}")
    most = run.cluster().max_requeues
    if lease.restart_count() >= most:
        return fail(f"{reason}, and cluster.max_requeues={most} is used up: retry resumes it")
    print(f"{reason}: requeueing the job", file=sys.stderr, flush=True)
    if error := slurm.requeue_this_job():
        return fail(f"{reason}, but Slurm refused to requeue the job ({error}): retry resumes it")
    return EXIT_REQUEUE


def _is_of_device(line: str) -> bool:
    """Whether a log line is about the memory of a GPU."""
    return re.search(DEVICE_MEMORY_LINE, line.lower()) is not None


def _has_finished(attempt: Attempt) -> bool:
    outcome = attempt.outcome
    return outcome is not None and outcome.state == FINISHED


def _transient_reason(code: int, tail: list[str]) -> str:
    """Return the transient reason why a job has no outcome; empty if it would fail again."""
    if code == EXIT_REQUEUE:
        return "stopped with its work saved"
    if code == 128 + signal.SIGUSR2:
        return "stopped near its time limit or by a preemption (SIGUSR2)"
    if code > 128 and code not in _CRASHES:
        try:
            return f"a task was ended by {signal.Signals(code - 128).name}"
        except ValueError:
            return ""
    if any(_NOT_STARTED.search(line) for line in tail):
        return "srun lost a node"
    return ""


def _attempts(folder: Path) -> list[tuple[Run, Attempt]]:
    """Return the attempts of this job with their runs from submitit's pickle in `folder`."""
    return [attempt_of(run_folder, number) for run_folder, number in read_task(folder).attempts]


if __name__ == "__main__":
    # Slurm may kill this process at any point; it then handles the job by itself.
    job_folder = Path(sys.argv[1])
    ended = _attempts(job_folder)
    exit_code = requeue_or_fail(ended, int(sys.argv[2]), job_folder / f"{slurm.this_job()}_0_log.err")
    for ended_run, ended_attempt in ended:
        notification.run_ended(ended_run, ended_attempt)
    sys.exit(exit_code)
