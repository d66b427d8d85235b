"""Prices from records: time, starts within a time limit, refusals before submission, the whole sweep."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from fake_slurm import write_command
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.pricing.price import (
    Images,
    KnownTimes,
    Price,
    known_times,
    price,
    sweep_seconds,
)
from hpc_imagenet.launch.validate import version_finder
from hpc_imagenet.report.price_table import PriceReport, print_prices
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.time_record import PassTime, Time, TimeRecord, training_shape, write_record

NEW, IMAGES = State("failed", "was never submitted"), Images(1000, 130)
FIXED = ("datastore.name=digits", "model=resnet18", "recipe=demo", "recipe.global_batch=100")


@functools.cache  # composing takes a while
def job(*overrides: str, workspace: Path = Path("ws")) -> Job:
    words = with_defaults(["cluster=slurm", *FIXED, f"workspace={workspace}"], overrides)
    (planned,) = make_plan(compose(words), version_finder())
    return planned


def record(planned: Job, **values: Any) -> TimeRecord:
    """10 s of startup, 2 s a batch, 1 s a validation batch, 3 s after an epoch."""
    fixed = {"run": "c0ffee00-price-resnet18", "host": "n1", "device": "CPU", "cpus": 2, "short": True}
    parts = {
        "train": {16: PassTime(Time(2, 2))},
        "validation": PassTime(Time(1, 1)),
        "after": Time(3, 3),
        "startup": Time(10, 10),
        "end": Time(),
        "shape": training_shape(planned.config, planned.cluster),
    }
    return TimeRecord(**{**fixed, **parts, **values})


def priced(*overrides: str, times: dict[str, Any] | None = None, state: State = NEW) -> Price:
    planned = job("cluster.gpus_per_node=0", *overrides)
    known = KnownTimes(record(planned, **(times or {})), None)
    return price(planned, RunStore(Path("none")).run(planned.run_id), state, known, IMAGES)


@pytest.mark.slow
def test_the_time_is_that_of_all_parts() -> None:
    found = priced("recipe.epochs=5")
    # 10 batches, 2 validation batches and a checkpoint an epoch
    assert found.total.wall == 10 + 5 * (10 * 2 + 2 * 1 + 3)
    once = {"train": {16: PassTime(Time(2, 2), Time(0.5, 0), Time(40, 40))}}
    assert priced("recipe.epochs=5", times=once).total.wall == found.total.wall + 40 + 5 * 0.5
    assert found.device_hours == pytest.approx(8 * found.total.wall / 3600 * 2 / 8)  # two CPUs


@pytest.mark.slow
def test_every_image_size_of_a_schedule_has_its_own_time() -> None:
    grow = ("recipe.epochs=6", "recipe.start_size=8", "recipe.grow_from=2", "recipe.grow_to=3")
    times = {"train": {8: PassTime(Time(1, 1)), 16: PassTime(Time(4, 4))}}
    assert priced(*grow, times=times).total.wall == 10 + 6 * (2 + 3) + 3 * 10 * 1 + 3 * 10 * 4


@pytest.mark.slow
def test_checkpoints_within_long_epochs_are_counted() -> None:
    often = priced("recipe.epochs=10", "train.checkpoint_every_minutes=1")
    assert often.total.wall == priced("recipe.epochs=10").total.wall + 3 * (10 * 25 // 60)


@pytest.mark.parametrize("state", ["finished", "running", "queued"])
def test_what_need_not_be_computed_is_free(state: str) -> None:
    found = priced(state=State(state))
    assert found.free
    assert (found.known, found.device_hours, found.total) == (None, 0, Time())


@pytest.mark.slow
def test_an_interrupted_run_costs_its_rest(tmp_path: Path) -> None:
    planned = job("cluster.gpus_per_node=0", "recipe.epochs=4")
    run, known = RunStore(tmp_path).run(planned.run_id), KnownTimes(record(planned), None)
    run.folder.mkdir(parents=True)
    for done, rest in ((2000, 2 * 25), (2500, 1.5 * 20 + 2 * 5), (0, 4 * 25), ("x", 4 * 25)):
        write_json(run.folder / "progress.json", {"done": done, "total": 4000})
        assert price(planned, run, NEW, known, IMAGES).work.wall == pytest.approx(rest)
    write_json(run.folder / "progress.json", {"done": 2000, "total": 99})  # of other settings
    assert price(planned, run, NEW, known, IMAGES).work.wall == 4 * 25


@pytest.mark.slow
def test_starts_within_the_time_limit() -> None:
    # 1 h 40 min of work. A start of 20 min has 10 s of startup, and 90 s are left for the checkpoint.
    words = ("recipe.epochs=240", "cluster.time=20")
    found = priced(*words)
    assert found.work.wall == 6030  # with a checkpoint every 10 minutes
    assert (found.starts, found.allowed) == (math.ceil(6030 / (1200 - 100)), 11)
    assert found.total.wall == 6030 + 6 * 10
    assert not found.too_long
    assert priced(*words, "cluster.max_requeues=3").too_long
    assert priced(*words, "+cluster.sbatch.no-requeue=true").allowed == 1
    assert priced("recipe.epochs=240", "cluster.time=1").starts == math.ceil(6030 / (60 - 10 - 15))
    assert priced("recipe.epochs=240", "cluster.time=1", times={"startup": Time(60, 1)}).starts == math.inf


@pytest.mark.slow
@given(st.integers(1, 4000), st.integers(0, 20), st.floats(0, 400))
def test_the_limit_that_is_proposed_is_long_enough(epochs: int, requeues: int, startup: float) -> None:
    planned = job("cluster.gpus_per_node=0")
    config = replace(planned.config, recipe=replace(planned.config.recipe, epochs=epochs))
    known = KnownTimes(record(planned, startup=Time(startup, startup)), None)

    def limited(minutes: int) -> Price:
        cluster = replace(planned.cluster, time=minutes, max_requeues=requeues)
        changed = replace(planned, config=config, cluster=cluster)
        return price(changed, RunStore(Path("none")).run("x"), NEW, known, IMAGES)

    longer = limited(limited(1).minutes_needed)
    assert longer.starts <= longer.allowed
    assert not longer.too_long


@pytest.mark.slow
def test_gpus_cost_money_and_energy() -> None:
    sizes = ("cluster.gpus_per_node=4", "cluster.nodes=2", "recipe.global_batch=200", "recipe.epochs=28")
    planned = job(*sizes, "cluster.gpu_hour_price=2.5", "cluster.gpu_watts=500")
    one = record(job("cluster.gpus_per_node=1", "recipe.global_batch=25"), device="A100")
    found = price(planned, RunStore(Path("none")).run("x"), NEW, KnownTimes(one, one), IMAGES)
    # 5 batches; of validation a batch of 17 images on each of 8 GPUs, which costs 17/25 of one of 25
    assert found.work.wall == pytest.approx(28 * (5 * 2 + 17 / 25 + 3))
    assert found.gpus == 8
    assert found.device_hours == pytest.approx(8 * found.total.wall / 3600)
    assert (found.money, found.energy) == (2.5 * found.device_hours, 0.5 * found.device_hours)
    assert (priced().money, priced().energy) == (None, None)


@pytest.mark.slow
def test_what_bounds_a_training() -> None:
    planned = job("cluster.gpus_per_node=2")
    fast, slow = record(planned), record(planned, train={16: PassTime(Time(2.5, 2))})
    assert KnownTimes(fast, None).bound == "device"
    assert KnownTimes(record(planned, waiting=0.3), None).bound == "data"
    assert KnownTimes(slow, fast).bound == "network"
    assert KnownTimes(fast, fast).bound == KnownTimes(fast, slow).bound == "device"


@pytest.mark.slow
def test_runs_of_a_sweep_share_the_slots() -> None:
    runs = [priced(f"seed={seed}", "cluster.array_parallelism=2") for seed in range(5)]
    assert sweep_seconds(runs) == 3 * runs[0].total.wall
    assert sweep_seconds([]) == 0


def datastore(workspace: Path) -> None:
    """Write the manifest of a datastore, which is all that a submission reads."""
    counts = {"train": IMAGES.train, "val": IMAGES.val}
    splits = {name: Split(File(f"{name}.npy", 1, f"md5:{0:032}"), count) for name, count in counts.items()}
    folder = workspace / "datastores" / "digits" / "v1"
    folder.mkdir(parents=True)
    Manifest("digits", "c0ffee00", "", (ClassNames("n0", ("0",)), ClassNames("n1", ("1",))), (), splits).save(
        folder
    )


@pytest.fixture
def timed(cluster: Cli, commands: Path) -> Cli:
    """The command line on a fake Slurm, with a record of one hour of work for 144 epochs."""
    datastore(cluster.workspace)
    planned = job("cluster.gpus_per_node=0", workspace=cluster.workspace)
    (cluster.workspace / "runs").mkdir()
    write_record(cluster.workspace / "runs", record(planned))
    write_command(
        commands,
        "sbatch",
        'case $1 in --test-only) echo "sbatch: Job 7 to start at 2096-11-30T08:10:00 using 8 CPUs" >&2 ;;'
        ' *) echo "Submitted batch job 1" ;; esac',
    )
    return cluster


TRAINING = (*FIXED, "cluster=slurm", "cluster.gpus_per_node=0", "recipe.epochs=144")


@pytest.mark.slow
def test_a_time_limit_that_is_too_short_is_refused_with_one_that_is_not(timed: Cli) -> None:
    words = (*TRAINING, "cluster.max_requeues=2")
    line = timed.refused(*words, "cluster.time=10")
    assert "cluster.time=10 is too short" in line
    assert "takes 60 minutes (as c0ffee00-price-resnet18 has shown)" in line
    assert "would not end with 2 requeues: set cluster.max_requeues=" in line
    requeues, time = line.rpartition(": set ")[2].split(" or ")
    assert 20 < int(time.removeprefix("cluster.time=")) < 30
    assert "too short" in timed.refused("-m", *words, "cluster.time=10", "seed=0,1")
    assert "would be submitted" in timed(*words, time, "dry_run=true").stdout
    enough = (*TRAINING, "cluster.time=10", requeues)
    assert "would be submitted" in timed(*enough, "dry_run=true").stdout
    line = timed.refused(*words, "cluster.time=10", "+cluster.sbatch.no-requeue=true")
    assert line.rpartition(": set ")[2].startswith("cluster.time=")
    assert "submitted" in timed(*words, time).stdout


@pytest.mark.slow
def test_an_unknown_price_refuses_nothing(timed: Cli) -> None:
    words = (*TRAINING, "cluster.max_requeues=0", "cluster.time=10")
    assert "submitted" in timed(*words, "recipe.size=32").stdout
    for path in timed.workspace.glob("runs/.times-*/*"):
        path.write_text("{}")
    assert "submitted" in timed(*words).stdout


@pytest.mark.slow
def test_prices_of_a_sweep_as_they_are_printed(timed: Cli) -> None:
    words = ("-m", *TRAINING, "cluster.time=10", "cluster.max_requeues=2", "price=true")
    done = timed(*words, "recipe.learning_rate=0.1,0.2,0.3", "cluster.array_parallelism=2").stdout
    lines = done.splitlines()
    assert lines[1].split() == ["run", "time", "CPU-h", "starts", "bound", "start", "timed", "by"]
    for line in lines[2:5]:
        cells = line.split()
        assert cells[1:] == ["1:01:38", "2.05", "8", "device", "11-30", "c0ffee00"]
        assert len(line) <= 80
    assert lines[5] == "3 trainings · done after 2:03:16 without queues · 6.16 CPU-h"
    assert lines[6].startswith(
        "resnet18: cluster.time=10 and 2 requeues are too short; cluster.max_requeues="
    )
    assert lines[-1] == "nothing was submitted (price=true)"
    assert timed.runs() == []


@pytest.mark.slow
def test_prices_as_json_are_those_of_the_table(timed: Cli) -> None:
    words = ("-m", *TRAINING, "cluster.time=10", "cluster.max_requeues=2", "seed=0,1")
    found = json.loads(timed("price", "--json", *words).stdout)
    first, second = found["trainings"]
    assert (first["seconds"], first["starts"], first["enough_time"]) == (3698.0, 8, False)
    assert (first["start"], first["bound"]) == ("2096-11-30T08:10", "device")
    assert "cluster.time=" in first["notes"][0]
    assert (first["run"], first["cpu_hours"]) != (second["run"], None)
    assert (found["seconds"], found["search"], found["gpu_hours"]) == (3698.0, None, None)
    assert found["cpu_hours"] == pytest.approx(2 * first["cpu_hours"])
    assert "2 trainings · done after 1:01:38" in timed("price", *words).stdout
    assert timed.runs() == []
    assert "add -m" in timed.refused("price", *TRAINING, "seed=0,1")
    assert "resnet is not an option or SETTING=VALUE" in timed.refused("price", "resnet")


@pytest.mark.slow
def test_a_search_costs_what_its_trials_do(timed: Cli) -> None:
    space = "recipe.learning_rate=interval(0.1,1)"
    words = (*TRAINING, space, "search.trials=10", "search.parallel=4")
    done = timed("+search=asha", *words, "recipe.warmup_epochs=20", "price=true").stdout
    # Rungs at 48 and 144 epochs. Each worker trains at most three trials of 3628 s.
    assert "10 trials by 4 workers: about 1:40:46 and" in done
    assert "if two of three end at each rung · 3:01:24 and" in done
    words = (*words, "recipe.warmup_epochs=20")
    found = json.loads(timed("price", "--json", "+search=asha", *words).stdout)["search"]
    assert found["share"] == pytest.approx((48 + 96 / 3) / 144)
    assert timed.runs() == []
    plain = json.loads(timed("price", "--json", "+search=tpe", *words).stdout)["search"]
    assert (plain["share"], plain["trials"], plain["workers"]) == (None, 10, 4)
    assert plain["seconds"] == found["seconds"]


SEARCH = (
    *TRAINING,
    "recipe.learning_rate=interval(0.1,1)",
    "recipe.warmup_epochs=20",
    "cluster.max_requeues=2",
)


@pytest.mark.slow
def test_a_time_limit_in_which_a_trial_cannot_end_is_refused(timed: Cli) -> None:
    words = ("+search=asha", *SEARCH, "search.trials=2", "search.name=night")
    line = timed.refused(*words, "cluster.time=10")
    assert "cluster.time=10 is too short for a trial of the search night: " in line
    assert "takes 60 minutes (as c0ffee00-price-resnet18 has shown)" in line
    enough = line.rpartition("cluster.time=")[2]
    assert 20 < int(enough) < 30
    assert "would not end it with 2 requeues" in line
    assert not list(timed.workspace.glob("runs/.search*"))
    assert "submitted" in timed(*words, f"cluster.time={enough}").stdout
    assert (
        "submitted"
        in timed(*with_defaults(words, ("search.name=unknown",)), "cluster.time=10", "recipe.size=32").stdout
    )


@pytest.mark.slow
def test_a_time_limit_in_which_workers_cannot_train_all_trials_is_refused(timed: Cli) -> None:
    words = (*SEARCH, "cluster.time=60", "search.trials=30", "search.parallel=2", "dry_run=true")
    line = timed.refused("+search=tpe", *words)
    assert "cluster.time=60 is too short: for 30 trials each of 2 workers needs about 904 minutes (as" in line
    requeues, time, parallel = line.rpartition(": set ")[2].split(" or ")
    assert parallel == "search.parallel=10"  # three hours of work each
    for fix in (requeues, time, parallel, "search.budget=5"):
        assert "would be submitted" in timed("+search=tpe", *with_defaults(words, (fix,))).stdout
    # Rungs at 48 and 144 epochs: trials take 5 / 9 of a schedule on average.
    assert "about 502 minutes if two of three end at each rung" in timed.refused("+search=asha", *words)
    assert "would be submitted" in timed("+search=median", *words).stdout  # prunes none, or most
    priced = timed("price", "+search=tpe", *words).stdout
    would_do = f"{requeues} or {time} or {parallel} would do"
    assert f"cluster.time=60 and 2 requeues are too short for all trials; {would_do}" in priced


@pytest.mark.slow
def test_free_cpus_and_memory_are_named_where_a_training_waits_for_data(timed: Cli, commands: Path) -> None:
    planned = job("cluster.gpus_per_node=0", workspace=timed.workspace)
    waits = record(planned, waiting=0.4, suggestion="cluster.cpus_per_task=9")
    write_record(timed.workspace / "runs", waits)
    lines = ["debug* n1 4/12/0/16 64000 32000", "debug* n2 14/2/0/16 64000 0", "other n3 0/16/0/16 64000 0"]
    write_command(commands, "sinfo", "\n".join(f"echo '{line}'" for line in lines))
    done = timed(*TRAINING, "cluster.memory_gb=16", "price=true").stdout
    line = (
        "cluster.cpus_per_task=9 would make the loader fast enough; 1 of 2 nodes have 9 free CPUs and 16 GiB"
    )
    assert f"waits for data 40% of the time: {line} now (n1)" in done
    more = timed(*TRAINING, "cluster.memory_gb=40", "price=true").stdout
    assert "0 of 2 nodes have 9 free CPUs and 40 GiB now\n" in more


@pytest.mark.slow
def test_a_refusal_by_slurm_is_printed(timed: Cli, commands: Path) -> None:
    write_command(commands, "sbatch", 'echo "sbatch: error: allocation failure: Invalid account" >&2; exit 1')
    done = timed(*TRAINING, "price=true").stdout
    assert "resnet18: sbatch --test-only: allocation failure: Invalid account" in done


@pytest.mark.slow
def test_only_trainings_on_existing_data_have_a_price(cluster: Cli) -> None:
    words = ("cluster=slurm", "price=true")
    assert "no datastore digits" in cluster.refused(*FIXED, *words)
    line = cluster.refused("+stage=pipeline", "dataset=digits", *words)
    assert "datastore digits does not have them yet" in line
    assert "is for trainings, and this submission has only download" in cluster.refused(
        "+stage=download", "dataset=digits", *words
    )
    datastore(cluster.workspace)
    assert "resnet19 is unknown" in cluster.refused(*FIXED, *words, "model.name=resnet19")
    assert "price cannot be swept" in cluster.refused("-m", *FIXED, "cluster=slurm", "price=true,false")


@pytest.mark.slow
def test_without_slurm_there_is_nothing_to_price_on(cli: Cli) -> None:
    cli.env["PATH"] = "/nowhere"
    assert "no sbatch is on the PATH" in cli.refused(*FIXED, "cluster=slurm", "price=true")


@pytest.mark.slow
def test_one_task_counts_for_all_until_all_were_timed(tmp_path: Path) -> None:
    planned = job("cluster.gpus_per_node=4", "cluster.nodes=2", "recipe.global_batch=200")
    store = RunStore(tmp_path)
    store.folder.mkdir()
    assert known_times(planned, store) is None
    one = record(job("cluster.gpus_per_node=1", "recipe.global_batch=25"))
    write_record(store.folder, one)
    assert known_times(planned, store) == KnownTimes(one, one)
    together = record(planned)
    write_record(store.folder, together)
    assert known_times(planned, store) == KnownTimes(together, one)


@pytest.mark.slow
def test_the_table_has_80_columns_whatever_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    rates = ("cluster.gpu_hour_price=2.5", "cluster.gpu_watts=500")
    named = job("cluster.gpus_per_node=1", "model=shufflenet_v2_x0_5", "recipe.epochs=3000", *rates)
    known = KnownTimes(record(named, device="A100", staged=(10**9, 3 * 10**9), memory=2**40), None)
    found = price(named, RunStore(Path("none")).run("x"), NEW, known, IMAGES)
    reply = "Job 7 to start at 2096-11-30T08:10:00 using 8 CPUs"
    print_prices(PriceReport([found] * 2, None, {named.run_id: reply}), Console(width=80, highlight=False))
    header, *rows, total = capsys.readouterr().out.splitlines()[:4]
    assert header.split() == [
        "run",
        *["time", "GPU-h", "starts", "bound", "kWh", "money", "start", "timed", "by"],
    ]
    assert max(map(len, (header, *rows))) <= 80
    assert all(row.startswith(named.run_id[:8]) and row.endswith("c0ffee00") for row in rows)
    assert "money" in total
    assert "kWh" in total
