"""States of jobs that have left the queue, by sacct, which may be away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command

from hpc_imagenet.cluster import slurm
from hpc_imagenet.launch import states
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, RUNNING
from hpc_imagenet.runs.store import Run, RunStore


def test_array_that_was_cancelled_while_pending_is_one_record(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    records = ("12_[0-2,5%256]|CANCELLED by 0|0:0", "12_3|TIMEOUT|0:0", "12_4|RUNNING|0:0")
    lines = "\n".join(f"echo '{record}'" for record in records)
    # Slurm 22.05 prints such a record for the id of the array alone, and for 12_1 nothing.
    write_command(commands, "sacct", f'[[ "$*" == *--jobs=12,13 ]] || exit 0\n{lines}')
    found = slurm.query_jobs(["12_1", "12_3", "12_4", "12_5", "13_0"])
    assert {job: status.state for job, status in found.items()} == {
        "12_1": CANCELLED,
        "12_3": FAILED,
        "12_5": CANCELLED,
    }


def test_run_of_another_user_is_not_ended_while_accounting_is_away(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    run = RunStore(tmp_path).create("0-x", {}, {"stage": "train"})
    attempt = run.new_attempt()
    attempt.submit("slurm", job_id="1")
    attempt.start()
    write_command(commands, "sacct", "exit 1")
    assert states.state(run).name == FAILED  # squeue lists the own jobs
    monkeypatch.setattr(Run, "is_mine", property(lambda _: False))
    assert states.state(run).name == RUNNING
    assert "accounting does not answer" in states.state(run).reason


@pytest.mark.slow
def test_requeues_are_still_known_when_sacct_reports_the_end(cluster: Cli, commands: Path) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=slurm")
    (run,) = RunStore(cluster.workspace).all()
    assert run.attempt
    run.attempt.start(restarts=7)
    write_command(commands, "sacct", "echo '1|TIMEOUT|0:0'")
    assert [(row["state"], row["requeued"]) for row in cluster.jobs()] == [("failed", 7)]
    run.attempt.start(restarts="x")  # a damaged record
    assert cluster.states() == ["failed"]
