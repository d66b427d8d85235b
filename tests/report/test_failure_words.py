"""What tables and logs show of a failure's class, and of a training that has not learned."""

from __future__ import annotations

from datetime import timedelta

import pytest
from command_line import Cli
from recorded_runs import record_run, set_times

from hpc_imagenet.launch.retries.diagnosis import diagnose
from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import RunStore


@pytest.fixture
def store(cli: Cli) -> RunStore:
    return RunStore(cli.workspace)


def test_class_is_shown_before_a_reason_that_does_not_have_it(cli: Cli, store: RunStore) -> None:
    record_run(store, 1, FAILED, "RuntimeError: \x1b[31mno\x1b[0m", label="bug")
    record_run(store, 2, FAILED, "out of host memory: raise cluster.memory_gb")
    record_run(store, 3, FAILED, "recipe.epochs=0 is less than 1")
    lines = cli("jobs").stdout.splitlines()
    assert "failed bug: RuntimeError: no" in lines[1]
    assert "failed out of host memory: raise" in lines[2]
    assert "failed recipe.epochs=0" in lines[3]
    assert [row["failure"] for row in cli.jobs()] == ["bug", "host_memory", "input"]


def test_training_at_chance_is_marked(cli: Cli, store: RunStore) -> None:
    advice = "top-1 10.0 % is chance: \x1b]0;x\x07try recipe.learning_rate=0.005"
    record_run(store, 1, FINISHED, result={"top1": 0.1, "epochs": 60, "learned": False, "advice": advice})
    record_run(store, 2, FINISHED, result={"top1": 0.9, "epochs": 60, "learned": True})
    record_run(store, 3, FINISHED, result={"top1": 0.8, "epochs": 60})  # of an earlier version
    table = cli("jobs").stdout
    assert "finished at chance · 60 epochs" in table
    assert table.count("at chance") == 1
    assert cli("report").stdout.count("finished, at chance") == 1
    assert cli("logs", "00000001").stderr.splitlines()[-1] == (
        "top-1 10.0 % is chance: try recipe.learning_rate=0.005"
    )
    assert cli("retry", "00000001").stdout == "already finished  00000001-resnet18\n"


def test_time_limit_of_the_local_queue(store: RunStore) -> None:
    """It sends a signal 30 s before the limit, of which the records show only the duration."""
    for number, minutes in ((1, 59.6), (2, 20)):
        run = record_run(
            store, number, FAILED, "stopped by SIGUSR2 after step 7, which is saved: retry resumes"
        )
        store.create(
            run.id, {"cluster": {"time": 60, "executor": "local"}, "stage": {"name": "train"}}, run.info
        )
        set_times(run, started=timedelta(minutes=minutes))
    limited, killed = map(diagnose, store.all())
    assert limited
    assert killed
    assert (limited.kind, limited.remedy) == ("time_limit", {"cluster.time": 120})
    assert (killed.kind, killed.remedy) == ("killed", {})


def test_finished_run_has_no_diagnosis(store: RunStore) -> None:
    run = record_run(store, 1, FINISHED, result={})
    assert diagnose(run) is None
