"""Runs → job arrays, by submitit: those of equal resources and equal needs are one sbatch."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet import local
from hpc_imagenet.config import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.job import Task
from hpc_imagenet.runs import FAILED, Attempt, Record, Run
from hpc_imagenet.states import state


@dataclass(frozen=True)
class Part:
    """One run, as far as Slurm is concerned."""

    run: str
    stage: str
    label: str
    cluster: Cluster  # for this stage
    needs: tuple[str, ...]  # run ids


def arrays(parts: Iterable[Part]) -> list[list[Part]]:
    """Group runs that may share one sbatch; needs come before those that need them, as given."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(repr((part.stage, part.cluster, part.needs)), []).append(part)
    return list(groups.values())


def script(array: Sequence[Part], folder: Path) -> str:
    """Return the text that sbatch would get for an array; run ids stand for the jobs that it waits for."""
    executor = _executor(array, folder, array[0].needs)
    if len(array) > 1:
        executor.parameters["map_count"] = len(array)  # as submitit does when it sends
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def send(record: Record, attempts: Sequence[tuple[Run, Attempt]], code: Mapping[str, str]) -> None:
    """Hand attempts to Slurm and note their job ids.

    Raises:
        UserError: sbatch refused one; it and those behind it are marked as failed.
    """
    job_ids: dict[str, str] = {}
    mine = {run.id: attempt for run, attempt in attempts}
    parts = [_part(run) for run, _ in attempts]
    for array in arrays(parts):
        after = [_job_id(record.run(need), job_ids) for need in array[0].needs]
        folder = mine[array[0].run].folder
        if len(array) > 1:
            folder = record.folder / ".slurm" / str(time.time_ns())
        try:
            jobs = _send(array, folder, [job for job in after if job], record, mine)
        except UserError as error:
            for run in mine.keys() - job_ids.keys():
                mine[run].end(FAILED, str(error))
            before = f" ({len(job_ids)} sent before it go on)" if job_ids else ""
            raise UserError(f"{error}{before}") from None
        for part, job_id in zip(array, jobs, strict=True):
            mine[part.run].submit("slurm", job_id=job_id, logs=str(folder), code=dict(code))
            job_ids[part.run] = job_id


def _part(run: Run) -> Part:
    info = run.info
    return Part(run.id, info["stage"], info["label"], run.cluster(), tuple(info.get("needs", ())))


def _send(
    array: Sequence[Part], folder: Path, after: list[str], record: Record, attempts: Mapping[str, Attempt]
) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(array, folder, after)
    heard = io.StringIO()  # submitit passes on what sbatch says; a refusal is told below, once
    try:
        with _without_slurm_variables(), contextlib.redirect_stderr(heard), executor.batch():
            jobs = [
                executor.submit(Task(str(record.run(part.run).folder), attempts[part.run].number))
                for part in array
            ]
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in said)
        raise UserError(f"sbatch refused {array[0].label}: {why or 'without a word'}") from None
    sys.stderr.write(heard.getvalue())
    return [str(job.job_id) for job in jobs]


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


def _executor(array: Sequence[Part], folder: Path, after: Iterable[str]) -> Any:
    """Return submitit's executor, set up for one shape of job."""
    import submitit

    cluster, stage = array[0].cluster, array[0].stage
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=cluster.max_requeues)
    path = shlex.quote(local.job_environment()["PYTHONPATH"])
    train = stage == "train"
    options: dict[str, Any] = dict(cluster.sbatch)
    if dependency := ":".join(after):
        # Without the second line a job whose need failed stays pending for ever.
        options |= {"dependency": f"afterok:{dependency}", "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=array[0].label if len(array) == 1 else f"{stage}-sweep",
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
