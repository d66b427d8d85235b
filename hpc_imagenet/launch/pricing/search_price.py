"""What a search costs: the prices of its possible trials, times the trials that are left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpc_imagenet.config.input.search_space import sample_values, trial_config
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.config.search import REDUCTION
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.pricing.price import Price, tasks_of
from hpc_imagenet.runs.job import FindVersion, Job
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.time_record import training_shape
from hpc_imagenet.search.rungs import rung_epochs
from hpc_imagenet.search.study_files import StudyFiles
from hpc_imagenet.stages.train_stage import TRAIN


@dataclass(frozen=True)
class SearchPrice:
    """The price of a search, without queues.

    Attributes:
        trials: those that are left.
        workers: jobs that train them.
        seconds: until the last one ends, if each trains its whole schedule.
        hours: GPU-hours (without GPUs: CPU-hours) of all, if each trains its whole schedule.
        share: of both, if two of three trials end at each rung; None: the search has no rungs.
        work: s of all workers together, without startup: `share` of all schedules, or until the budget is
            spent. 0 of a `median` search: how many trials it prunes is not known.
        budget: GPU-hours after which no trial begins; None: unlimited.
        money: of all, as `hours`; None: no price is set, or there is no GPU.
        kwh: of all, as `hours`; None: no power is set, or there is no GPU.
    """

    trials: int
    workers: int
    seconds: float
    hours: float
    share: float | None
    work: float
    budget: float | None
    money: float | None
    kwh: float | None


def possible_trials(worker: Job, find_version: FindVersion) -> list[Job]:
    """Return trainings that a search may draw, one for each length and speed, with the worker's time limit.

    Args:
        worker: a worker of the search.
        find_version: as for `make_plan`.
    """
    config, limits = worker.config, worker.cluster
    found: dict[str, Job] = {}
    for values in sample_values(config.search.space):
        trial = trial_config(config, values)
        shape = training_shape(trial, cluster_for(trial, TRAIN.name))
        (job,) = make_plan([trial], find_version)
        cluster = replace(
            job.cluster, time=limits.time, max_requeues=limits.max_requeues, sbatch=limits.sbatch
        )
        found.setdefault(repr((shape, trial.recipe.epochs)), replace(job, cluster=cluster))
    return list(found.values())


def search_price(config: Config, store: RunStore, trials: Sequence[Price]) -> SearchPrice:
    """Return the price of a search, each of whose trials costs the mean of the possible ones.

    Args:
        config: config of a worker.
        store: runs of the workspace, where the study may have begun.
        trials: prices of `possible_trials`.
    """
    search = config.search
    files = StudyFiles(store, str(search.name))
    records = files.records()
    begun = {record.trial for record in records if record.ended}
    left = max(0, search.trials - len(begun))
    workers = max(1, min(search.parallel, left))
    if config.cluster.executor != "slurm":
        workers = min(workers, config.cluster.parallel or 1)
    rounds = -(-left // workers)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def of_all(values: Sequence[float | None]) -> float | None:
        value = mean(values)
        return None if value is None else left * value

    share = _share(trials[0].job.config, search.algorithm)
    work = 0.0 if search.algorithm == "median" else left * (mean([each.work.wall for each in trials]) or 0.0)
    work *= 1.0 if share is None else share
    if search.budget is not None:
        rest = max(0.0, search.budget - sum(record.hours for record in records))
        work = min(work, 3600 * rest / tasks_of(trials[0].job))
    return SearchPrice(
        trials=left,
        workers=workers,
        seconds=rounds * (mean([each.total.wall for each in trials]) or 0.0),
        hours=of_all([each.device_hours for each in trials]) or 0.0,
        share=share,
        work=work,
        budget=search.budget,
        money=of_all([each.money for each in trials]),
        kwh=of_all([each.energy for each in trials]),
    )


def _share(trial: Config, algorithm: str | None) -> float | None:
    """Return the epochs that trials take on average, of a whole schedule."""
    rungs = rung_epochs(trial.recipe.epochs, trial.recipe.warmup_epochs)
    if len(rungs) == 1:  # the schedule is too short for another one
        return None
    if algorithm == "asha":  # a trial goes on from rung to rung
        steps = [after - before for before, after in zip([0, *rungs], rungs, strict=False)]
    elif algorithm == "halving":  # each rung is a training of its own
        steps = rungs
    else:
        return None
    epochs = math.fsum(step / REDUCTION**number for number, step in enumerate(steps))
    return epochs / trial.recipe.epochs
