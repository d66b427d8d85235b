"""Jobs → Slurm, this machine's queue, or the place where one stands.

Whatever carries them out, the record is written first: a run's folder with the frozen config, then a claimed
attempt, then the word of who has it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet import __version__, check, local, slurm
from hpc_imagenet.config import Cluster, cluster_for
from hpc_imagenet.errors import UserError
from hpc_imagenet.job import Task
from hpc_imagenet.plan import Job
from hpc_imagenet.runs import CANCELLED, FINISHED, Attempt, Record, Run
from hpc_imagenet.states import State, state, states


@dataclass(frozen=True)
class Sent:
    """What became of one job of a plan: `what` is submitted, finished (skipped) or active (left alone)."""

    run: Run
    what: str


def submit(plan: Sequence[Job], record: Record, executor: str) -> list[Sent]:
    """Send all jobs of a plan that are not finished and not under way; the plan was checked before.

    Returns:
        One entry a job, in the plan's order. With the executor `here` the jobs have ended by then.
    """
    told = states(record.run(run) for run in {name for job in plan for name in (job.run, *job.needs)})
    under_way = {run for run, was in told.items() if was.active}
    sent: list[Sent] = []
    for job in plan:
        run, was = record.run(job.run), told[job.run]
        if was.active and not _is_this_job(run):
            sent.append(Sent(run, "active"))
        elif was.finished and check.stands(job):
            sent.append(Sent(run, FINISHED))
        else:
            # Only what is under way is waited for; the rest stands already, or the check had refused.
            needs = [need for need in job.needs if need in under_way]
            info = {"stage": job.stage, "label": job.label, "model": job.model, "needs": needs}
            sent.append(Sent(record.create(job.run, job.frozen(), info), "submitted"))
            under_way.add(job.run)
    send(record, [entry.run for entry in sent if entry.what == "submitted"], executor)
    if executor == "local" and any(entry.what == "active" for entry in sent):
        local.ensure_worker(record)
    return sent


def _is_this_job(run: Run) -> bool:
    """Whether the run's last attempt belongs to the Slurm job we are in: it was requeued and goes on here."""
    attempt, mine = run.attempt, slurm.this_job()
    return mine is not None and attempt is not None and attempt.submitted.get("job_id") == mine


def send(record: Record, runs: Sequence[Run], executor: str) -> None:
    """Begin a new attempt of each run and hand it to `executor`; needs come before those that need them."""
    attempts = [(run, run.new_attempt()) for run in runs]
    if executor == "local":
        _to_queue(record, attempts)
    elif executor == "slurm":
        _to_slurm(record, attempts)
    else:
        _here(record, attempts)


def retry(record: Record, run: Run) -> list[Sent]:
    """Take up a run that failed or was cancelled, with those it needs that did not end well.

    Raises:
        UserError: it was no job of a queue.
    """
    again: dict[str, Run] = {}
    _unfinished(record, run, again)
    if not again:
        local.ensure_worker(record)
        return [Sent(run, FINISHED if state(run).finished else "active")]
    executor = check.executor(run.config().cluster.executor)
    if executor == "here":
        raise UserError(f"{run.id} was run by cluster=here: give that command again, and it goes on")
    send(record, list(again.values()), executor)
    return [Sent(entry, "submitted") for entry in again.values()]


def _unfinished(record: Record, run: Run, found: dict[str, Run]) -> None:
    was = state(run)
    if was.active or was.finished:
        return
    for need in map(record.run, run.info.get("needs", ())):
        if need.attempt:
            _unfinished(record, need, found)
    found[run.id] = run


def cancel(run: Run) -> State:
    """Stop a run wherever it is; the outcome is written first, so that its end is not taken for a failure.

    Returns:
        The state it had before.
    """
    was = state(run)
    attempt = run.attempt
    if not was.active or attempt is None:
        return was
    attempt.end(CANCELLED, "by the cancel command")
    if attempt.submitted.get("executor") == "slurm":
        subprocess.run(["scancel", str(attempt.submitted["job_id"])], check=True)
    else:
        local.kill(attempt)
    return was


def script(job: Job, record: Record) -> str:
    """Return what would be submitted for one job on Slurm: the text that sbatch would get."""
    executor = _executor(record.run(job.run).folder / "attempts" / "1", job.label, job.cluster, job.stage, [])
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def _to_queue(record: Record, attempts: list[tuple[Run, Attempt]]) -> None:
    for _, attempt in attempts:
        attempt.submit("local", host=socket.gethostname(), code=_code())
    if attempts:
        local.enqueue(record, attempts)


def _here(record: Record, attempts: list[tuple[Run, Attempt]]) -> None:
    """Run the attempts one after another in the foreground: by srun inside an allocation, else directly."""
    allocation = slurm.this_job()
    for run, attempt in attempts:
        command = [sys.executable, "-u", "-m", "hpc_imagenet.job", str(run.folder), str(attempt.number)]
        if allocation:
            attempt.submit("slurm", job_id=allocation, logs=str(attempt.folder), code=_code())
            log = f"{attempt.folder}/{allocation}_%t_log"
            arguments = ["--kill-on-bad-exit=1", f"--output={log}.out", f"--error={log}.err"]
            if run.info["stage"] != "train":
                arguments += ["--nodes=1", "--ntasks=1"]  # one process, whatever the allocation holds
            command = ["srun", *arguments, *cluster_for(run.config(), run.info["stage"]).srun, *command]
        else:
            attempt.submit("here", host=socket.gethostname(), code=_code())
            local.note_process(attempt)
        subprocess.run(command, env=local.job_environment(), check=False)
        if not state(run).finished:
            return


def _to_slurm(record: Record, attempts: list[tuple[Run, Attempt]]) -> None:
    """Send attempts as job arrays: those of equal resources and equal needs in one."""
    job_ids: dict[str, str] = {}
    groups: dict[str, list[tuple[Run, Attempt]]] = {}
    shapes: dict[str, tuple[Cluster, str, list[str]]] = {}
    for run, attempt in attempts:
        stage = run.info["stage"]
        shape = (cluster_for(run.config(), stage), stage, run.info.get("needs", []))
        groups.setdefault(repr(shape), []).append((run, attempt))
        shapes[repr(shape)] = shape
    for key, group in groups.items():
        cluster, stage, needs = shapes[key]
        after = [_job_id(record.run(need), job_ids) for need in needs]
        folder = group[0][1].folder
        if len(group) > 1:
            folder = record.folder / ".slurm" / str(time.time_ns())
        label = group[0][0].info["label"] if len(group) == 1 else f"{stage}-sweep"
        executor = _executor(folder, label, cluster, stage, [job for job in after if job])
        with _without_slurm_variables(), executor.batch():
            jobs = [executor.submit(Task(str(run.folder), attempt.number)) for run, attempt in group]
        for (run, attempt), job in zip(group, jobs, strict=True):
            attempt.submit("slurm", job_id=job.job_id, logs=str(folder), code=_code())
            job_ids[run.id] = job.job_id


def _job_id(run: Run, sent: dict[str, str]) -> str | None:
    """Return the Slurm job that `run` waits for, None if what it makes is there."""
    if run.id in sent:
        return sent[run.id]
    attempt = run.attempt
    if attempt is None or not state(run).active:
        return None
    if attempt.submitted.get("executor") != "slurm":
        raise UserError(f"needs {run.id}, which runs on this machine: wait for it, then ask again")
    return str(attempt.submitted["job_id"])


def _executor(folder: Path, label: str, cluster: Cluster, stage: str, after: Iterable[str]) -> Any:
    """Return submitit's executor, set up for one shape of job."""
    import submitit

    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=cluster.max_requeues)
    path = shlex.quote(local.job_environment()["PYTHONPATH"])
    train = stage == "train"
    options: dict[str, Any] = dict(cluster.sbatch)
    if dependency := ":".join(after):
        # Without the second line a job whose need failed stays pending for ever.
        options |= {"dependency": f"afterok:{dependency}", "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=label,
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        time=cluster.time,
        nodes=cluster.nodes if train else 1,
        ntasks_per_node=(cluster.tasks_per_node or cluster.gpus_per_node or 1) if train else 1,
        gpus_per_node=cluster.gpus_per_node or None,
        cpus_per_task=cluster.cpus_per_task,
        mem=None if cluster.memory_gb is None else f"{int(cluster.memory_gb * 1024)}M",
        array_parallelism=cluster.array_parallelism,
        wckey=None,  # submitit sets one, and some clusters refuse it
        # srun no longer takes --cpus-per-task from sbatch; a task on one core would starve its loader.
        setup=[*cluster.setup, f"export PYTHONPATH={path}", "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
        srun_args=["--kill-on-bad-exit=1", *cluster.srun],
        additional_parameters=options or None,
    )
    return executor


@contextlib.contextmanager
def _without_slurm_variables() -> Iterator[None]:
    """Keep an outer allocation's SLURM_* out of the jobs that are submitted from inside it."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("SLURM_") and k != "SLURM_CONF"}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= kept


@functools.cache
def _code() -> dict[str, str]:
    """Return the code's state: the package's version and, in a checkout, the commit."""
    code = {"version": __version__}
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        code["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return code
