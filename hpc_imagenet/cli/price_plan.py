"""`price=true`: the prices of a plan's trainings, from records or from short jobs that time them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from hpc_imagenet.cli.submit import PreparedPlan, prepare
from hpc_imagenet.cluster.free_nodes import FreeNode, free_nodes
from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.executors import EXECUTORS
from hpc_imagenet.launch.pricing.price import DATA, KnownTimes, Price, images_of, known_times, price
from hpc_imagenet.launch.pricing.search_price import possible_trials, search_price
from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.validate import version_finder
from hpc_imagenet.report.jobs_table import watch
from hpc_imagenet.report.price_table import WIDTH, PriceReport, print_prices
from hpc_imagenet.runs.attempt import FAILED
from hpc_imagenet.runs.job import Job
from hpc_imagenet.stages.price_stage import PRICE, price_config
from hpc_imagenet.stages.search_stage import SEARCH
from hpc_imagenet.stages.train_stage import TRAIN


def print_plan_prices(prepared: PreparedPlan, as_json: bool = False) -> None:
    """Print the prices of a plan, as a table or as JSON; nothing of it is submitted.

    Raises:
        UserError: it has no training, a dataset does not exist yet, or a price job failed.
    """
    # Where JSON is parsed, the price jobs are shown beside it.
    stream = sys.stderr if as_json else sys.stdout
    console = Console(file=stream, width=WIDTH, highlight=False)
    with contextlib.redirect_stdout(stream):  # `run_job` heeds it for a price job in the foreground
        prices = plan_prices(prepared, console)
    searches = [job.config for job in prepared.jobs if job.stage == SEARCH.name]
    search = search_price(searches[0], prepared.store, prices) if searches else None
    prices = list({each.job.run_id: each for each in prices}.values())  # a row for each length and speed
    new = [each.job for each in prices if not each.free]
    starts = EXECUTORS[prepared.executor].expected_starts(prepared.store, [(job, ()) for job in new])
    report = PriceReport(prices, search, starts, _free_nodes(prices))
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
        return
    print_prices(report, console)
    print("nothing was submitted (price=true)")


def plan_prices(prepared: PreparedPlan, console: Console) -> list[Price]:
    """Return the price of each training of a plan, and show the price jobs that are needed for it.

    Of a search these are its `possible_trials`, without those that cannot be trained.

    Raises:
        UserError: see `print_plan_prices`.
    """
    find_version = version_finder()
    planned = [job for job in prepared.jobs if job.stage == TRAIN.name]
    workers = [job for job in prepared.jobs if job.stage == SEARCH.name]
    if workers:  # they differ in their numbers alone
        planned = possible_trials(workers[0], find_version)
    trainings = [_with_data(job, find_version(job.config.datastore)) for job in planned]
    if not trainings:
        stages = ", ".join(dict.fromkeys(job.stage for job in prepared.jobs))
        raise UserError(f"price=true is for trainings, and this submission has only {stages}: remove it")
    state_of = states(map(prepared.store.run, {job.run_id for job in trainings}))
    if workers:  # a trial that was trained already is among those that the study need not train
        state_of = dict.fromkeys(state_of, State(FAILED, "was never submitted"))
    known: dict[str, KnownTimes | None] = {}
    for job in trainings:
        state = state_of[job.run_id]
        if not (state.finished or state.active):
            known[job.run_id] = known_times(job, prepared.store)
    missing = [job for job in trainings if known.get(job.run_id, job) is None]
    failures = _time(missing, console, go_on=bool(workers)) if missing else []
    found = {}
    for job in {job.run_id: job for job in trainings}.values():
        times = known.get(job.run_id) or (known_times(job, prepared.store) if job.run_id in known else None)
        if workers and times is None:
            continue
        run = None if workers else prepared.store.run(job.run_id)
        found[job.run_id] = price(job, run, state_of[job.run_id], times, images_of(job))
    if not found:
        raise UserError(failures[0] if failures else "the records of the price jobs are missing: repeat this")
    for line in failures:
        console.print(f"a trial of the search cannot be trained: {line}", markup=False, soft_wrap=True)
    return [found[job.run_id] for job in trainings if job.run_id in found]


def _free_nodes(prices: Sequence[Price]) -> dict[str, list[FreeNode]]:
    """Return the free nodes, by run id, of the trainings that wait for data and would be faster with more."""
    bound = [each.job for each in prices if each.known and each.known.bound == DATA]
    slurm = [job for job in bound if job.cluster.executor == "slurm"]
    nodes = {name: free_nodes(name) for name in {job.cluster.partition for job in slurm}}
    return {job.run_id: nodes[job.cluster.partition] for job in slurm}


def _with_data(job: Job, datastore: Datastore | None) -> Job:
    """Return the job with its datastore pinned; of a pipeline, to the version that exists already."""
    if datastore is None or datastore.content != job.config.datastore.content:
        raise UserError(
            f"price=true times trainings on their images, and datastore {job.config.datastore.name} does not "
            "have them yet: submit the same with +stage=download, +stage=process and +stage=upload first"
        )
    return replace(job, config=replace(job.config, datastore=datastore))


def _time(jobs: Sequence[Job], console: Console, go_on: bool) -> list[str]:
    """Run the price jobs of trainings, one for each shape, and wait for them.

    Args:
        jobs: the trainings.
        console: where the price jobs are shown.
        go_on: whether those that fail are left out, as a search goes on after a trial that fails.

    Returns:
        Why price jobs failed.

    Raises:
        UserError: one of them did not end, or failed without `go_on`.
    """
    configs = {PRICE.run_id(config): config for config in (price_config(job.config) for job in jobs)}
    plans = [prepare(list(configs.values()))]
    if go_on and not plans[0].in_background:  # which cancels the jobs after one that fails
        plans = [prepare([config]) for config in configs.values()]
    runs = [entry.run for plan in plans for entry in plan.submit()]
    if plans[0].in_background:
        watch(runs, console)
    failures = []
    for run_id, state in states(runs).items():
        line = f"{run_id} {state.name}: {state.reason}"
        if not state.finished and not (go_on and state.name == FAILED):
            raise UserError(line)
        if not state.finished:
            failures.append(line)
    return failures
