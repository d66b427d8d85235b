"""Runs whose records are damaged, missing, of another version, or written by a clock that jumped."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from datetime import timedelta
from typing import Any

import pytest
from command_line import Cli
from recorded_runs import change, create_run, record_run, set_times

from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.states import state
from hpc_imagenet.runs.attempt import FAILED, FINISHED, QUEUED, RUNNING
from hpc_imagenet.runs.store import Run, RunStore

RECORDS = ("run.json", "progress.json", "attempts/1/submitted.json", "attempts/1/started.json",
           "attempts/1/process.json", "attempts/1/outcome.json", "config.yaml")  # fmt: skip


def complete_run(cli: Cli) -> Run:
    run = create_run(RunStore(cli.workspace), "+stage=download", "cluster=local")
    attempt = run.new_attempt()
    attempt.submit("local", host=local_queue.socket.gethostname())
    attempt.start()
    local_queue.record_process(attempt)
    attempt.end(FINISHED, result={"bytes": 5})
    (run.folder / "progress.json").write_text('{"done": 5, "total": 5, "unit": "B", "rate": 1.0}')
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "content"),
    [
        *itertools.product(RECORDS, ("half", "empty", "list", "binary")),
        *((record, "missing") for record in RECORDS if "outcome" not in record),
    ],
)
def test_every_command_survives_a_damaged_record(cli: Cli, record: str, content: str) -> None:
    run = complete_run(cli)
    path = run.folder / record
    whole = path.read_bytes()
    damaged = {"half": whole[: len(whole) // 2], "empty": b"", "list": b"[1]", "binary": b"\xff\xfe\0"}
    path.unlink()
    if content != "missing":
        path.write_bytes(damaged[content])
    (row,) = cli.jobs()
    assert row["state"] == (FAILED if "outcome" in record else FINISHED)
    assert run.id[:8] in cli("jobs").stdout
    cli("logs", run.id)
    cli("show", run.id)
    cli("cancel", run.id)
    if "run.json" in record:
        assert "run.json is missing or damaged" in row["reason"]
    if record == "config.yaml":
        assert state(run).name == FINISHED
    elif "outcome" in record:
        assert "outcome.json of this attempt is damaged: retry resumes it" in row["reason"]
        assert "submitted" in cli("retry", run.id).stdout


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"cluster: {", b"[1]", b"a: 1", b"\xff"])
def test_run_without_a_readable_config_is_not_retried(cli: Cli, content: bytes) -> None:
    run = complete_run(cli)
    (run.folder / "attempts/1/outcome.json").write_text('{"state": "failed"}')
    (run.folder / "config.yaml").write_bytes(content)
    line = cli.refused("retry", run.id)
    assert "config.yaml is missing or damaged: submit the run again" in line
    done = cli("retry", "--failed")
    assert "left out  " in done.stderr
    assert "submitted" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "outcome",
    [
        {"state": "paused"},
        {"state": FINISHED, "result": "text", "new": 1},
        {"state": FAILED, "reason": None},
        {},
    ],
)
def test_outcome_of_another_version_is_listed(cli: Cli, outcome: dict[str, Any]) -> None:
    run = complete_run(cli)
    (run.folder / "attempts/1/outcome.json").write_text(json.dumps(outcome))
    (row,) = cli.jobs()
    assert row["state"] == (FINISHED if outcome.get("state") == FINISHED else FAILED)
    cli("jobs")


@pytest.mark.slow
def test_values_of_unexpected_types_are_listed(cli: Cli) -> None:
    run = complete_run(cli)
    change(run.folder / "run.json", created=5, label=["x"], sweeps="s", stage=None, model={})
    change(
        run.folder / "attempts/1/started.json", time="yesterday", host=None, nodes=7, restarts=0, earlier=7
    )
    change(run.folder / "attempts/1/outcome.json", time=None, result={"top1": "high", "bytes": "many"})
    (row,) = cli.jobs()
    assert (row["sweeps"], row["age"], row["seconds"], row["nodes"]) == ([], None, None, "7")
    cli("jobs")
    cli("show", run.id)


def test_deleted_and_moved_folders(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    gone, moved = record_run(store, 1, FINISHED), record_run(store, 2, FAILED, "why")
    cli("jobs")
    shutil.rmtree(gone.folder)
    moved.folder.rename(store.folder / "00000003-resnet18")
    (row,) = cli.jobs()
    assert (row["id"], row["state"], row["reason"]) == ("00000003", FAILED, "why")
    assert "no run 00000001" in cli.refused("logs", "00000001")


def test_clocks_that_jump_give_no_negative_durations(cli: Cli) -> None:
    run = record_run(RunStore(cli.workspace), 1, FINISHED)
    set_times(run, created=-timedelta(days=400), started=-timedelta(days=400), outcome=timedelta(days=400))
    (row,) = cli.jobs()
    assert (row["age"], row["seconds"]) == (0, 0)
    assert " 0s" in cli("jobs").stdout
    assert cli("jobs", "--since", "1h").stdout.count("finished") == 1


@pytest.mark.slow
def test_folder_of_the_future_is_not_being_submitted_for_ever(cli: Cli) -> None:
    run = create_run(RunStore(cli.workspace))
    for ahead, expected in ((0.0, QUEUED), (600.0, QUEUED), (86_400.0, FAILED), (-600.0, FAILED)):
        os.utime(run.folder, (time.time() + ahead,) * 2)
        assert state(run).name == expected, ahead
    attempt = run.new_attempt()
    os.utime(attempt.folder, (time.time() + 86_400,) * 2)
    assert state(run).name == FAILED


def test_run_whose_record_names_another_format_is_listed(cli: Cli) -> None:
    run = record_run(RunStore(cli.workspace), 1, started={})
    change(run.folder / "run.json", format=99)
    (row,) = cli.jobs()
    assert row["state"] == RUNNING
    assert "another version of this package" in cli.refused("retry", run.id)
