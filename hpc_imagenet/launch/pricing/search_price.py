"""What a search costs: the prices of its possible trials, times the trials that are left."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_imagenet.config.input.search_space import ends_of, sample_values, trial_config
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.config.search import REDUCTION
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.pricing.price import Price, jobs_at_once, tasks_of
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.job import FindVersion, Job
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.time_record import training_shape
from hpc_imagenet.search.rungs import promotable
from hpc_imagenet.search.study_files import StudyFiles, TrialRecord
from hpc_imagenet.stages.search_stage import definition
from hpc_imagenet.stages.train_stage import TRAIN

_MOST_COMBINATIONS = 64  # of values that decide the time; of more, so many are drawn at random
_GROWTH = ("recipe.start_size", "recipe.grow_from", "recipe.grow_to")  # decide together


@dataclass(frozen=True)
class SearchPrice:
    """The price of a search, without queues.

    Attributes:
        trials: those that are left; of a `halving` search the trainings of all its rungs.
        workers: jobs that train them.
        most: workers that would find a training when they start.
        at_once: workers that run at a time.
        seconds: until the last one ends, if each trains to its end, or until the budget is spent.
        hours: GPU-hours (without GPUs: CPU-hours) of the same.
        share: of seconds, hours, money and kwh, if two of three trials end at each rung; None: the search
            prunes none at rungs.
        work: s of all workers together, without startup: `share` of all schedules, or until the budget is
            spent. 0 of a `median` search: how many trials it prunes is not known.
        budget: GPU-hours after which no trial begins; None: unlimited.
        rest: GPU-hours of the budget that are left; None: unlimited.
        money: as `hours`; None: no price is set, or there is no GPU.
        kwh: as `hours`; None: no power is set, or there is no GPU.
        noun: what `trials` counts: trials or trainings.
    """

    trials: int
    workers: int
    most: int
    at_once: int
    seconds: float
    hours: float
    share: float | None
    work: float
    budget: float | None
    rest: float | None
    money: float | None
    kwh: float | None
    noun: str


def possible_trials(worker: Job, find_version: FindVersion) -> list[Job]:
    """Return trainings that a search may draw, with the resources of a worker.

    There is one for each combination of the values that decide how long a training takes, of an interval its
    ends; of many combinations some are drawn, in which each value is as frequent as the others. The list
    repeats the job of those that have one length and speed.

    Args:
        worker: a worker of the search.
        find_version: as for `make_plan`.
    """
    found: dict[str, Job] = {}
    jobs = []
    for values in _timed_values(worker.config):
        try:
            trial = trial_config(worker.config, values)
        except UserError:  # each value is valid with the first ones of the others, if not with all
            continue
        key = _speed(trial)
        if key not in found:
            (found[key],) = make_plan([trial], find_version)
        jobs.append(found[key])
    return jobs


def search_price(config: Config, store: RunStore, trials: Sequence[Price]) -> SearchPrice:
    """Return the price of a search, each of whose trials costs the mean of the possible ones.

    Args:
        config: config of a worker.
        store: runs of the workspace, where the study may have begun.
        trials: prices of `possible_trials`.
    """
    search, cluster = config.search, trials[0].job.cluster
    files = StudyFiles(store, str(search.name))
    about, records = files.definition or definition(config), files.records()
    budget = files.budget_after(search.budget)
    rest = None if budget is None else max(0.0, budget - files.hours)
    left, most = _left(about, max(search.trials, files.target), records, is_spent=rest == 0)
    schedules = sum(count * epochs for count, epochs in left) / about["epochs"]
    workers = max(1, min(search.parallel, most))
    at_once = jobs_at_once(cluster, workers)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    seconds = mean([each.total.wall for each in trials]) or 0.0
    share = _share(about)
    work = (
        0.0 if search.algorithm == "median" else schedules * (mean([each.work.wall for each in trials]) or 0)
    )
    work *= 1.0 if share is None else share
    cost, duration = schedules, seconds * sum(-(-count // at_once) * epochs for count, epochs in left)
    duration /= about["epochs"]
    if rest and schedules:
        processes = tasks_of(trials[0].job)
        work = min(work, 3600 * rest / processes)
        # What has begun before the budget is spent trains on.
        affordable = 3600 * rest / (seconds * processes) + at_once if seconds else math.inf
        cost = min(schedules, affordable)
        duration = min(duration, 3600 * rest / (processes * at_once) + seconds)
        share = None if share is None else min(1.0, share * schedules / cost)

    def of_all(values: Sequence[float | None]) -> float | None:
        value = mean(values)
        return None if value is None else cost * value

    return SearchPrice(
        trials=sum(count for count, _ in left),
        workers=workers,
        most=most,
        at_once=at_once,
        seconds=duration,
        hours=of_all([each.device_hours for each in trials]) or 0.0,
        share=share,
        work=work,
        budget=budget,
        rest=rest,
        money=of_all([each.money for each in trials]),
        kwh=of_all([each.energy for each in trials]),
        noun="trainings" if about["algorithm"] == "halving" else "trials",
    )


def _timed_values(config: Config) -> Iterator[Mapping[str, str]]:
    """Yield the values of possible trials: all combinations of those that decide how long one takes."""
    space = config.search.space
    first, *others = sample_values(space)
    trial = trial_config(config, first)
    deciding, usual, grows = set[str](), _speed(trial), trial.recipe.start_size is not None
    for values in others:  # each differs from the first in one dimension
        trial = trial_config(config, values)
        grows |= trial.recipe.start_size is not None
        if _speed(trial) != usual:
            deciding.update(name for name in space if values[name] != first[name])
    if grows:  # the first trial may have no start_size, and then the others decide nothing
        deciding.update(space.keys() & _GROWTH)
    ends = {name: ends_of(each) for name, each in space.items() if name in deciding}
    combinations: Iterator[tuple[str, ...]] = itertools.product(*ends.values())
    if math.prod(map(len, ends.values())) > _MOST_COMBINATIONS:
        rng = random.Random(0)
        combinations = zip(*(_drawn(each, rng) for each in ends.values()), strict=True)
    for combination in combinations:
        yield {**first, **dict(zip(ends, combination, strict=True))}


def _drawn(values: Sequence[str], rng: random.Random) -> list[str]:
    """Return `_MOST_COMBINATIONS` values in random order, each as often as the others, so none is missing."""
    shuffled = rng.sample(values, len(values))
    drawn = list(itertools.islice(itertools.cycle(shuffled), _MOST_COMBINATIONS))
    rng.shuffle(drawn)
    return drawn


def _speed(trial: Config) -> str:
    """Return a text that is equal for trainings of one length and speed."""
    return repr((training_shape(trial, cluster_for(trial, TRAIN.name)), trial.recipe.sizes))


def _left(
    about: Mapping[str, Any], trials: int, records: list[TrialRecord], is_spent: bool
) -> tuple[list[tuple[int, int]], int]:
    """Return how many trainings are left, with their epochs, and how many of all may begin now.

    There is one entry for each rung of a `halving` search, which trains a third of its trials again at the
    next one, and one entry for all trials of another search.

    Args:
        about: definition of the study.
        trials: trials that are requested.
        records: trials that have begun.
        is_spent: whether none may begin any more.
    """
    rungs = about["rungs"] if about["algorithm"] == "halving" else [about["epochs"]]
    promoted = Counter(rung for _, rung in promotable(records, len(rungs)))
    found, now = [], 0
    for rung, epochs in enumerate(rungs):
        here = [record for record in records if record.rung == rung]
        ended = sum(record.ended for record in here)
        finished = sum(record.state == FINISHED for record in here)
        begun = len(here) - ended
        left = begun if is_spent else max(trials - ended, begun + promoted[rung])
        found.append((left, epochs))
        # A worker that finds no training ends, so those that wait for a rung below are of its workers.
        now += left if rung == 0 else min(left, begun + promoted[rung])
        trials = (finished + left) // REDUCTION
    return found, now


def _share(about: Mapping[str, Any]) -> float | None:
    """Return the epochs that trials take on average, of a whole schedule; None: none is pruned at rungs."""
    rungs: list[int] = about["rungs"]
    if about["algorithm"] != "asha" or len(rungs) == 1:  # or the schedule is too short for another one
        return None
    steps = [after - before for before, after in zip([0, *rungs], rungs, strict=False)]
    return math.fsum(step / REDUCTION**number for number, step in enumerate(steps)) / float(about["epochs"])
