"""What of a trial exists before a worker trains it: its run, of an ordinary training or of another search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hpc_imagenet.cluster import slurm
from hpc_imagenet.runs.attempt import ENDED, FAILED, FINISHED, PRUNED, Attempt, is_number
from hpc_imagenet.runs.metrics_file import validation_rows
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.search.study_files import EXECUTOR, SKIPPED, StudyFiles, TrialRecord


def ended_workers(workers: Sequence[Run]) -> set[str]:
    """Return the ids of workers that have ended for good: with an outcome, or as Slurm reports.

    A job that Slurm no longer knows has ended: without accounting it forgets jobs after minutes.
    """
    ended, jobs = set[str](), dict[str, str]()
    for worker in workers:
        attempt = worker.attempt
        if attempt is None or attempt.outcome:
            ended.add(worker.id)
        elif attempt.submitted.get("executor") == "slurm":
            jobs[str(attempt.submitted.get("job_id"))] = worker.id
    if not slurm.is_available():
        return ended
    status = slurm.query_jobs(jobs)
    return ended | {worker for job, worker in jobs.items() if job not in status or status[job].state in ENDED}


def existing_end(record: TrialRecord, begun: bool, store: RunStore, files: StudyFiles) -> TrialRecord | None:
    """Return how the run of a trial has ended, if it is not to be trained: finished, pruned or active.

    Args:
        record: the trial, with its run and the worker that has it.
        begun: whether a worker has had it before, perhaps to its end, which it could not record any more.
        store: runs of the workspace.
        files: files of the study.
    """
    run = store.run(record.run)
    if not run.is_mine:
        return _run_of_another_user(record, run)
    attempt = run.attempt
    outcome = attempt.outcome if attempt else None
    if outcome and outcome.state == FINISHED and outcome.result:
        epochs = outcome.result.get("epochs")
        return replace(record, state=FINISHED, top1=outcome.result.get("top1"), epochs=epochs)
    if begun and outcome and outcome.state in (FAILED, PRUNED) and is_of_study(attempt, files):
        top1 = (outcome.result or {}).get("top1")
        return replace(record, state=outcome.state, reason=outcome.reason, top1=top1)
    for other in files.records():
        same = other.run == record.run and (other.trial, other.rung) != (record.trial, record.rung)
        if same and other.state == PRUNED:
            return other
    if attempt and outcome is None and attempt.submitted.get("worker") != record.worker:
        worker = attempt.submitted.get("worker")
        if worker is None or not ended_workers([store.run(worker)]):
            return replace(record, state=SKIPPED, reason="another job trains the same run")
    return None


def is_of_study(attempt: Attempt | None, files: StudyFiles) -> bool:
    """Whether a worker of the study made an attempt, and not another search or an ordinary submission."""
    submitted = attempt.submitted if attempt else {}
    return submitted.get("executor") == EXECUTOR and submitted.get("study") == files.name


def earlier_validations(run: Run, after: int) -> list[tuple[int, float]]:
    """Return epoch and accuracy (0 to 1) of what a run has validated after an epoch, in their order."""
    found = {row["epoch"]: row["top1"] for row in validation_rows(run.folder / "metrics.csv")}
    return sorted((epoch, top1) for epoch, top1 in found.items() if epoch > after and is_number(top1))


def _run_of_another_user(record: TrialRecord, run: Run) -> TrialRecord:
    """Return how a trial ends whose run another user of the workspace made, and alone can write.

    A result is used if it can be one: this user's study must not fail because of what others have written.
    """
    attempt = run.attempt if run.is_readable() else None
    outcome = attempt.outcome if attempt else None
    if outcome and outcome.state in (FINISHED, PRUNED) and isinstance(outcome.result, dict):
        top1, epochs = (outcome.result.get(name) for name in ("top1", "epochs"))
        if isinstance(top1, (int, float)) and 0 <= top1 <= 1 and isinstance(epochs, int):
            reason = f"{run.owner} has trained it"
            return replace(record, state=outcome.state, top1=float(top1), epochs=epochs, reason=reason)
    return replace(record, state=SKIPPED, reason=f"{run.owner} has the same run, without a result")
