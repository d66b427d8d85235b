"""Runs → job arrays, by submitit: those of equal resources and equal needs are one sbatch."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import local_queue, slurm
from hpc_imagenet.launch.states import state
from hpc_imagenet.launch.task import Task
from hpc_imagenet.runs.store import FAILED, Attempt, Run, RunStore


@dataclass(frozen=True)
class ArrayTask:
    """One run, as far as Slurm is concerned."""

    run_id: str
    stage: str
    label: str
    cluster: Cluster  # for this stage
    needs: tuple[str, ...]  # run ids


def extra_sbatch_options(cluster: Cluster) -> dict[str, Any]:
    """Return cluster.sbatch, with `requeue` where it does not say otherwise, else with `no-requeue`."""
    options = dict(cluster.sbatch)
    refused = [options.pop(name, False) for name in ("no-requeue", "no_requeue")]
    wanted = options.pop("requeue", True) and not any(refused)
    return {"requeue" if wanted else "no-requeue": True, **options}


def group_into_arrays(parts: Iterable[ArrayTask]) -> list[list[ArrayTask]]:
    """Group runs that may share one sbatch; needs come before those that need them, as given.

    A group that is more than this cluster takes as one array becomes several.
    """
    groups: dict[str, list[ArrayTask]] = {}
    for part in parts:
        groups.setdefault(repr((part.stage, part.cluster, part.needs)), []).append(part)
    most = slurm.max_array_size() if any(len(group) > 1 for group in groups.values()) else 1
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def sbatch_script(array: Sequence[ArrayTask], folder: Path) -> str:
    """Return the text that sbatch would get for an array; run ids stand for the jobs that it waits for."""
    executor = _executor(array, folder, array[0].needs)
    if len(array) > 1:
        executor.parameters["map_count"] = len(array)  # as submitit does when it sends
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def test_only(text: str) -> str:
    """Return what `sbatch --test-only` says of a script: when it would start, or why it is refused.

    Slurm does not know the jobs that it would wait for yet; the start is told as if they had ended.
    """
    lines = [line for line in text.splitlines() if not line.startswith("#SBATCH --dependency=")]
    with _without_slurm_variables():
        done = subprocess.run(
            ["sbatch", "--test-only"], input="\n".join(lines), capture_output=True, text=True, check=False
        )
    said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in said) or "fine"


def submit_attempts(
    store: RunStore, attempts: Sequence[tuple[Run, Attempt]], code: Mapping[str, str]
) -> None:
    """Hand attempts to Slurm and note their job ids.

    Raises:
        UserError: sbatch refused one, or it needs a run of this machine; it and those behind it are marked
            as failed.
    """
    job_ids: dict[str, str] = {}
    sizes: dict[str, int] = {}  # of the arrays sent here
    mine = {run.id: attempt for run, attempt in attempts}
    parts = [_part(run) for run, _ in attempts]
    for array in group_into_arrays(parts):
        folder = mine[array[0].run_id].folder
        if len(array) > 1:
            folder = store.folder / ".slurm" / str(time.time_ns())
        try:
            after = _short([_job_id(store.run(need), job_ids) for need in array[0].needs], sizes)
            jobs = _send(array, folder, after, store, mine)
        except UserError as error:
            for run in mine.keys() - job_ids.keys():
                mine[run].end(FAILED, str(error))
            before = f" ({len(job_ids)} sent before it go on)" if job_ids else ""
            raise UserError(f"{error}{before}") from None
        for part, job_id in zip(array, jobs, strict=True):
            mine[part.run_id].submit("slurm", job_id=job_id, logs=str(folder), code=dict(code))
            job_ids[part.run_id] = job_id
        sizes[jobs[0].partition("_")[0]] = len(jobs)


def _short(job_ids: Iterable[str | None], sizes: Mapping[str, int]) -> list[str]:
    """Return the jobs to wait for; all tasks of an array are named by the array, lest the list be long."""
    by_array: dict[str, list[str]] = {}
    for job_id in filter(None, job_ids):
        by_array.setdefault(job_id.partition("_")[0], []).append(job_id)
    return [
        job
        for array, tasks in by_array.items()
        for job in ([array] if len(tasks) == sizes.get(array) else tasks)
    ]


def _part(run: Run) -> ArrayTask:
    info = run.info
    return ArrayTask(run.id, info["stage"], info["label"], run.cluster(), tuple(info.get("needs", ())))


def _send(
    array: Sequence[ArrayTask],
    folder: Path,
    after: list[str],
    store: RunStore,
    attempts: Mapping[str, Attempt],
) -> list[str]:
    tasks = [Task(str(store.run(part.run_id).folder), attempts[part.run_id].number) for part in array]
    return _submit(_executor(array, folder, after), tasks, array[0].label)


def submit_one(part: ArrayTask, folder: Path, task: Callable[[], object]) -> str:
    """Send what is no run, such as the doctor's probe, in a job like that of a run; return its id.

    Raises:
        UserError: sbatch refused it.
    """
    executor = _executor([part], folder, part.needs)
    executor.update_parameters(teardown=[])  # there is no attempt to be settled
    return _submit(executor, [task], part.label)[0]


def _submit(executor: Any, tasks: Sequence[Callable[[], object]], label: str) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    heard = io.StringIO()  # submitit passes on what sbatch says; a refusal is told below, once
    try:
        with _without_slurm_variables(), contextlib.redirect_stderr(heard), executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in said)
        raise UserError(f"sbatch refused {label}: {why or 'without a word'}") from None
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


def _executor(array: Sequence[ArrayTask], folder: Path, after: Iterable[str]) -> Any:
    """Return submitit's executor, set up for one shape of job."""
    import submitit

    cluster, stage = array[0].cluster, array[0].stage
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=cluster.max_requeues)
    path = shlex.quote(local_queue.job_environment()["PYTHONPATH"])
    train = stage == "train"
    options = extra_sbatch_options(cluster)
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
        setup=[
            *cluster.setup,
            f"export PYTHONPATH={path}",
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
            "trap : TERM  # at a preemption srun passes it on, and this script waits for the tasks to save",
        ],
        srun_args=["--kill-on-bad-exit=1", *cluster.srun],
        teardown=[f"{executor.python} -m hpc_imagenet.launch.requeue {shlex.quote(str(folder))} $?"],
        signal_delay_s=_warning(cluster),
        additional_parameters=options,
    )
    return executor


def _warning(cluster: Cluster) -> int:
    """Return how many seconds before its time limit a job is told: time to save, also in a short job."""
    return min(90, 15 * (cluster.time or 6))


@contextlib.contextmanager
def _without_slurm_variables() -> Iterator[None]:
    """Keep what belongs to an outer job, SLURM_* and its CPUs, out of those submitted from inside it."""
    outer = (k for k in os.environ if k.startswith("SLURM_") or k == local_queue.CPUS_VARIABLE)
    kept = {k: os.environ[k] for k in outer if k != "SLURM_CONF"}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= kept
