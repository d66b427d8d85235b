from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.report.show.attempt_times import intervals, nodes_of, running_hours
from hpc_imagenet.runs.attempt import FINISHED, QUEUED, RUNNING, Attempt
from hpc_imagenet.runs.store import Run
from hpc_imagenet.runs.usage_records import usage_path

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(hours: float) -> str:
    return (BEGIN + timedelta(hours=hours)).isoformat()


def ago(hours: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(hours=hours)).isoformat()


def hours_of(run: Run, state: str = "", attempt: Attempt | None = None) -> list[tuple[str, float]]:
    attempt = attempt or run.attempt
    assert attempt
    return [(part.kind, round((part.end - part.begin) / 3600, 2)) for part in intervals(attempt, state)]


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
    assert running_hours(intervals(run.attempt)) == pytest.approx(6)


def test_an_attempt_that_slurm_ended_ends_with_its_last_record(run: Run) -> None:
    attempt = run.attempt
    assert attempt
    write_json(attempt.folder / "submitted.json", {"executor": "slurm", "time": ago(11)})
    write_json(run.folder / "progress.json", {"done": 1, "time": ago(30)})  # of an earlier attempt
    earlier = [{"time": ago(11), "host": "a", "stopped": ago(10)}]
    write_json(attempt.folder / "started.json", {"time": ago(10), "restarts": 1, "earlier": earlier})
    before = [("queued", 0.0), ("running", 1.0), ("requeued", 0.0)]
    assert hours_of(run) == [*before, ("running", 0.0)]
    usage_path(attempt, 1, 0).parent.mkdir()
    write_json(usage_path(attempt, 0, 0), {"seconds": 3600 * 9})  # of the earlier start
    write_json(usage_path(attempt, 1, 0), {"seconds": 3600 * 3})
    assert hours_of(run) == [*before, ("running", 3.0)]
    write_json(run.folder / "progress.json", {"done": 2, "time": ago(6)})
    assert hours_of(run) == [*before, ("running", 4.0)]
    assert hours_of(run, RUNNING) == [*before, ("running", 10.0)]
    assert hours_of(run, QUEUED) == [*before, ("running", 4.0), ("requeued", 6.0)]
    later = run.new_attempt()
    assert hours_of(run, "", attempt) == [*before, ("running", 4.0)]
    write_json(later.folder / "started.json", {"time": ago(6.5)})
    assert hours_of(run, "", attempt) == [*before, ("running", 3.0)]  # the progress is that of the later one
    write_json(usage_path(attempt, 1, 0), {"seconds": 1e200})
    assert hours_of(run, "", attempt) == [*before, ("running", 0.0)]


def test_clocks_that_jump_back_and_damaged_times(run: Run) -> None:
    assert run.attempt
    folder = run.attempt.folder
    write_json(folder / "started.json", {"time": at(-2), "host": "a"})
    write_json(folder / "outcome.json", {"state": FINISHED, "time": at(-5)})
    assert hours_of(run) == [("queued", 0.0), ("running", 0.0)]
    write_json(folder / "outcome.json", {"state": FINISHED, "time": "yesterday"})
    assert hours_of(run) == [("queued", 0.0), ("running", 0.0)]
    (folder / "started.json").write_text("{")
    assert hours_of(run) == []


def test_an_active_attempt_ends_now(run: Run) -> None:
    (kind, hours), *rest = hours_of(run, QUEUED)
    assert (kind, rest) == ("queued", [])
    assert hours > 0


def test_a_requeued_job_keeps_its_earlier_starts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    attempt = run.new_attempt()
    attempt.start()
    assert "earlier" not in attempt.started
    first = attempt.started["time"]
    attempt.start()  # stopped before its first record
    later = [ago(-hours) for hours in (2, 3)]
    write_json(run.folder / "progress.json", {"done": 1, "time": later[0]})
    attempt.start()
    usage_path(attempt, 0, 0).parent.mkdir()
    write_json(usage_path(attempt, 0, 0), {"seconds": 3 * 3600})  # of a stage that makes no progress
    attempt.start()
    earlier = attempt.started["earlier"]
    assert [earlier[0][key] for key in ("time", "stopped")] == [first, first]
    for start, time in zip(earlier[1:], later, strict=True):
        assert abs(datetime.fromisoformat(start["stopped"]) - datetime.fromisoformat(time)).seconds < 60
    assert read_json(attempt.folder / "started.json") == attempt.started


def test_all_nodes_of_earlier_starts_are_known(tmp_path: Path) -> None:
    attempt = Run(tmp_path / "run").new_attempt()
    attempt.start(nodes="n[1-2]")
    attempt.start(nodes="n[7-8]")
    assert nodes_of(attempt) == ["n[1-2]", "n[7-8]"]
