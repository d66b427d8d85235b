"""Behind srun, on the job's first node: has it ended, or is it to go on later?

Tasks that Slurm or the kernel ends (a preemption, a time limit, kill -9, a lost node) can say nothing
themselves, and a job's script sees all of them as srun's exit code. The script's last line therefore is

    python -m hpc_imagenet.launch.requeue FOLDER CODE

with submitit's folder of the job. What Slurm has taken into its own hands meanwhile is left to Slurm.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import EXIT_REQUEUE
from hpc_imagenet.launch import slurm
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.store import FAILED, FINISHED, Attempt, Run

_LINES = 20

# Would happen again; SIGABRT, by which NCCL ends where a peer is lost, and SIGBUS, of a file server that went
# away under a mapped file, would not.
_CRASHES = {128 + each: each.name for each in (signal.SIGILL, signal.SIGFPE, signal.SIGSEGV)}
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|out of memory", re.IGNORECASE)
_NOT_STARTED = re.compile(r"^srun: error: .*(task launch|communication|node failure|not responding|timed out|"
                          r"aborting|unable to)", re.IGNORECASE)  # fmt: skip


def requeue_or_fail(run: Run, attempt: Attempt, code: int) -> int:
    """Decide what becomes of this job, whose srun has ended with `code`.

    Returns:
        The exit code for the job's script: 0 finished, 1 failed, LATER requeued or in Slurm's hands.
    """
    if outcome := attempt.outcome:
        return 0 if outcome.state == FINISHED else 1
    if attempt.started and not lease.is_holder(run.folder, attempt.number):
        return EXIT_REQUEUE  # an old copy, which another has superseded
    if slurm.own_job_state() not in ("RUNNING", ""):
        return EXIT_REQUEUE  # cancelled, requeued or timed out: Slurm says so itself
    tail = next(attempt.error_tails(), [])[-_LINES:]  # of rank 0, where srun and Slurm have written theirs
    if any(_OUT_OF_MEMORY.search(line) for line in tail):
        mend = "raise cluster.memory_gb, or lower loader.workers, and give the command again"
        attempt.end(FAILED, f"out of memory on the node: {mend}")
        return 1
    reason = _transient_reason(code, tail)
    if not reason:
        words = attempt.last_error_line() or (tail[-1] if tail else "it printed nothing")
        crash = f" ({_CRASHES[code]}: the program crashed)" if code in _CRASHES else ""
        attempt.end(FAILED, f"ended with exit code {code}{crash} before it could say why: {words}")
        return 1
    most = run.cluster().max_requeues
    if lease.restart_count() >= most:
        attempt.end(FAILED, f"{reason}, and cluster.max_requeues={most} is used up: retry goes on from there")
        return 1
    print(f"{reason}: back to the queue", file=sys.stderr, flush=True)
    if refused := slurm.requeue_this_job():
        attempt.end(FAILED, f"{reason}, and Slurm would not requeue the job ({refused}): retry goes on")
        return 1
    return EXIT_REQUEUE


def _transient_reason(code: int, tail: list[str]) -> str:
    """Return why a job without an outcome may simply be started again; empty where it would fail again."""
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


def _task(folder: Path) -> tuple[Run, Attempt]:
    from submitit.core.utils import DelayedSubmission

    task: Any = DelayedSubmission.load(folder / f"{slurm.this_job()}_submitted.pkl").function
    run = Run(Path(task.run_folder))
    return run, Attempt(run.folder / "attempts" / str(task.attempt))


if __name__ == "__main__":
    # Slurm may end this script's processes while it decides; what it has decided itself is left alone.
    sys.exit(requeue_or_fail(*_task(Path(sys.argv[1])), int(sys.argv[2])))
