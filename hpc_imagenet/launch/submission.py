"""Jobs → Slurm, this machine's queue, or the place where one stands.

Whatever carries them out, the record is written first: a run's folder with the frozen config, then a claimed
attempt, then the word of who has it.
"""

from __future__ import annotations

import functools
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet import __version__
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import local_queue, requeue, sbatch, slurm, validate
from hpc_imagenet.launch.states import State, state, states
from hpc_imagenet.runs.plan import Job
from hpc_imagenet.runs.store import CANCELLED, FINISHED, Attempt, Run, RunStore


@dataclass(frozen=True)
class Submitted:
    """What became of one job of a plan: `what` is submitted, finished (skipped) or active (left alone)."""

    run: Run
    action: str


def plan_actions(plan: Sequence[Job], store: RunStore) -> list[tuple[Job, str, list[str]]]:
    """Return for each job of a plan what is to become of it (see `Sent`) and which runs it waits for.

    Only what is under way is waited for; the rest stands already, or the check had refused the plan.
    """
    told = states(store.run(run) for run in {name for job in plan for name in (job.run_id, *job.needs)})
    under_way = {run for run, was in told.items() if was.active}
    intended = []
    for job in plan:
        was = told[job.run_id]
        needs = [need for need in job.needs if need in under_way]
        if was.active and not _is_this_job(store.run(job.run_id)):
            intended.append((job, "active", needs))
        elif was.finished and validate.output_exists(job):
            intended.append((job, FINISHED, needs))
        else:
            intended.append((job, "submitted", needs))
            under_way.add(job.run_id)
    return intended


def submit_plan(plan: Sequence[Job], store: RunStore, executor: str) -> list[Submitted]:
    """Send all jobs of a plan that are not finished and not under way; the plan was checked before.

    Returns:
        One entry a job, in the plan's order. With the executor `foreground` the jobs have ended by then.

    Raises:
        UserError: Slurm refused a job.
    """
    sent: list[Submitted] = []
    for job, what, needs in plan_actions(plan, store):
        run = store.run(job.run_id)
        if what == "submitted":
            info: dict[str, Any] = {
                "stage": job.stage,
                "label": job.label,
                "model": job.model,
                "needs": needs,
            }
            if job.processing_run is not None:
                info["processing_run"] = job.processing_run
            if job.config.stage.part is not None:
                info["part"] = job.config.stage.part
            store.create(job.run_id, job.frozen(), info)
        sent.append(Submitted(run, what))
    start_attempts(store, [entry.run for entry in sent if entry.action == "submitted"], executor)
    if executor == "local" and any(entry.action == "active" for entry in sent):
        local_queue.ensure_worker(store)
    return sent


def _is_this_job(run: Run) -> bool:
    """Whether the run's last attempt belongs to the Slurm job we are in: it was requeued and goes on here."""
    attempt, mine = run.attempt, slurm.this_job()
    return mine is not None and attempt is not None and attempt.submitted.get("job_id") == mine


def start_attempts(store: RunStore, runs: Sequence[Run], executor: str) -> None:
    """Begin a new attempt of each run and hand it to `executor`; needs come before those that need them."""
    attempts = [(run, run.new_attempt()) for run in runs]
    if executor == "local":
        _to_queue(store, attempts)
    elif executor == "slurm":
        sbatch.submit_attempts(store, attempts, _code())
    else:
        _run_in_foreground(store, attempts)


def retry_run(store: RunStore, run: Run) -> list[Submitted]:
    """Take up a run that failed or was cancelled, with those it needs that did not end well.

    Raises:
        UserError: it was no job of a queue, or another run makes something else of the same dataset.
    """
    again: dict[str, Run] = {}
    _unfinished(store, run, again)
    if not again:
        local_queue.ensure_worker(store)
        return [Submitted(run, FINISHED if state(run).finished else "active")]
    executor = validate.check_executor(run.config().cluster.executor)
    if executor == "foreground":
        raise UserError(f"{run.id} was run by cluster=foreground: give that command again, and it goes on")
    validate.check_no_conflict(list(again.values()), store)
    start_attempts(store, list(again.values()), executor)
    return [Submitted(entry, "submitted") for entry in again.values()]


def _unfinished(store: RunStore, run: Run, found: dict[str, Run]) -> None:
    was = state(run)
    if was.active or was.finished:
        return
    for need in map(store.run, run.info.get("needs", ())):
        if need.attempt:
            _unfinished(store, need, found)
    found[run.id] = run


def cancel_run(run: Run, reason: str = "by the cancel command") -> State:
    """Stop a run, on Slurm or on this machine; `reason` is noted.

    Returns:
        The state it had before.

    Raises:
        UserError: it cannot be stopped from here.
    """
    was = state(run)
    attempt = run.attempt
    if not was.active:
        return was
    if attempt is None:
        raise UserError(f"{run.id} {was.reason}: cancel it in a moment")
    submitted, started = attempt.submitted, attempt.started
    on_slurm, host = submitted.get("executor") == "slurm", submitted.get("host", socket.gethostname())
    by_hand = on_slurm and run.cluster().executor == "foreground"  # a step of somebody's allocation
    if on_slurm and not slurm.is_available():
        raise UserError(f"{run.id} is a Slurm job, and there is no scancel here: ask on a login node")
    if started and host != socket.gethostname():
        raise UserError(
            f"{run.id} runs on {host}: cancel it there (if {host} is no more, remove {attempt.folder})"
        )
    if on_slurm and not by_hand:  # a job that Slurm ends leaves no outcome of its own
        slurm.cancel_job(str(submitted["job_id"]))
    attempt.end(CANCELLED, reason)  # before its end can be taken for a failure
    if by_hand and "step" in started:
        slurm.cancel_job(f"{submitted['job_id']}.{started['step']}")
    if not on_slurm:
        local_queue.kill(attempt)
    return was


def _to_queue(store: RunStore, attempts: list[tuple[Run, Attempt]]) -> None:
    # The entry first: should we be killed here, an attempt that is noted as submitted is in the queue.
    local_queue.enqueue(store, attempts)
    for _, attempt in attempts:
        attempt.submit("local", host=socket.gethostname(), code=_code())
    if attempts:
        local_queue.ensure_worker(store)


def _run_in_foreground(store: RunStore, attempts: list[tuple[Run, Attempt]]) -> None:
    """Run the attempts one after another in the foreground: by srun inside an allocation, else directly."""
    allocation, failed = slurm.this_job(), ""
    if allocation:
        # At a preemption srun passes this on, and we wait for the tasks to save. (Being ignored it would be
        # ignored by them as well.)
        signal.signal(signal.SIGTERM, lambda *_: None)
    environment = local_queue.job_environment()
    if allocation and "SLURM_CPUS_PER_TASK" in environment:
        # Since 22.05 srun does not ask sbatch's options for it: a task would be bound to one CPU.
        environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
    for run, attempt in attempts:
        if failed:
            attempt.end(CANCELLED, f"came after {failed}, which failed")
            continue
        command = [
            sys.executable,
            "-u",
            "-m",
            "hpc_imagenet.launch.task",
            str(run.folder),
            str(attempt.number),
        ]
        if allocation:
            attempt.submit("slurm", job_id=allocation, logs=str(attempt.folder), code=_code())
            log = f"{attempt.folder}/{allocation}_%t_log"
            arguments = ["--kill-on-bad-exit=1", f"--output={log}.out", f"--error={log}.err"]
            if run.info["stage"] != "train":
                arguments += ["--nodes=1", "--ntasks=1"]  # one process, whatever the allocation holds
            command = ["srun", *arguments, *run.cluster().srun, *command]
        else:
            attempt.submit("foreground", host=socket.gethostname(), code=_code())
            local_queue.record_process(attempt)
        done = subprocess.run(command, env=environment, check=False)
        if allocation:
            requeue.requeue_or_fail(run, attempt, done.returncode)
        if not state(run).finished:
            failed = run.id


@functools.cache
def _code() -> dict[str, str]:
    """Return the code's state: the package's version and, in a checkout, the commit."""
    code = {"version": __version__}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        code["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return code
