"""Runs that another version of this package made: listed and cancelled, but not continued."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from command_line import Cli
from recorded_runs import create_run

from hpc_imagenet.errors import UserError
from hpc_imagenet.io import atomic_files
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.local_jobs.local_worker import Worker
from hpc_imagenet.launch.states import state
from hpc_imagenet.launch.submission import cancel_run
from hpc_imagenet.launch.tasks import task
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED
from hpc_imagenet.runs.store import Run, RunStore


def as_of_another_version(run: Run) -> str:
    """Remove the format from run.json and return the one line with which the run must be refused."""
    info = {key: value for key, value in run.info.items() if key != "format"}
    atomic_files.write_json(run.folder / "run.json", info)
    return (
        f"{run.id} was made by another version of this package, so it cannot be continued: "
        f"delete the folder {run.folder}, or use another workspace="
    )


@pytest.mark.slow
@pytest.mark.parametrize("outcome", [FAILED, FINISHED])
def test_run_of_another_version_is_refused_by_submission_and_retry(cli: Cli, outcome: str) -> None:
    words = ("+stage=download", "dataset=digits")
    run = create_run(RunStore(cli.workspace), *words, "cluster=local")
    run.new_attempt().end(outcome, "before")
    line = as_of_another_version(run)
    assert cli.refused(*words, "cluster=local") == f"error: {line}"
    assert cli.refused(*words, "cluster=local", "dry_run=true") == f"error: {line}"
    assert cli.refused("retry", run.id) == f"error: {line}"
    assert len(run.attempts()) == 1
    assert cli.states() == [outcome]
    assert run.id[:8] in cli("jobs").stdout
    assert "before" in cli("logs", run.id).stderr
    assert f"already {outcome}" in cli("cancel", run.id).stdout
    cli("report")


@pytest.mark.parametrize("content", ["", '{"format": 2, "sta', "[]"])
def test_damaged_run_is_not_taken_for_one_of_another_version(tmp_path: Path, content: str) -> None:
    run = RunStore(tmp_path).create("0-x", {}, {"stage": "download"})
    run.check_format()
    (run.folder / "run.json").write_text(content)
    with pytest.raises(UserError, match=f"run.json is damaged: move the folder {run.folder} away"):
        run.check_format()


@pytest.mark.slow
def test_session_of_another_version_is_not_resumed(cli: Cli) -> None:
    run = create_run(RunStore(cli.workspace), "+stage=session", "cluster=local")
    run.new_attempt().end(CANCELLED, "paused")
    line = as_of_another_version(run)
    assert cli.refused("resume", run.id) == f"error: {line}"


@pytest.mark.slow
def test_queued_run_of_another_version_can_be_cancelled(tmp_path: Path) -> None:
    run = create_run(RunStore(tmp_path))
    attempt = run.new_attempt()
    attempt.submit("local", host=socket.gethostname())
    as_of_another_version(run)
    assert cancel_run(run).name == QUEUED
    assert state(run).name == CANCELLED


@pytest.mark.slow
def test_job_of_another_version_ends_with_the_refusal(tmp_path: Path) -> None:
    run = create_run(RunStore(tmp_path), "+stage=download")
    attempt, line = run.new_attempt(), as_of_another_version(run)
    with pytest.raises(SystemExit) as end:
        task.run_task(run.folder, attempt.number)
    assert end.value.code == 1
    assert attempt.outcome is not None
    assert attempt.outcome.reason == line
    assert not attempt.started


def test_worker_does_not_start_a_run_of_another_version(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create("0-x", {"cluster": {"unknown": 1}}, {"stage": "download"})
    attempt, line = run.new_attempt(), as_of_another_version(run)
    local_queue.enqueue(RunStore(tmp_path), [[(run, attempt)]])
    assert not Worker(RunStore(tmp_path)).step()
    assert attempt.outcome is not None
    assert attempt.outcome.reason == line
