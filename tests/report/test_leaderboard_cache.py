"""The leaderboard's cache of ended runs: the same rows with and without it."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from command_line import Cli
from recorded_runs import change, set_times, settle

from hpc_imagenet.report.leaderboard import leaderboard_rows
from hpc_imagenet.report.leaderboard_details import DetailsCache
from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import RunStore


def rows(store: RunStore) -> list[dict[str, Any]]:
    """Return the rows of ended runs, without their age."""
    ended = [row for row in leaderboard_rows(store) if row["state"] in (FINISHED, FAILED)]
    return [{key: value for key, value in row.items() if key != "age"} for row in ended]


def reads(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the runs whose configs and attempts a command reads."""
    read = set()
    real = DetailsCache.read_run

    def recorded(cache: DetailsCache, run: Any) -> Any:
        read.add(run.id)
        return real(cache, run)

    monkeypatch.setattr(DetailsCache, "read_run", recorded)
    rows(store)
    monkeypatch.setattr(DetailsCache, "read_run", real)
    return read


def test_configs_of_ended_trainings_are_read_once(sweep: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(sweep.workspace)
    for run in store.all():
        settle(run)
    first = rows(store)
    assert {row["datastore"] for row in first} == {"imagenet@v1"}
    assert any(row["published_top1"] for row in first)
    unended = {run.id for run in store.all()} - {row["run"] for row in first}
    assert len(unended) == 2
    assert reads(store, monkeypatch) == unended
    assert rows(store) == first
    (store.own_folder / DetailsCache.file).write_bytes(b"")
    assert rows(store) == first
    best = store.run(first[0]["run"])
    best.new_attempt().submit("local", host="elsewhere")  # a retry
    assert reads(store, monkeypatch) == {*unended, best.id}


def test_trainings_that_have_just_ended_are_read_again(sweep: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(sweep.workspace)
    late = next(run for run in store.all() if run.attempt and run.attempt.outcome)
    set_times(late, outcome=timedelta(0))  # another task may record its energy in a moment
    for run in store.all():
        settle(run)
    rows(store)
    assert late.id in reads(store, monkeypatch)


def test_energy_that_slurm_knows_later_is_shown_of_cached_runs(sweep: Cli) -> None:
    store = RunStore(sweep.workspace)
    run = next(run for run in store.all() if run.attempt and run.attempt.outcome)
    assert run.attempt
    change(run.attempt.folder / "submitted.json", executor="slurm", job_id="7")
    for each in store.all():
        settle(each)

    def energy() -> float | None:
        return next(row["kwh"] for row in leaderboard_rows(store) if row["run"] == run.id)

    assert energy() is None
    (run.attempt.folder / "accounting.json").write_text(json.dumps({"joules": 7.2e6}))
    assert energy() == 2
