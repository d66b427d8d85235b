"""Submission of attempts to Slurm: in arrays, with dependencies, and as many as a limit of jobs allows."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.executor import JobsRefused
from hpc_imagenet.launch.shared_jobs import group_attempts, shares_with
from hpc_imagenet.launch.slurm_jobs.container import bound_folders
from hpc_imagenet.launch.slurm_jobs.sbatch import (
    ArrayTask,
    group_into_arrays,
    sbatch_script,
    submit_array,
    test_only,
)
from hpc_imagenet.launch.slurm_jobs.submit_limit import (
    SubmitLimitReached,
    describe_limit,
    largest_accepted,
    limit_in,
)
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, Attempt
from hpc_imagenet.runs.store import Run, RunStore

# In replies of sbatch that do not concern the job: slurm_strerror of Slurm 20.11 to 26.05.
_NO_ANSWER = re.compile(
    r"unable to contact|socket timed out|zero bytes were|temporarily un|connection refused", re.IGNORECASE
)


def submit_attempts(
    store: RunStore,
    attempts: Sequence[tuple[Run, Attempt]],
    active: Collection[str],
    code: Mapping[str, str],
) -> None:
    """Submit attempts to Slurm and record their job ids.

    Beyond a limit of submitted jobs, as many as it allows are submitted; the others, and all that need
    them, are marked as waiting. An array that is refused fails; those that need it are cancelled, and all
    others are submitted.

    Args:
        store: the workspace's runs.
        attempts: attempts with their runs; a run comes after those it needs.
        active: ids of the other runs that are queued or running.
        code: version and commit of the code, for submitted.json.

    Raises:
        JobsRefused: after the submission of the others: sbatch refused a job, or it needs a run of the local
            queue. If Slurm's controller does not answer, all that are not submitted are marked as failed.
        UserError: before any submission: a config is not executed; all attempts are marked as failed.
    """
    job_ids: dict[str, str] = {}
    sizes: dict[str, int] = {}  # number of tasks of each array submitted here
    by_run = {run.id: attempt for run, attempt in attempts}
    waiting: dict[str, str] = {}  # reasons by run
    full: dict[tuple[str | None, ...], str] = {}  # reasons by account, QOS and partition
    ended: set[str] = set()  # runs that were refused, and those that need them
    errors: list[UserError] = []

    try:
        jobs_of_runs = [[run for run, _ in group] for group in group_attempts(attempts)]
        arrays = group_into_arrays(map(_array_task, jobs_of_runs))
    except UserError as error:
        for attempt in by_run.values():
            attempt.end(FAILED, str(error))
        raise
    for array in arrays:
        first = array[0]
        own = [run_id for task in array for run_id in task.run_ids]
        if lost := [need for need in first.needs if need in ended]:
            for run_id in own:  # as Slurm cancels a job whose dependency has failed
                by_run[run_id].end(
                    CANCELLED, f"needs {lost[0]}, which was not submitted: fix that, then retry"
                )
            ended.update(own)
            continue
        place = first.cluster.account, first.cluster.qos, first.cluster.partition
        unmet = [f"waiting: needs {need}, which waits" for need in first.needs if need in waiting]
        rest = [] if unmet or place in full else list(array)
        try:
            after = [] if unmet else [_job_id(store.run(need), job_ids, active) for need in first.needs]
            while rest:
                sent = _submit_some(rest, _merge_arrays(after, sizes), store, by_run)
                for task, job_id in zip(rest, sent.job_ids, strict=False):
                    for run_id in task.run_ids:
                        attempt = by_run[run_id]
                        # Runs that share a loader have their own logs, beside that of the job.
                        logs = str(attempt.folder if task.sharing else sent.folder)
                        details = {"logs": logs, "code": dict(code), **shares_with(task.run_ids, run_id)}
                        attempt.submit("slurm", job_id=job_id, **details)
                        job_ids[run_id] = job_id
                if sent.job_ids:
                    sizes[sent.job_ids[0].partition("_")[0]] = len(sent.job_ids)
                rest = rest[len(sent.job_ids) :]
                if sent.limit:
                    full[place] = describe_limit(sent.limit, first.cluster)
                    break
        except UserError as error:
            no_answer = _NO_ANSWER.search(str(error)) is not None  # for the other arrays as well
            refused = (by_run.keys() if no_answer else set(own)) - job_ids.keys() - waiting.keys() - ended
            for run_id in refused:
                by_run[run_id].end(FAILED, str(error))
            ended |= refused
            errors.append(error)
            if no_answer:
                break
            continue
        for run_id in own:
            if run_id not in job_ids:
                waiting[run_id] = unmet[0] if unmet else full[place]
                by_run[run_id].wait(waiting[run_id])
    if errors:
        raise JobsRefused(errors)


@dataclass(frozen=True)
class _Sent:
    """Job ids of the first tasks of an array, submitit's folder, and the limit that was reached, if any."""

    job_ids: list[str]
    folder: Path
    limit: str = ""


def _submit_some(
    array: Sequence[ArrayTask], after: list[str], store: RunStore, attempts: Mapping[str, Attempt]
) -> _Sent:
    """Submit an array, or as many of its first tasks as a limit of submitted jobs allows.

    Raises:
        UserError: sbatch refused it for another reason.
    """
    size, limit = len(array), ""
    while size:
        part = array[:size]
        folder = attempts[part[0].run_id].folder
        if size > 1 or part[0].sharing:
            folder = store.make_own_folder("slurm", str(time.time_ns()))
        try:
            return _Sent(submit_array(part, folder, after, store, attempts), folder, limit)
        except SubmitLimitReached as error:
            limit = error.name
            _remove_submission(folder)

        def is_accepted(count: int, folder: Path = folder) -> bool:
            return not limit_in(test_only(sbatch_script(array[:count], folder)))

        size = largest_accepted(size, is_accepted)
    return _Sent([], attempts[array[0].run_id].folder, limit)


def _remove_submission(folder: Path) -> None:
    """Remove what submitit wrote for a job that sbatch refused."""
    for pattern in ("*.pkl", ".submission_file_*.sh"):
        for path in folder.glob(pattern):
            path.unlink()
    if folder.parent.name == "slurm":  # not an attempt's folder
        folder.rmdir()


def _merge_arrays(job_ids: Iterable[str | None], sizes: Mapping[str, int]) -> list[str]:
    """Return the job ids for --dependency, shortened: all tasks of an array become the array's id."""
    by_array: dict[str, list[str]] = {}
    for job_id in filter(None, job_ids):
        by_array.setdefault(job_id.partition("_")[0], []).append(job_id)
    return [
        job
        for array, tasks in by_array.items()
        for job in ([array] if len(tasks) == sizes.get(array) else tasks)
    ]


def _array_task(runs: Sequence[Run]) -> ArrayTask:
    run, *others = runs
    info = run.info
    cluster, *_ = [each.own_cluster() for each in runs]
    folders = (
        [folder for each in runs for folder in bound_folders(each.config())] if cluster.container else []
    )
    return ArrayTask(
        run.id,
        info["stage"],
        info["label"],
        cluster,
        tuple(info.get("needs", ())),
        tuple(dict.fromkeys(folders)),
        bool(info.get("shares_loader")),
        tuple(other.id for other in others),
    )


def _job_id(run: Run, submitted: dict[str, str], active: Collection[str]) -> str | None:
    """Return the Slurm job of a needed run, or None if the run has ended. `submitted`: new job ids by run."""
    if run.id in submitted:
        return submitted[run.id]
    attempt = run.attempt
    if attempt is None or run.id not in active:
        return None
    if attempt.submitted.get("executor") != "slurm":
        raise UserError(f"needs {run.id}, which runs on this machine: wait for it, then submit again")
    return str(attempt.submitted["job_id"])
