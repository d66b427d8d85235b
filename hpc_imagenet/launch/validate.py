"""Validate the whole plan before anything is written; one invalid job aborts the submission."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import explain_permission_error
from hpc_imagenet.io.atomic_files import DISK_FULL_ERRNOS
from hpc_imagenet.io.ownership import keep_names
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.executors import EXECUTORS
from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, PRUNED
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.stages import STAGES


def prepare_workspace(path: Path) -> None:
    """Create `runs/` in the workspace and test that it is writable.

    Raises:
        UserError: the workspace cannot be written.
    """
    runs = path / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        keep_names(runs)
        with tempfile.TemporaryFile(dir=runs) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except PermissionError as error:
        raise UserError(f"workspace={path} cannot be written: {explain_permission_error(error)}") from None
    except OSError as error:
        full = error.errno in DISK_FULL_ERRNOS
        fix = "free some space, or set another workspace=" if full else "set another workspace="
        raise UserError(f"workspace={path} cannot be written ({error.strerror}): {fix}") from None


def version_finder() -> Callable[[Datastore], Datastore | None]:
    """Return a cached lookup for `plan.make_plan` of a datastore's newest, or pinned, version."""
    cache: dict[tuple[str, str, int | None], Datastore | None] = {}

    def find_version(datastore: Datastore) -> Datastore | None:
        key = (datastore.url, datastore.name, datastore.version)
        if key not in cache:
            name, _ = versions.parse_reference(datastore.name)
            cache[key] = None
            if versions.complete_versions(datastore.url, name):
                version = versions.open_version(datastore)
                cache[key] = replace(datastore, version=version.number, content=version.manifest.content)
        return cache[key]

    return find_version


def validate_jobs(plan: Sequence[Job], store: RunStore) -> dict[str, State]:
    """Raise unless every job of the plan can run: known model, valid resources, existing or planned inputs.

    Returns:
        The states of all jobs and of the runs they need, by run id: the snapshot for the whole command.

    Raises:
        UserError: the first invalid job, with the setting or stage that fixes it.
    """
    planned = {job.run_id for job in plan}
    for run_id in planned.union(*(job.needs for job in plan)):
        _check_readable(store.run(run_id))
    processing = processing_runs(store) if any(job.processing_run for job in plan) else []
    state_of = states([*map(store.run, planned.union(*(job.needs for job in plan))), *processing])
    active_runs = [run for run in processing if state_of[run.id].active]

    def is_skipped(job: Job) -> bool:
        state = state_of[job.run_id]
        return state.active or (state.finished and output_exists(job))

    for job in plan[:1]:  # notify is the same for the whole command
        notification.check(job.config.notify, elsewhere=bool(job.cluster.container))
    _check_single_processing_run(plan)
    checked = set()  # inputs that several jobs share
    for job in plan:
        store.run(job.run_id).check_format()
        if state_of[job.run_id].active:
            STAGES[job.stage].check_active(job.config, store.run(job.run_id))
        if not is_skipped(job):
            _check_mine(store.run(job.run_id), state_of[job.run_id])
        stage, config = STAGES[job.stage], job.config
        for each in (job, *job.alternatives):
            stage.check_settings(each.config, each.cluster)
            shares_loader = stage.loader_key(each.config) is not None
            EXECUTORS[each.cluster.executor].check_settings(each.stage, each.cluster, shares_loader)
        if (other := _conflicting_run(job.stage, job.processing_run, active_runs)) and not is_skipped(job):
            _raise_conflict(job.run_id, other)
        for need in job.needs:
            if state_of[need].active:
                store.run(need).check_format()
                if not is_skipped(job):
                    EXECUTORS[job.cluster.executor].check_need(job.run_id, store.run(need))
        key = stage.input_key(config, job.cluster)
        if key is not None:
            if key in checked:
                continue
            checked.add(key)
        versions.parse_reference(config.datastore.name)  # raises for an invalid name
        planned_input = any(need in planned or state_of[need].active for need in job.needs)
        stage.check_input(config, job.cluster, planned_input)
    return state_of


def _check_readable(run: Run) -> None:
    """Raise if the same job was submitted by another user of the workspace, and only they may read it."""
    if run.folder.exists() and not os.access(run.folder, os.R_OK | os.X_OK, effective_ids=True):
        raise UserError(
            f"{run.id} belongs to {run.owner}, and you may not read it: set another workspace=FOLDER, or "
            f"have {run.owner} run chmod -R g+rX {run.folder}"
        )


def _check_mine(run: Run, state: State) -> None:
    """Raise if only another user can continue the same job: it waits, or has ended without output."""
    if run.is_mine:
        return
    ends = {FAILED: "failed", CANCELLED: "was cancelled", PRUNED: "was pruned"}
    ended = f"after it {ends.get(state.name, 'finished without its output')}"
    run.check_mine(
        f"continue it {'while it waits' if state.waiting else ended}",
        f"have {run.owner} retry it, or submit with another workspace=FOLDER",
    )


def check_no_conflict(runs: Sequence[Run], active_runs: Sequence[Run]) -> None:
    """Raise if an active run processes or uploads the dataset of one of `runs` with other settings.

    Args:
        runs: runs to be submitted again.
        active_runs: those of `processing_runs` that are queued or running.

    Raises:
        UserError: names the other run.
    """
    for run in runs:
        if other := _conflicting_run(run.info["stage"], run.info.get("processing_run"), active_runs):
            _raise_conflict(run.id, other)


def output_exists(job: Job) -> bool:
    """Whether the output of a finished job still exists, so that the job can be skipped."""
    try:
        STAGES[job.stage].check_output(job.config)
    except UserError:
        return False
    return True


def processing_runs(store: RunStore) -> list[Run]:
    """Return the process and upload runs of the workspace, whatever their state."""
    return [run for run in store.all() if run.info.get("stage") in ("process", "upload")]


def _check_single_processing_run(plan: Sequence[Job]) -> None:
    """Raise if the plan processes a dataset with two sets of settings, which would write one folder."""
    writing = [job for job in plan if STAGES[job.stage].writes_dataset]
    names = [_dataset_of(run) for run in {job.processing_run for job in writing} if run]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"dataset.name={name} would be processed into one folder with two different settings: give "
                "each its own dataset.name, or submit the second when the first has ended"
            )


def _conflicting_run(stage: str, processing_run: str | None, active_runs: Sequence[Run]) -> Run | None:
    """Return an active run that uses the same dataset with other settings, if one of the two writes it.

    Raises:
        UserError: an active run was made by another version.
    """
    for run in active_runs:
        info = run.info
        other = info.get("processing_run")
        if other is None:  # of another version: which dataset it writes is unknown
            if processing_run is None:
                continue
            raise UserError(
                f"{run.id} is running and was made by another version of this package: wait for it, "
                "or cancel it"
            )
        same = processing_run is not None and _dataset_of(other) == _dataset_of(processing_run)
        writes = STAGES[stage].writes_dataset or STAGES[info["stage"]].writes_dataset
        if same and other != processing_run and writes:
            return run
    return None


def _dataset_of(processing_run: str) -> str:
    return processing_run.partition("-process-")[2]


def _raise_conflict(run: str, other: Run) -> None:
    raise UserError(
        f"{run} needs the folder of {other.id}, which processes the dataset with other settings: wait for "
        "it, cancel it, or give this one its own dataset.name"
    )
