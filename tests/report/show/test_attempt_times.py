from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.report.show.attempt_times import intervals, nodes_of, running_hours
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import Run

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(hours: float) -> str:
    return (BEGIN + timedelta(hours=hours)).isoformat()


def hours_of(run: Run, active: bool = False) -> list[tuple[str, float]]:
    assert run.attempt
    return [(part.kind, round((part.end - part.begin) / 3600, 2)) for part in intervals(run.attempt, active)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    folder = run.new_attempt().folder
    write_json(folder / "submitted.json", {"executor": "slurm", "time": at(0)})
    return run


def test_queued_running_and_requeued(run: Run) -> None:
    assert run.attempt
    folder = run.attempt.folder
    assert hours_of(run) == []  # no longer active, and nothing says when it ended
    earlier = [{"time": at(1), "host": "a", "stopped": at(3)}, {"time": at(4), "host": "b", "stopped": None}]
    write_json(folder / "started.json", {"time": at(6), "host": "c", "restarts": 2, "earlier": earlier})
    write_json(folder / "outcome.json", {"state": FINISHED, "time": at(10)})
    assert hours_of(run) == [
        *[("queued", 1.0), ("running", 2.0), ("requeued", 1.0), ("running", 0.0)],
        *[("requeued", 2.0), ("running", 4.0)],
    ]
    assert running_hours(intervals(run.attempt, False)) == pytest.approx(6)


def test_clocks_that_jump_back_and_damaged_times(run: Run) -> None:
    assert run.attempt
    folder = run.attempt.folder
    write_json(folder / "started.json", {"time": at(-2), "host": "a"})
    write_json(folder / "outcome.json", {"state": FINISHED, "time": at(-5)})
    assert hours_of(run) == [("queued", 0.0), ("running", 0.0)]
    write_json(folder / "outcome.json", {"state": FINISHED, "time": "yesterday"})
    assert hours_of(run) == [("queued", 0.0)]
    (folder / "started.json").write_text("{")
    assert hours_of(run) == []


def test_an_active_attempt_ends_now(run: Run) -> None:
    (kind, hours), *rest = hours_of(run, active=True)
    assert (kind, rest) == ("queued", [])
    assert hours > 0


def test_a_requeued_job_keeps_its_earlier_starts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    attempt = run.new_attempt()
    attempt.start()
    assert "earlier" not in attempt.started
    write_json(run.folder / "progress.json", {"done": 1, "time": at(2)})
    first = attempt.started["time"]
    attempt.start()
    attempt.start()
    earlier = attempt.started["earlier"]
    assert earlier[0]["time"] == first
    assert [start["stopped"] for start in earlier] == [at(2), at(2)]
    assert read_json(attempt.folder / "started.json") == attempt.started


def test_all_nodes_of_earlier_starts_are_known(tmp_path: Path) -> None:
    attempt = Run(tmp_path / "run").new_attempt()
    attempt.start(nodes="n[1-2]")
    attempt.start(nodes="n[7-8]")
    assert nodes_of(attempt) == ["n[1-2]", "n[7-8]"]
