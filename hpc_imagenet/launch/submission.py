"""Submit planned jobs to an executor, and cancel runs; retry_plan.py submits failed ones again.

The run folder is always written first: the frozen config, then a claimed attempt, then submitted.json with
the executor. The states of runs are queried once per command, before the decisions that depend on them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_imagenet.cluster import slurm
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import owner_writes
from hpc_imagenet.launch import validate
from hpc_imagenet.launch.executor import Executor, JobsRefused, State, code_version
from hpc_imagenet.launch.executors import EXECUTORS, executor_of
from hpc_imagenet.launch.states import state
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.launch.warm_start import keep_weights
from hpc_imagenet.runs.attempt import CANCELLED, FINISHED, QUEUED, Attempt
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import last_seen
from hpc_imagenet.stages import STAGES


@dataclass(frozen=True)
class Submitted:
    """One job of a plan and the action taken."""

    run: Run
    # submitted, waiting (for a limit), refused, cancelled (since it needs a refused one); finished or active
    # (queued or running): both skipped
    action: str

    @property
    def label(self) -> str:
        """The action as printed, with the owner of another user's run that is used."""
        label = {FINISHED: "already finished", "active": "already running"}.get(self.action, self.action)
        return label if self.run.is_mine else f"{label}, of {self.run.owner}"


def plan_actions(
    plan: Sequence[Job], store: RunStore, state_of: Mapping[str, State]
) -> list[tuple[Job, str, list[str]]]:
    """Return each job of a validated plan, its action (see `Submitted`) and the run ids to wait for.

    A job waits only for active runs: validation has checked that the output of the other needs exists.
    `state_of` is the result of that validation.
    """
    active = {run for run, status in state_of.items() if status.active}
    actions = []
    for job in plan:
        status = state_of[job.run_id]
        needs = [need for need in job.needs if need in active]
        if status.active and not _is_this_job(store.run(job.run_id)):
            actions.append((job, "active", needs))
        elif status.finished and validate.output_exists(job):
            actions.append((job, FINISHED, needs))
        else:
            actions.append((job, "submitted", needs))
            active.add(job.run_id)
    return actions


@owner_writes()
def submit_plan(
    plan: Sequence[Job], store: RunStore, executor: str, state_of: Mapping[str, State]
) -> list[Submitted]:
    """Submit all jobs of a validated plan that are neither finished nor active.

    Args:
        plan: jobs, each after those it needs.
        store: the workspace's runs.
        executor: a name in `executors.EXECUTORS`.
        state_of: the states that the validation returned.

    Returns:
        One entry per job, in the plan's order. With the executor `foreground` the jobs have ended by then.

    Raises:
        JobsRefused: Slurm refused a job; the others are submitted.
    """
    entries: list[Submitted] = []
    for job, action, needs in plan_actions(plan, store, state_of):
        run = store.run(job.run_id)
        STAGES[job.stage].prepare(job.config, store)
        if action == "submitted":
            info: dict[str, Any] = {
                "stage": job.stage,
                "label": job.label,
                "model": job.model,
                "needs": needs,
            }
            if STAGES[job.stage].loader_key(job.config) is not None:
                info["shares_loader"] = True
            if job.processing_run is not None:
                info["processing_run"] = job.processing_run
            if job.config.stage.part is not None:
                info["part"] = job.config.stage.part
            keep_weights(job, run)
            store.create(job.run_id, job.frozen(), info)
        if job.config.sweep is not None:
            with contextlib.suppress(OSError):  # a finished run of another user is used as it is
                run.join_sweep(job.config.sweep)
        entries.append(Submitted(run, action))
    submitted = [entry.run for entry in entries if entry.action == "submitted"]
    actions, errors = start_attempts(store, submitted, executor, state_of)
    if any(entry.action == "active" for entry in entries):
        EXECUTORS[executor].start_queued(store)
    entries = [Submitted(entry.run, actions.get(entry.run.id, entry.action)) for entry in entries]
    if errors:
        raise JobsRefused(errors, entries)
    return entries


def _is_this_job(run: Run) -> bool:
    """Whether the run's last attempt belongs to this Slurm job, which was requeued and resumes it."""
    attempt, job_id = run.attempt, slurm.this_job()
    return job_id is not None and attempt is not None and attempt.submitted.get("job_id") == job_id


def start_attempts(
    store: RunStore, runs: Sequence[Run], executor: str, state_of: Mapping[str, State]
) -> tuple[dict[str, str], list[UserError]]:
    """Create a new attempt of each run and submit it to `executor`; runs come after those they need.

    Called within `owner_writes`. An attempt that waits for a limit of submitted jobs is submitted itself, by
    the process that claims it. So is one of this Slurm job, if Slurm has requeued the job since.

    Returns:
        The action of each run, as in `Submitted`, by its id; why jobs were refused.
    """
    code_version()  # git may be slow: no attempt is to wait for it without a record of its executor
    attempts, new, actions = [], [], {}
    for run in runs:
        status, attempt = state_of.get(run.id), run.attempt
        if status and status.waiting and attempt:
            if attempt.end_waiting():
                attempts.append((run, attempt))
            else:  # another command submits it at this moment
                actions[run.id] = "active"
        elif attempt and _is_this_job(run) and attempt.was_requeued and not attempt.outcome:
            attempts.append((run, attempt))
        else:
            attempts.append((run, run.new_attempt()))
            new.append(attempts[-1])
    notification.record_submission(store, new)
    errors: list[UserError] = []
    try:
        EXECUTORS[executor].submit(store, attempts, state_of)
    except JobsRefused as refused:
        errors = refused.errors
    for run, attempt in attempts:
        actions[run.id] = "waiting" if attempt.waiting else "submitted"
        if errors and not attempt.submitted and (outcome := attempt.outcome):
            actions[run.id] = "cancelled" if outcome.state == CANCELLED else "refused"
    return actions, errors


def end_jobs(runs: Iterable[Run], state_of: Mapping[str, State]) -> set[str]:
    """End the jobs of several runs at once, where their executors can; `cancel_run` is to follow for each.

    Returns:
        Ids of the runs whose jobs are ended.
    """
    attempts: dict[Executor, list[tuple[Run, Attempt]]] = {}
    for run in runs:
        status = state_of[run.id]
        if not status.ended and not status.waiting and _may_cancel(run) and (attempt := run.attempt):
            attempts.setdefault(executor_of(attempt), []).append((run, attempt))
    return {run_id for executor, each in attempts.items() for run_id in executor.end_jobs(each)}


def _may_cancel(run: Run) -> bool:
    return run.is_mine or os.geteuid() == 0


def cancel_run(
    run: Run,
    reason: str = "by the cancel command",
    status: State | None = None,
    job_has_ended: bool = False,
) -> State:
    """Cancel a run on its executor.

    Args:
        run: the run to cancel.
        reason: written into the attempt's outcome.
        status: its state, if the caller has just queried it.
        job_has_ended: whether `end_jobs` has ended its job.

    Returns:
        The run's state before it was cancelled.

    Raises:
        UserError: it cannot be cancelled from this machine, or not yet.
    """
    status, attempt = status or state(run), run.attempt
    if status.ended:
        return status
    if not _may_cancel(run):
        run.check_mine("cancel it", f"have {run.owner} cancel it")
    if attempt is None:
        raise UserError(f"{run.id} {status.reason}: try again in a moment")
    if status.waiting:
        if not attempt.end_waiting():
            raise UserError(f"{run.id} is being submitted: try again in a moment")
        attempt.end(CANCELLED, reason)
    else:
        # A job that was requeued has not run since: its time in the queue is none in which it was running.
        ended = last_seen(attempt) if status.name == QUEUED else None
        if job_has_ended:
            attempt.end(CANCELLED, reason, ended=ended)
        else:
            executor_of(attempt).cancel(run, attempt, reason, ended)
    notification.run_ended(run, attempt)
    return status
