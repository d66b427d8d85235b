"""The executor `slurm`: jobs and job arrays by sbatch (sbatch.py), states by squeue and sacct (slurm.py).

Commands that only query states do not import what submission needs: sbatch.py and the stages.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.executor import Executor, State, code_version, override_of, setting_name
from hpc_imagenet.launch.local_jobs.local_queue import NO_OUTCOME
from hpc_imagenet.launch.retries.error_logs import error_logs
from hpc_imagenet.launch.slurm_jobs.container import bound_folders, check_container
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, QUEUED, RUNNING, Attempt
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore

if TYPE_CHECKING:
    from hpc_imagenet.launch.slurm_jobs.sbatch import ArrayTask

_JOBS_PER_COMMAND = 100  # whose outcomes are still to be written if the command that cancels them is killed


class SlurmExecutor(Executor):
    """Submit attempts to Slurm."""

    name = "slurm"
    in_background = True

    def check_available(self) -> None:
        """Raise a UserError if Slurm's commands are not on the PATH."""
        for command in ("sbatch", "srun"):
            if not shutil.which(command):
                raise UserError(
                    f"cluster.executor=slurm, but no {command} is on the PATH: "
                    "set cluster=local, or run this on a login node"
                )

    def check_settings(self, stage: str, cluster: Cluster, shares_loader: bool = False) -> None:
        """Raise a UserError for a missing time limit, or options that sbatch does not accept."""
        from hpc_imagenet.launch.slurm_jobs.resource_requests import check_resources, tasks_per_node
        from hpc_imagenet.stages import STAGES

        if cluster.time is None:
            setting = setting_name(cluster, stage, "time")
            raise UserError(
                f"{setting} is not set for {stage}: set it in minutes, such as {override_of(setting, 1440)}"
            )
        check_container(cluster)
        check_resources(stage, cluster, tasks_per_node(cluster, STAGES[stage].distributed))
        if cluster.sbatch:
            from hpc_imagenet.launch.slurm_jobs import sbatch

            sbatch.check_sbatch_options(cluster)

    def check_need(self, run_id: str, need: Run) -> None:
        """Raise a UserError if the run it needs is not a Slurm job."""
        attempt = need.attempt
        if attempt and attempt.submitted.get("executor") != self.name:
            raise UserError(
                f"{run_id} needs {need.id}, which runs on this machine: wait for it, then submit again"
            )

    def submit(
        self, store: RunStore, attempts: Sequence[tuple[Run, Attempt]], state_of: Mapping[str, State]
    ) -> None:
        """Submit attempts as jobs and job arrays."""
        from hpc_imagenet.launch.slurm_jobs.array_submission import submit_attempts

        active = {run_id for run_id, state in state_of.items() if state.active}
        submit_attempts(store, attempts, active, code_version())

    def states(self, attempts: Mapping[str, Attempt], since: float | None) -> dict[str, State]:
        """Return the states of attempts with one query to Slurm."""
        job_ids = {key: str(attempt.submitted.get("job_id", "")) for key, attempt in attempts.items()}
        status = slurm.query_jobs(filter(None, job_ids.values()), since)
        return {key: _state(attempt, status.get(job_ids[key])) for key, attempt in attempts.items()}

    def cancel(self, run: Run, attempt: Attempt, reason: str, ended: datetime | None = None) -> None:
        """Cancel the job; in an allocation of the user, only the step of this attempt."""
        if not slurm.is_available():
            raise UserError(
                f"{run.id} is a Slurm job, and scancel is not on the PATH: cancel it on a login node"
            )
        submitted, started = attempt.submitted, attempt.started
        job_id = str(submitted["job_id"])
        if others := submitted.get("shares_with"):
            # Its process is ended by shared_task.py, which sees the outcome; the job, if no run is left.
            attempt.end(CANCELLED, reason, ended=ended)
            left = any(_is_in_job(Run(run.folder.parent / other), job_id) for other in others)
            if not left and run.executor() == self.name:
                slurm.cancel_job(job_id)
            return
        in_allocation = run.executor() != self.name
        if not in_allocation:  # a job cancelled by Slurm writes no outcome of its own
            slurm.cancel_job(job_id)
        attempt.end(CANCELLED, reason, ended=ended)  # before the process ends: the first outcome is kept
        if in_allocation and "step" in started:
            slurm.cancel_job(f"{job_id}.{started['step']}")

    def end_jobs(self, attempts: Sequence[tuple[Run, Attempt]]) -> set[str]:
        """Cancel the jobs that belong to one attempt each, many with one scancel."""
        own: list[tuple[str, str]] = []
        for run, attempt in attempts:
            with contextlib.suppress(UserError):  # a damaged config, which `cancel` reports
                if not attempt.submitted.get("shares_with") and run.executor() == self.name:
                    own.append((run.id, str(attempt.submitted["job_id"])))
        ended: set[str] = set()
        if len(own) > 1 and slurm.is_available():
            for begin in range(0, len(own), _JOBS_PER_COMMAND):
                run_ids, job_ids = zip(*own[begin : begin + _JOBS_PER_COMMAND], strict=True)
                if slurm.cancel_jobs(job_ids):
                    ended.update(run_ids)
        return ended

    def preview(self, store: RunStore, jobs: Sequence[tuple[Job, Sequence[str]]]) -> Iterator[str]:
        """Yield the sbatch script of each job or job array and the reply of `sbatch --test-only` to it."""
        from hpc_imagenet.launch.slurm_jobs import sbatch

        for array, script in _scripts(store, jobs):
            names = (" ".join(task.run_ids) + (" (one loader)" if task.sharing else "") for task in array)
            yield f"\nsbatch script of {' '.join(names)}:"
            yield "  " + script.strip().replace("\n", "\n  ")
            yield f"sbatch --test-only: {sbatch.test_only(script)}"

    def expected_starts(self, store: RunStore, jobs: Sequence[tuple[Job, Sequence[str]]]) -> dict[str, str]:
        """Return the reply of `sbatch --test-only` to the array of each job, by run id."""
        from hpc_imagenet.launch.slurm_jobs import sbatch

        replies: dict[str, str] = {}
        for array, script in _scripts(store, jobs):
            run_ids = [run_id for task in array for run_id in task.run_ids]
            replies |= dict.fromkeys(run_ids, sbatch.test_only(script))
        return replies


def _scripts(
    store: RunStore, jobs: Sequence[tuple[Job, Sequence[str]]]
) -> Iterator[tuple[Sequence[ArrayTask], str]]:
    """Yield the tasks and the sbatch script of each job or job array."""
    from hpc_imagenet.launch.shared_jobs import group_by_loader
    from hpc_imagenet.launch.slurm_jobs import sbatch
    from hpc_imagenet.stages import STAGES

    tasks = [
        sbatch.ArrayTask(
            job.run_id,
            job.stage,
            job.label,
            job.cluster,
            tuple(needs),
            bound_folders(job.config) if job.cluster.container else (),
            STAGES[job.stage].loader_key(job.config) is not None,
            tuple(other.run_id for other, _ in others),
        )
        for (job, needs), *others in group_by_loader(jobs, lambda item: (item[0].config, item[1]))
    ]
    for array in sbatch.group_into_arrays(tasks):
        run = store.run(array[0].run_id)
        number = run.attempt.number + 1 if run.attempt else 1
        script = sbatch.sbatch_script(array, run.folder / "attempts" / str(number))
        yield array, script


def _is_in_job(run: Run, job_id: str) -> bool:
    """Whether a run is queued or running in a job."""
    attempt = run.attempt
    return attempt is not None and attempt.submitted.get("job_id") == job_id and attempt.outcome is None


def _state(attempt: Attempt, status: slurm.JobStatus | None) -> State:
    started = attempt.started
    run = Run(attempt.folder.parents[1])
    if status and status.reason == slurm.UNKNOWN_CAUSE and not run.is_mine:
        # It may be running: squeue may not show the jobs of other users.
        status = slurm.JobStatus("", "squeue does not list it, and Slurm's accounting does not answer")
    if status is None and slurm.is_available() and run.is_mine:  # neither squeue nor sacct knows it any more
        return State(FAILED, error_logs(attempt).last_error() or NO_OUTCOME, started.get("restarts", 0))
    if status is None or not status.state:
        name = RUNNING if started else QUEUED
        unknown = (
            "no Slurm commands here"
            if run.is_mine
            else f"Slurm shows the jobs of {run.owner} to no other user"
        )
        reason = status.reason if status else unknown
        return State(name, f"as last recorded: {reason}", started.get("restarts", 0))
    error = error_logs(attempt).last_error() if status.state == FAILED else ""
    # sacct does not say how often a job was requeued.
    recorded = started.get("restarts")
    restarts = max(status.restarts, recorded if isinstance(recorded, int) else 0)
    return State(status.state, status.reason + (f": {error}" if error else ""), restarts)
