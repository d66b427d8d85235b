"""Refuse time limits within which a training or a search would not end, where its time is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.pricing.price import (
    Images,
    Price,
    exceeds_limit,
    images_of,
    known_times,
    price,
    settings_needed,
)
from hpc_imagenet.launch.pricing.search_price import SearchPrice, possible_trials, search_price
from hpc_imagenet.runs.attempt import FAILED
from hpc_imagenet.runs.job import FindVersion, Job
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.time_record import times_folders
from hpc_imagenet.stages.search_stage import SEARCH
from hpc_imagenet.stages.train_stage import TRAIN


def check_time_limits(
    plan: Sequence[Job], store: RunStore, state_of: Mapping[str, State], find_version: FindVersion
) -> None:
    """Raise for a training or a search that cannot end within its time limit and its requeues.

    What has no recorded time is not refused.

    Raises:
        UserError: with the requeues, or the limit, that would be enough.
    """
    if not times_folders(store.folder):
        return
    limited = [job for job in plan if job.cluster.executor == "slurm" and job.cluster.time]
    sizes: dict[str, Images] = {}
    for job in limited:
        if job.stage == TRAIN.name:
            _check_training(job, store, state_of[job.run_id], sizes)
    workers = [job for job in limited if job.stage == SEARCH.name and not state_of[job.run_id].active]
    if workers:  # they differ in their numbers alone
        _check_search(workers[0], store, find_version, sizes)


def search_needs(search: SearchPrice, trials: Sequence[Price]) -> str:
    """Return the settings with which the workers of a search would end all trials; empty if they will.

    Args:
        search: the price of the search.
        trials: prices of its possible trials.
    """
    known = [each for each in trials if each.known]
    cluster = known[0].job.cluster
    startup = max(each.known.record.startup.wall for each in known if each.known)
    alone = search.work / search.workers
    if not exceeds_limit(alone, startup, cluster):
        return ""
    # A trial that trains to its end, and a worker's share of all trials, must both fit.
    longest = max(each.work.wall for each in known)
    more = search.workers
    while more < search.most and exceeds_limit(search.work / more, startup, cluster):
        more += 1
    settings = settings_needed(max(alone, longest), startup, cluster)
    enough = not exceeds_limit(search.work / more, startup, cluster)
    return f"{settings} or search.parallel={more}" if enough else settings


def _check_training(job: Job, store: RunStore, state: State, sizes: dict[str, Images]) -> None:
    found = _price(job, store, state, sizes)
    if found is None or found.known is None or not found.too_long:
        return
    raise UserError(
        f"cluster.time={job.cluster.time} is too short: {job.run_id} takes {found.work.wall / 60:.0f} "
        f"minutes (as {found.known.record.run} has shown), and would not end with {found.allowed - 1:g} "
        f"requeues: set {found.settings_needed}"
    )


def _check_search(worker: Job, store: RunStore, find_version: FindVersion, sizes: dict[str, Images]) -> None:
    """Raise if a trial, which a worker continues after a requeue, or the whole search would not end."""
    try:
        possible = possible_trials(worker, find_version)
    except UserError:  # other jobs of the plan will write the data
        return
    different = {trial.run_id: trial for trial in possible}  # reading times takes a while
    prices = {run_id: _price(trial, store, None, sizes) for run_id, trial in different.items()}
    trials = [each for trial in possible if (each := prices[trial.run_id]) is not None and each.known]
    if not trials:
        return
    search = search_price(worker.config, store, trials)
    if not search.trials:
        return
    longest = max(trials, key=lambda each: each.minutes_needed)
    assert longest.known is not None
    time, requeues = f"cluster.time={worker.cluster.time} is too short", f"{longest.allowed - 1:g} requeues"
    shown = f"as {longest.known.record.run} has shown"
    if longest.too_long:
        raise UserError(
            f"{time} for a trial of the search {worker.config.search.name}: {longest.job.run_id} takes "
            f"{longest.work.wall / 60:.0f} minutes ({shown}), and a worker would not end it with {requeues}: "
            f"set {longest.settings_needed}"
        )
    # Of trials of unknown speed, and of those that `median` prunes, the time is not known.
    if len(trials) == len(possible) and (fix := search_needs(search, trials)):
        minutes = search.work / search.workers / 60
        pruned = " if two of three end at each rung" if search.share is not None else ""
        raise UserError(
            f"{time}: for {search.trials} {search.noun} each of {search.workers} workers needs about "
            f"{minutes:.0f} minutes{pruned} ({shown}), more than it has with {requeues}: set {fix}"
        )


def _price(job: Job, store: RunStore, state: State | None, sizes: dict[str, Images]) -> Price | None:
    """Return the price of a training; None: its times are not recorded, or its data do not exist yet.

    Args:
        job: the training.
        store: runs of the workspace.
        state: state of its run, whose progress counts; None: it begins anew.
        sizes: sizes of datasets that are known already.
    """
    known = known_times(job, store)
    if known is None:
        return None
    key = repr(job.config.datastore)
    if key not in sizes:
        try:
            sizes[key] = images_of(job)
        except UserError:  # other jobs of the plan will write it
            return None
    if state is None:
        return price(job, None, State(FAILED), known, sizes[key])
    return price(job, store.run(job.run_id), state, known, sizes[key])
