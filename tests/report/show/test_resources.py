"""GPU-hours and energy of runs: from settings, from records, and of runs that share a job."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command
from recorded_runs import change, record_run, set_times, settle

from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.report.leaderboard import leaderboard_rows
from hpc_imagenet.report.show.details import run_details
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import requested_by, usage_path


def trained(store: RunStore, number: int, gpus: list[str], sharing: int = 1, **cluster: object) -> Run:
    """Write a training of 10 hours that has seen these GPUs, each with 1 kWh, in a job of so many runs."""
    run = record_run(store, number, FINISHED, result={"top1": 0.5})
    set_times(run, submitted=timedelta(hours=10), started=timedelta(hours=10), outcome=timedelta(0))
    assert run.attempt
    others = [f"{other:08x}-resnet18" for other in range(sharing) if other != number]
    change(run.attempt.folder / "submitted.json", shares_with=others)
    path = usage_path(run.attempt, 0, 0)
    path.parent.mkdir()
    seen = {uuid: {"seconds": 36_000, "joules": 3.6e6} for uuid in gpus}
    values = {"seconds": 36_000, "cpus": 2, "cpu_seconds": 10, "memory_bytes": 100, "host": "n1"}
    write_json(path, {"restarts": 0, **values, "gpus": seen})
    config = {"stage": {"name": "train"}, "cluster": {"executor": "foreground", **cluster}}
    (run.folder / "config.yaml").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize(
    ("seen", "cluster", "gpus"),
    [
        (["a", "b"], {}, 2),
        (["a", "b"], {"gpus_per_node": None, "sbatch": {"gpus": "a100:2"}}, 2),
        (["a", "b"], {"gpus_per_node": 4}, 4),
        (["a", "b"], {"gpus_per_node": 0}, 0),
        ([], {}, 0),
    ],
)
def test_gpus_of_the_settings_else_those_of_the_records(
    cli: Cli, seen: list[str], cluster: dict[str, object], gpus: int
) -> None:
    run = trained(RunStore(cli.workspace), 0, seen, **cluster)
    (row,) = leaderboard_rows(RunStore(cli.workspace))
    assert row["gpu_hours"] == pytest.approx(10 * gpus, abs=0.1)
    assert run_details(run)["gpu_hours"] == pytest.approx(10 * gpus, abs=0.1)


def test_gpus_that_only_slurm_knows_are_shown_once_they_are_read(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(RunStore(cli.workspace), 0, [], gpus_per_node=None, sbatch={"gres": "gpu:4"})
    assert run.attempt
    change(run.attempt.folder / "submitted.json", executor="slurm", job_id="7")
    set_times(run, started=timedelta(hours=20), outcome=timedelta(hours=10))  # long enough ago for the cache
    settle(run)

    def gpu_hours() -> float:
        (row,) = leaderboard_rows(RunStore(cli.workspace))
        return float(row["gpu_hours"])

    assert gpu_hours() == 0
    tres = "cpu=2,gres/gpu=4"
    line = f"7|36000|00:10|2|1||{tres}|{tres}|||0|60|2026-11-29T13:06:04"
    write_command(tmp_path, "sacct", f"echo '{line}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert run_details(run)["gpu_hours"] == pytest.approx(40, abs=0.1)
    assert gpu_hours() == pytest.approx(40, abs=0.1)


def test_each_attempt_has_the_resources_that_it_requested(cli: Cli) -> None:
    run = trained(RunStore(cli.workspace), 0, [], nodes=2, gpus_per_node=4, memory_gb=10, time=60)
    assert run.attempt
    change(run.attempt.folder / "started.json", requested=requested_by(run.cluster()))
    again = run.new_attempt()
    again.submit("local", host="elsewhere")
    config = {"executor": "foreground", "nodes": 4, "gpus_per_node": 4, "memory_gb": 20, "time": 120}
    (run.folder / "config.yaml").write_text(json.dumps({"stage": {"name": "train"}, "cluster": config}))
    again.start(requested=requested_by(run.cluster()))
    again.end(FINISHED)
    set_times(run, submitted=timedelta(hours=10), started=timedelta(hours=10), outcome=timedelta(0))
    found = run_details(run)
    first, second = (each["resources"] for each in found["attempts"])
    for name, amount in (("gpus", 8), ("memory_bytes", 20 * 2**30), ("limit_seconds", 3600)):
        assert (first[name], second[name]) == (amount, amount * (4 if name == "memory_bytes" else 2))
    (row,) = leaderboard_rows(RunStore(cli.workspace))
    assert row["gpu_hours"] == pytest.approx(80 + 160, abs=0.1)
    assert found["gpu_hours"] == pytest.approx(80 + 160, abs=0.1)


def test_runs_that_share_a_loader_on_this_machine_have_the_gpus_that_they_got(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    for number in range(4):
        run = trained(store, number, list("abcd"), 4, gpus_per_node=8)
        assert run.attempt
        write_json(run.attempt.folder / "process.json", {"gpus": list("abcd")})
    rows = leaderboard_rows(store)
    shown = [run_details(run) for run in store.all()]
    for each in (*rows, *shown):
        assert each["gpu_hours"] == pytest.approx(10, abs=0.1)
        assert each["kwh"] == pytest.approx(1)


def test_energy_of_a_shared_job_that_goes_on_with_other_gpus_adds_up(cli: Cli) -> None:
    run = trained(RunStore(cli.workspace), 0, ["a"], 4, gpus_per_node=4)
    assert run.attempt
    first = json.loads(usage_path(run.attempt, 0, 0).read_text())
    again = {**first, "restarts": 1, "host": "n2", "gpus": {"b": first["gpus"]["a"]}}
    write_json(usage_path(run.attempt, 1, 0), again)
    (row,) = leaderboard_rows(RunStore(cli.workspace))
    assert row["kwh"] == run_details(run)["kwh"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("runs", "gpus", "set_here"),
    [(2, 2, True), (2, 2, False), (4, 1, True), (4, 1, False), (4, 2, True), (4, 2, False), (2, 0, True)],
)
@pytest.mark.parametrize("sees_all", [False, True])
def test_runs_share_the_gpu_hours_and_the_energy_of_their_job(
    cli: Cli, runs: int, gpus: int, set_here: bool, sees_all: bool
) -> None:
    store = RunStore(cli.workspace)
    for number in range(runs):  # each run sees one of the GPUs; in earlier versions some saw all
        seen = [str(each) for each in range(gpus) if sees_all or each == number % gpus]
        trained(store, number, seen, runs, **({"gpus_per_node": gpus} if set_here else {}))
    rows = leaderboard_rows(store)
    shown = [run_details(run) for run in store.all()]
    for found in (rows, shown):
        assert sum(each["gpu_hours"] for each in found) == pytest.approx(10 * gpus, abs=0.1)
        assert sum(each["kwh"] or 0 for each in found) == pytest.approx(gpus)
