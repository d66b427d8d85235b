"""Prices of searches: which trainings they may draw, what is left, the budget, workers at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.config.input.search_space import sample_values, trial_config
from hpc_imagenet.config.schema import cluster_for
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.pricing.price import KnownTimes, Price, sweep_seconds
from hpc_imagenet.launch.pricing.search_price import SearchPrice, possible_trials, search_price
from hpc_imagenet.launch.pricing.time_limits import search_needs
from hpc_imagenet.launch.validate import version_finder
from hpc_imagenet.report.price_table import PriceReport, print_prices
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.time_record import PassTime, Time, TimeRecord, training_shape
from hpc_imagenet.search.study_files import StudyFiles, TrialRecord
from hpc_imagenet.stages.search_stage import definition, is_complete

pytestmark = pytest.mark.slow

HOUR = 3600
RATES = "recipe.learning_rate=interval(0.1,1)"
FIXED = (
    *("+search=asha", "datastore.name=digits", "model=resnet18", "recipe=demo", "recipe.global_batch=96"),
    *("cluster=slurm", "cluster.gpus_per_node=1", "search.name=night"),
)


def worker_of(workspace: Path, *words: str) -> Job:
    configs = compose(with_defaults([*FIXED, f"workspace={workspace}"], words))
    return make_plan(configs, version_finder())[0]


def trials_of(workspace: Path, *words: str) -> list[Job]:
    return possible_trials(worker_of(workspace, *words), version_finder())


def hours_each(job: Job, hours: float = 1.0) -> Price:
    """Return the price of a training of so many hours on GPUs."""
    nothing = Time()
    record = TimeRecord(
        *("c0ffee00-price-resnet18", "n1", "A100", 2, {16: PassTime(nothing)}, PassTime(nothing)),
        *(nothing, nothing, nothing),
        shape=training_shape(job.config, job.cluster),
    )
    state = State("failed", "was never submitted")
    return Price(job, state, KnownTimes(record, None), Time(hours * HOUR, 0))


def price_of(workspace: Path, *words: str, records: tuple[TrialRecord, ...] = ()) -> SearchPrice:
    """Return the price of a search whose trainings take an hour each, after these trials."""
    worker, store = worker_of(workspace, *words), RunStore(workspace)
    if records:
        files, search = StudyFiles(store, "night"), worker.config.search
        files.create(definition(worker.config), search.trials, search.budget)
        for record in records:
            files.write(record)
    trials = [hours_each(job) for job in possible_trials(worker, version_finder())]
    return search_price(worker.config, store, trials)


def ended(count: int, rung: int = 0, state: str = "finished", **values: Any) -> tuple[TrialRecord, ...]:
    """Return trials that have ended; the first ones are the best."""
    return tuple(
        TrialRecord(number, rung, state=state, top1=1 - number / 100, **values) for number in range(count)
    )


def test_all_combinations_of_values_that_decide_the_time_are_priced(tmp_path: Path) -> None:
    found = trials_of(tmp_path, "model=resnet18,resnet50", "recipe.size=16,32", RATES, "seed=0,1")
    pairs = [(job.config.model.name, job.config.recipe.size) for job in found]
    assert sorted(pairs) == [("resnet18", 16), ("resnet18", 32), ("resnet50", 16), ("resnet50", 32)]
    hours = dict(zip(sorted(pairs), (1, 3, 2.2, 6.6), strict=True))
    worker = worker_of(tmp_path, "model=resnet18,resnet50", "recipe.size=16,32", "search.trials=64")
    trials = [
        hours_each(job, hours[job.config.model.name, job.config.recipe.size])
        for job in possible_trials(worker, version_finder())
    ]
    assert search_price(worker.config, RunStore(tmp_path), trials).hours == pytest.approx(64 * 3.2)


def test_a_value_counts_as_often_as_it_is_drawn(tmp_path: Path) -> None:
    first, *others = trials_of(tmp_path, "recipe.mixup=0,0.1,0.2")
    assert [job.run_id for job in others] == [others[0].run_id] * 2
    assert first.run_id != others[0].run_id


def test_schedules_of_the_same_sizes_but_of_other_lengths_have_a_price_each(tmp_path: Path) -> None:
    words = ("recipe.start_size=8", "recipe.epochs=10", "recipe.grow_from=1", "recipe.grow_to=2,7")
    assert len({job.run_id for job in trials_of(tmp_path, *words)}) == 2


def test_combinations_that_no_training_takes_are_left_out(tmp_path: Path) -> None:
    words = ("recipe.start_size=8", "recipe.epochs=10", "recipe.grow_from=2,8", "recipe.grow_to=9,4")
    found = [(job.config.recipe.grow_from, job.config.recipe.grow_to) for job in trials_of(tmp_path, *words)]
    assert sorted(found) == [(2, 4), (2, 9), (8, 9)]


def test_of_many_combinations_some_are_drawn(tmp_path: Path) -> None:
    words = ("recipe.size=range(16,32)", "recipe.global_batch=range(92,100)")
    found, again = trials_of(tmp_path, *words), trials_of(tmp_path, *words)
    assert [job.run_id for job in found] == [job.run_id for job in again]
    assert len({job.run_id for job in found}) > 30
    recipes = [job.config.recipe for job in found]
    assert Counter(recipe.size for recipe in recipes) == dict.fromkeys(range(16, 32), 4)
    assert Counter(recipe.global_batch for recipe in recipes) == dict.fromkeys(range(92, 100), 8)


def test_lengths_of_growth_are_priced_also_if_the_first_trial_does_not_grow(tmp_path: Path) -> None:
    words = ("recipe.start_size=null,8", "recipe.grow_to=9,4", "recipe.epochs=10")
    found = [(job.config.recipe.start_size, job.config.recipe.grow_to) for job in trials_of(tmp_path, *words)]
    assert {(8, 4), (8, 9)} < set(found)
    assert len(found) == 4


def test_a_trial_has_the_resources_of_its_worker(tmp_path: Path) -> None:
    stages = "+cluster.stage={search: {gpus_per_node: 4, cpus_per_task: 3, time: 77}, train: {time: 60}}"
    worker = worker_of(tmp_path, stages, RATES)
    (trial,) = possible_trials(worker, version_finder())
    assert replace(trial.cluster, stage={}) == replace(worker.cluster, stage={})
    assert (trial.cluster.tasks, trial.cluster.time) == (4, 77)
    found = trial_config(worker.config, sample_values(worker.config.search.space)[0])
    shape = training_shape(found, cluster_for(found, "train"))  # under which its times are recorded
    assert (shape["tasks"], shape["resources"], shape["batch"][0]) == (4, [1, 3], 24)
    plain = worker_of(tmp_path, "+cluster.stage={train: {time: 60}}", RATES)
    assert possible_trials(plain, version_finder())[0].cluster == plain.cluster


def test_rungs_of_a_price_are_those_of_the_study(tmp_path: Path) -> None:
    # The longest warm-up decides: after the first one, of an epoch, there would be a rung at 3 epochs.
    words = (RATES, "recipe.epochs=90", "recipe.warmup_epochs=interval(0,5)")
    assert price_of(tmp_path, *words).share == pytest.approx((10 + 20 / 3 + 60 / 9) / 90)


HALVING = ("+search=halving", RATES, "recipe.epochs=90", "recipe.warmup_epochs=5", "search.trials=27")


@pytest.mark.parametrize(
    ("records", "trainings", "epochs"),
    [
        ((), 27 + 9 + 3, 27 * 10 + 9 * 30 + 3 * 90),
        (ended(20), 7 + 9 + 3, 7 * 10 + 9 * 30 + 3 * 90),
        (ended(27), 9 + 3, 9 * 30 + 3 * 90),
        (ended(21) + ended(27, state="failed")[21:], 7 + 2, 7 * 30 + 2 * 90),
        (ended(27) + ended(9, 1) + ended(2, 2), 1, 90),
        (ended(27) + ended(9, 1) + ended(3, 2), 0, 0),
        # Two were among the best third when they were trained again, and are not any more.
        (ended(27) + ended(11, 1)[2:], 2 + 3, 2 * 30 + 3 * 90),
    ],
)
def test_a_halving_search_costs_the_rungs_that_are_left(
    tmp_path: Path, records: tuple[TrialRecord, ...], trainings: int, epochs: int
) -> None:
    found = price_of(tmp_path, *HALVING, records=records)
    assert (found.trials, found.noun, found.share) == (trainings, "trainings", None)
    assert found.hours == pytest.approx(epochs / 90)
    assert found.work == pytest.approx(epochs / 90 * HOUR)
    if records:
        complete = is_complete(StudyFiles(RunStore(tmp_path), "night"), 27, None)
        assert complete == (trainings == 0)


@pytest.mark.parametrize(
    ("trials", "records", "workers", "fits"),
    [
        # The last trial of the first rung lets one begin at each later rung: one worker trains all three.
        (27, ended(26) + ended(8, 1) + ended(2, 2), 1, False),
        # Two that were interrupted do not wait for each other.
        (30, (*ended(30), *ended(9, 1), TrialRecord(9, 1), *ended(2, 2), TrialRecord(2, 2)), 2, True),
    ],
)
def test_workers_that_continue_a_halving_search(
    tmp_path: Path, trials: int, records: tuple[TrialRecord, ...], workers: int, fits: bool
) -> None:
    words = (*HALVING[:-1], f"search.trials={trials}", "cluster.max_requeues=0", "cluster.time=70")
    found = price_of(tmp_path, *words, records=records)
    assert (found.workers, found.most) == (workers, workers)
    prices = [hours_each(job) for job in trials_of(tmp_path, *words)]
    fix = search_needs(found, prices)
    assert ("cluster.time=" not in fix) == fits
    assert "search.parallel" not in fix


def test_trials_that_have_ended_cost_nothing(tmp_path: Path) -> None:
    words = (RATES, "+search=tpe", "search.trials=10")
    found = price_of(tmp_path, *words, records=(*ended(4), TrialRecord(4)))
    assert (found.trials, found.hours, found.noun) == (6, 6, "trials")


def test_the_rest_of_the_budget_bounds_the_price(tmp_path: Path) -> None:
    words = (RATES, "+search=tpe", "search.trials=64", "search.parallel=4", "cluster.gpu_hour_price=2")
    found = price_of(tmp_path, *words, "search.budget=20", records=ended(4, hours=2.5))
    # Ten GPU-hours are left, and each worker ends the trial that it has then.
    assert (found.trials, found.rest, found.hours, found.money) == (60, 10, 14, 28)
    assert found.seconds == pytest.approx(3.5 * HOUR)  # 2.5 h until the budget is spent, and a trial
    kept = price_of(tmp_path, *words)
    assert (kept.budget, kept.rest, kept.hours) == (20, 10, 14)
    few = price_of(tmp_path / "few", *words[:2], *words[3:], "search.trials=5", "search.budget=2")
    assert (few.hours, few.seconds) == (5, 1.5 * HOUR)
    assert price_of(tmp_path, *words, "search.budget=99").hours == 60
    pruned = (*words[:1], *words[2:], "recipe.epochs=90", "recipe.warmup_epochs=5")
    one, all_of_it = (
        price_of(tmp_path / budget, *pruned, f"search.budget={budget}") for budget in ("20", "999")
    )
    assert all_of_it.share == pytest.approx((10 + 20 / 3 + 60 / 9) / 90)
    assert (one.hours, one.share) == (24, pytest.approx(64 * all_of_it.share / 24))


def lines_of(found: SearchPrice, workspace: Path, capsys: pytest.CaptureFixture[str]) -> str:
    prices = [hours_each(job) for job in trials_of(workspace, RATES)]
    print_prices(PriceReport(prices, found), Console(width=80, highlight=False))
    return capsys.readouterr().out


def test_a_spent_budget_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (RATES, "+search=tpe", "search.trials=64", "search.budget=10")
    spent = price_of(tmp_path, *words, records=ended(4, hours=2.5))
    assert (spent.trials, spent.hours, spent.seconds, spent.work) == (0, 0, 0, 0)
    assert "\nsearch.budget=10 is spent: no trial begins\n" in lines_of(spent, tmp_path, capsys)
    goes_on = price_of(tmp_path, *words, records=(*ended(4, hours=2.5), TrialRecord(4)))
    assert (goes_on.trials, goes_on.hours) == (1, 1)


def test_money_and_energy_are_in_both_prices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ("cluster.gpu_hour_price=2", "cluster.gpu_watts=500")
    schedule = ("recipe.epochs=90", "recipe.warmup_epochs=5", "search.trials=27", "search.parallel=9")
    found = price_of(tmp_path, RATES, *schedule, *rates)
    line = (
        "27 trials by 9 workers: about 46:40, 7.00 GPU-h, money 14.0 and 3.50 kWh if two of three end at "
        "each rung · 3:00:00, 27.0 GPU-h, money 54.0 and 13.5 kWh if each trains to its end\n"
    )
    assert line in lines_of(found, tmp_path, capsys)
    halving = price_of(tmp_path, RATES, "+search=halving", *schedule)
    line = "39 trainings by 9 workers: 1:40:00 and 9.00 GPU-h if each trains to its end\n"
    assert line in lines_of(halving, tmp_path, capsys)


LOCAL = ("cluster=local", "search.parallel=16")


@pytest.mark.parametrize(
    ("words", "at_once"),
    [
        ((*LOCAL, "cluster.gpus_per_node=null"), 4),
        ((*LOCAL, "cluster.gpus_per_node=2"), 2),
        ((*LOCAL, "cluster.parallel=3"), 3),
        ((*LOCAL, "cluster.parallel=8"), 4),
        ((*LOCAL, "cluster.gpus_per_node=0", "cluster.parallel=8"), 8),
        (("cluster=foreground", "search.parallel=16"), 1),
        (("search.parallel=16", "cluster.array_parallelism=5"), 5),
        (("search.parallel=3",), 3),
    ],
)
def test_workers_that_run_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], at_once: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = price_of(tmp_path, RATES, "+search=tpe", "search.trials=32", *words)
    assert found.at_once == at_once
    assert found.workers == (3 if "search.parallel=3" in words else 16)
    assert found.seconds == pytest.approx(-(-32 // at_once) * HOUR)


def test_trainings_of_a_sweep_share_the_gpus_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial,) = trials_of(tmp_path, RATES, *LOCAL)
    for gpus, hours in (("0,1,2,3", 1), ("0,1", 2), ("", 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        assert sweep_seconds([hours_each(trial)] * 4) == hours * HOUR
