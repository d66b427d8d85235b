"""Energy and evaluations on the leaderboard and the page."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command
from recorded_runs import record_run, set_times
from rich.console import Console

from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.report.leaderboard import leaderboard_lines, leaderboard_rows
from hpc_imagenet.report.show.resources import energies_of
from hpc_imagenet.report.terminal_text import print_lines
from hpc_imagenet.runs.attempt import FINISHED, Attempt
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import usage_path


def measured(attempt: Attempt, joules: float, restarts: int = 0) -> None:
    path = usage_path(attempt, restarts, 0)
    path.parent.mkdir(exist_ok=True)
    gpus = {"GPU-a": {"seconds": 10, "joules": joules}}
    values = {"seconds": 10, "cpus": 2, "cpu_seconds": 10, "memory_bytes": 100, "host": "n1", "gpus": gpus}
    write_json(path, {"restarts": restarts, **values})


def trained(store: RunStore, number: int, **result: object) -> Run:
    run = record_run(store, number, FINISHED, result=result)
    set_times(run, started=timedelta(hours=2), outcome=timedelta(hours=0))
    assert run.attempt
    write_json(run.attempt.folder / "process.json", {"gpus": ["0", "1"]})
    config = "stage: {name: train}\ncluster: {executor: local}\n"
    (run.folder / "config.yaml").write_text(config)
    return run


def test_energy_of_all_attempts_and_per_point(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    run = trained(store, 1, top1=0.5)
    assert run.attempt
    measured(run.attempt, 3.6e6)
    measured(run.attempt, 7.2e6, restarts=1)  # after a requeue
    trained(store, 2, top1=0.25)
    rows = {row["run"]: row for row in json.loads(cli("report", "--json").stdout)}
    row, other = rows[run.id], rows["00000002-resnet18"]
    assert (row["kwh"], row["energy_of"], row["kwh_per_point"]) == (3, "GPUs", 3 / 50)
    assert row["gpu_hours"] == pytest.approx(4, abs=0.01)
    assert row["gpu_hours_per_point"] == pytest.approx(0.08, abs=0.001)
    assert (other["kwh"], other["kwh_per_point"]) == (None, None)
    assert re.search(r" kWh +kWh/point .*\n.* 3 +0\.06 ", cli("report").stdout)
    table = list(csv.DictReader(io.StringIO(cli("report", "--csv").stdout)))
    assert [line["kwh"] for line in table] == ["3.0", ""]
    assert "| kWh | kWh per point |" in cli("report", "--markdown").stdout
    cli("report", "--html", "page.html", "--no-images")
    page = (cli.cwd / "page.html").read_text()
    assert '"kwh":3.0,"kwh_per_point":0.06,"energy_of":"GPUs"' in page


def test_an_attempt_that_ran_unmeasured_makes_the_energy_unknown(cli: Cli) -> None:
    run = trained(RunStore(cli.workspace), 1, top1=0.5)
    first = run.attempt
    assert first
    second = run.new_attempt()
    second.submit("local", host="elsewhere")
    second.start()
    second.end(FINISHED)
    measured(second, 3.6e6)
    assert energies_of([run]) == {run.id: (None, "")}
    measured(first, 3.6e6)
    assert energies_of([run]) == {run.id: (2, "GPUs")}


def on_slurm(run: Run, job: str) -> None:
    assert run.attempt
    write_json(run.attempt.folder / "submitted.json", {"executor": "slurm", "job_id": job})


@pytest.mark.parametrize("kind", ["ipmi", "none"])
def test_energy_of_slurm_jobs_is_queried_at_once(cli: Cli, tmp_path: Path, kind: str) -> None:
    store, folder = RunStore(cli.workspace), tmp_path / "bin"
    folder.mkdir()
    runs = [trained(store, number, top1=0.5) for number in (1, 2, 3)]
    for run, job in zip(runs, ("7", "8_2", "9"), strict=True):
        on_slurm(run, job)
    assert runs[2].attempt
    measured(runs[2].attempt, 3.6e6)  # by NVML
    write_command(folder, "squeue", "")
    write_command(folder, "scontrol", f"echo 'AcctGatherEnergyType    = acct_gather_energy/{kind}'")
    line = "echo '%s|10|00:10|1|||cpu=1|cpu=1|||7200000|60|2026-11-29T13:06:04'"
    write_command(folder, "sacct", f'echo "$@" >> $here/queries\n{line % "7"}\n{line % "8_2"}')
    cli.env["PATH"] = f"{folder}:{cli.env['PATH']}"
    rows = {row["run"]: row for row in json.loads(cli("report", "--json").stdout)}
    found = [(rows[run.id]["kwh"], rows[run.id]["energy_of"]) for run in runs]
    if kind == "none":
        assert found == [(None, ""), (None, ""), (1, "GPUs")]
        assert not (folder / "queries").exists()
    else:
        assert found == [(2, "nodes"), (2, "nodes"), (1, "GPUs")]
        (query,) = (folder / "queries").read_text().splitlines()
        assert query.endswith("--jobs=7,8_2")


def evaluation(store: RunStore, number: int, training: str | None, top1: float) -> Run:
    run = record_run(store, number, FINISHED, stage="evaluate", result={"top1": top1, "top5": 0.9})
    evaluate = {"split": "test", "run": training, "checkpoint": "/somewhere/best.ckpt"}
    text = {"stage": {"name": "evaluate"}, "evaluate": evaluate, "datastore": {"name": "<b>", "version": 3}}
    (run.folder / "config.yaml").write_text(json.dumps(text))
    return run


@pytest.mark.slow
def test_evaluations_are_beside_their_training(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    best, second = trained(store, 1, top1=0.8), trained(store, 2, top1=0.5)
    of_second = evaluation(store, 3, second.id, 0.9)
    elsewhere = evaluation(store, 4, "gone", 0.6)
    again = evaluation(store, 5, second.id, 0.4)
    rows = json.loads(cli("report", "--json").stdout)
    assert [row["run"] for row in rows] == [best.id, elsewhere.id, second.id, of_second.id, again.id]
    lines = cli("report").stdout.splitlines()
    assert lines[2].startswith("resnet18 (evaluation on test)")
    assert lines[4].startswith("  evaluation on test")
    cli("report", "--html", "page.html", "--no-images")
    found = re.search(r'id="page-data">(.*?)</script>', (cli.cwd / "page.html").read_text(), re.DOTALL)
    assert found
    training = next(run for run in json.loads(found[1])["runs"] if run["run"] == second.id)
    assert [each["top1"] for each in training["evaluations"]] == [0.9, 0.4]
    shown = training["evaluations"][0]
    assert (shown["checkpoint"], shown["split"], shown["datastore"]) == ("best.ckpt", "test", "<b>@v3")


@pytest.mark.parametrize("width", [60, 80, 110])
def test_the_leaderboard_fits_the_terminal(cli: Cli, width: int) -> None:
    store = RunStore(cli.workspace)
    for number in range(3):
        run = trained(store, number, top1=0.71, top5=0.9, images_per_second=3000.0, seconds=40_000.0)
        assert run.attempt
        measured(run.attempt, 3.6e6)
    out = io.StringIO()
    print_lines(leaderboard_lines(leaderboard_rows(store), width), Console(file=out, width=width))
    head, *lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "…" not in out.getvalue()
    assert all(line.split()[-2:] == ["finished", f"{number:08x}"] for number, line in enumerate(lines))
    assert ("kWh" in head, "images/s" in head) == (True, width > 80)
