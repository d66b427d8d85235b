"""Submission to Slurm, job states and cancellation, with stub Slurm commands that record their arguments."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import queue_row, scripts, write_command

from hpc_imagenet.api import Handle
from hpc_imagenet.cli import connect
from hpc_imagenet.cluster import slurm
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.local_jobs.local_worker import Worker
from hpc_imagenet.launch.slurm_jobs.array_submission import submit_attempts
from hpc_imagenet.launch.tasks import task
from hpc_imagenet.report import jobs_table, logs
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING
from hpc_imagenet.runs.store import Run, RunStore


@pytest.mark.slow
def test_slurm_job_without_cluster_time_is_refused(cluster: Cli) -> None:
    assert "cluster.time" in cluster.refused("+stage=download", "dataset=digits", "cluster.time=null")


@pytest.mark.slow
def test_retry_refuses_a_foreground_run(cluster: Cli, commands: Path) -> None:
    cluster.env["SLURM_JOB_ID"] = "5"
    # The stub srun does nothing, so there is no outcome.
    cluster("+stage=download", "dataset=digits", "cluster=foreground", code=1)
    (row,) = cluster.jobs()
    assert "cluster=foreground" in cluster("retry", row["run"], code=2).stderr


@pytest.mark.slow
def test_foreground_task_gets_the_cpus_of_its_allocation(cluster: Cli, commands: Path) -> None:
    """Since 22.05 srun reads SRUN_CPUS_PER_TASK; without it each task gets one CPU."""
    write_command(commands, "srun", f"env > {commands}/srun-env")
    cluster.env |= {"SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "7"}
    cluster("+stage=download", "dataset=digits", "cluster=foreground", code=1)
    assert "SRUN_CPUS_PER_TASK=7\n" in (commands / "srun-env").read_text()
    # A dry run prints the folder of the next attempt.
    output = cluster(
        "+stage=download", "dataset=digits", "cluster=slurm", "cluster.time=60", "dry_run=true"
    ).stdout
    assert "attempts/2/" in output
    assert "attempts/1/" not in output


@pytest.mark.slow
def test_pipeline_is_a_dependency_chain_that_ends_in_one_array(cluster: Cli, commands: Path) -> None:
    cluster(
        "-m",
        "+stage=pipeline",
        "dataset=digits",
        "model=resnet18,resnet50",
        "cluster=slurm",
        "cluster.account=me",
    )
    download, process, upload, train = scripts(commands)
    assert "--dependency" not in download
    for script, after in ((process, 1), (upload, 2), (train, 3)):
        assert f"#SBATCH --dependency=afterok:{after}\n" in script
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    assert "#SBATCH --array=0-1%2\n" in train
    assert "#SBATCH --gpus-per-node=1\n" in train
    assert "gpus-per-node" not in download
    for script in (download, train):
        assert "#SBATCH --account=me\n" in script
        assert "wckey" not in script
        assert cpus_of_srun(script, SLURM_CPUS_PER_TASK="3") == "3"
        assert cpus_of_srun(script, SLURM_CPUS_PER_GPU="12", SRUN_CPUS_PER_TASK="7") == "unset"
        start = r"^srun .*--kill-on-bad-exit=1 .*-m hpc_imagenet\.launch\.tasks\.start_task"
        assert re.search(start, script, re.MULTILINE)
        assert sys.executable in script


def cpus_of_srun(script: str, **variables: str) -> str:
    """Return SRUN_CPUS_PER_TASK as srun would find it in a job with these variables."""
    lines = [line for line in script.splitlines() if "CPUS_PER_TASK" in line]
    lines.append("echo ${SRUN_CPUS_PER_TASK-unset}")
    command = ["bash", "-euc", "\n".join(lines)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_variables_of_an_outer_allocation_are_not_passed_to_sbatch(cluster: Cli, commands: Path) -> None:
    cluster.env |= {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_CONF": "/etc/slurm.conf"}
    cluster("+stage=download", "dataset=digits", "cluster=slurm")
    assert (commands / "env").read_text() == "SLURM_CONF=/etc/slurm.conf\n"


@pytest.mark.slow
def test_dry_run_prints_sbatch_scripts_and_submits_nothing(cluster: Cli, commands: Path) -> None:
    done = cluster(
        "-m",
        "+stage=pipeline",
        "dataset=digits",
        "model=resnet18,resnet50",
        "cluster=slurm",
        "cluster.partition=gpu",
        "dry_run=true",
    )
    assert done.stdout.count("#SBATCH --partition=gpu") == 4  # one array for both trainings
    assert "#SBATCH --array=0-1%2" in done.stdout
    assert done.stdout.count("#SBATCH --dependency=afterok:") == 3
    assert "nothing was submitted" in done.stdout
    assert scripts(commands) == []
    assert not cluster.workspace.exists()


@pytest.mark.slow
def test_cluster_sbatch_adds_options(cluster: Cli, commands: Path) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=slurm", "+cluster.sbatch.reservation=spring")
    assert "#SBATCH --reservation=spring\n" in scripts(commands)[0]


@pytest.mark.slow
def test_states_come_from_squeue_and_cancel_runs_scancel(cluster: Cli, commands: Path) -> None:
    cluster("+stage=pipeline", "dataset=digits", "cluster=slurm")
    (commands / "queue").write_text(
        "1|RUNNING|2|0|None\n2|PENDING|0|0|Dependency\n3|PENDING|0|0|Dependency\n"
    )
    rows = cluster.jobs()
    assert [row["state"] for row in rows] == ["running", "queued", "queued", "failed"]
    assert rows[1]["reason"] == "Dependency"
    assert "without an outcome" in rows[3]["reason"]  # Slurm no longer knows it
    cluster("cancel", rows[1]["run"])
    assert (commands / "cancelled").read_text() == "2\n"
    assert cluster.jobs()[1]["state"] == "cancelled"


@pytest.mark.slow
def test_dataset_is_not_queued_with_two_processing_settings_at_once(cluster: Cli, commands: Path) -> None:
    words = ("+stage=pipeline", "dataset=digits", "cluster=slurm")
    cluster(*words)
    (commands / "queue").write_text("2|PENDING|0|0|Dependency\n3|PENDING|0|0|Dependency\n")
    process = cluster.jobs()[1]["run"]
    assert process in cluster.refused(*words, "process.layout=shards")
    assert cluster(*words).stdout.count("already running") == 2
    (commands / "queue").write_text("")
    cluster(*words, "process.layout=shards")
    (commands / "queue").write_text("8|PENDING|0|0|Dependency\n")
    assert "with other settings" in cluster("retry", process, code=2).stderr
    assert cluster.jobs()[1]["attempt"] == 1


@pytest.mark.slow
def test_dependency_on_a_local_run_fails_the_jobs_not_yet_submitted(cluster: Cli, commands: Path) -> None:
    cluster("+stage=pipeline", "dataset=digits", "cluster=slurm")
    *_, upload, train = RunStore(cluster.workspace).all()
    assert upload.attempt
    upload.attempt.submit("local", host="elsewhere")
    assert "which runs on this machine" in cluster("retry", train.id, code=2).stderr
    assert "which runs on this machine" in cluster.jobs()[-1]["reason"]
    assert len(scripts(commands)) == 4


def test_config_that_is_not_executed_fails_all_attempts_of_the_submission(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    info = {"stage": "download", "label": "download-digits", "needs": []}
    frozen = {"cluster": {"executor": "slurm"}, "stage": {"name": "download"}}
    runs = [store.create(f"{number}-download-digits", frozen, info) for number in (1, 2)]
    attempts = [(run, run.new_attempt()) for run in runs]
    (runs[1].folder / "config.yaml").chmod(0o666)
    with pytest.raises(UserError, match=f"{runs[1].id} is not executed: other users may write"):
        submit_attempts(store, attempts, (), {})
    for _, attempt in attempts:
        assert attempt.outcome is not None
        assert f"{runs[1].id} is not executed" in attempt.outcome.reason


@pytest.mark.slow
def test_a_submission_and_a_retry_query_slurm_once(cluster: Cli, commands: Path) -> None:
    words = ("-m", "+stage=pipeline", "dataset=digits", "cluster=slurm", "seed=0,1")
    squeue = (commands / "squeue").read_text().removeprefix("#!/bin/sh\n")
    write_command(commands, "squeue", f"echo query >> {commands}/queries\n{squeue}")

    def queries() -> int:
        path = commands / "queries"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return len(lines)

    cluster(*words)
    assert queries() == 0  # there was no run yet
    (commands / "queue").write_text("1|RUNNING|0|0|None\n2|PENDING|0|0|Dependency\n")
    done = cluster(*words)
    assert done.stdout.count("already running") == 2
    assert queries() == 1
    cluster(*words, "dry_run=true")
    assert queries() == 1
    (commands / "queue").write_text("1|RUNNING|0|0|None\n")
    upload = cluster.jobs()[2]["run"]
    queries()
    assert cluster("retry", upload).stdout.count("submitted") == 2
    assert queries() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("requeue=true", "--requeue"),
        ("requeue=false", "--no-requeue"),
        ("no-requeue=true", "--no-requeue"),
        ("no_requeue=true", "--no-requeue"),
        ("no-requeue=false", "--requeue"),
    ],
)
def test_requeue_can_be_disabled_in_cluster_sbatch(
    cluster: Cli, commands: Path, setting: str, line: str
) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=slurm", f"+cluster.sbatch.{setting}")
    assert re.findall(r"#SBATCH (--[a-z-]*requeue.*)", scripts(commands)[0]) == [line]


@pytest.mark.slow
def test_cancel_of_a_foreground_run_cancels_only_its_step(
    cluster: Cli, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocation has other uses: a shell, other runs."""
    cluster.env["SLURM_JOB_ID"] = "5"
    cluster("+stage=download", "dataset=digits", "cluster=foreground", code=1)
    (run,) = RunStore(cluster.workspace).all()
    attempt = run.new_attempt()
    attempt.submit("slurm", job_id="5")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    task._start_attempt(run, attempt)
    (commands / "queue").write_text("5|RUNNING|0|0|None\n")
    cluster("cancel", run.id)
    assert (commands / "cancelled").read_text() == "5.3\n"
    assert cluster.states() == ["cancelled"]


@pytest.mark.slow
def test_second_submission_submits_only_ended_jobs(cluster: Cli, commands: Path) -> None:
    words = ("+stage=pipeline", "dataset=digits", "cluster=slurm")
    cluster(*words)
    (commands / "queue").write_text(
        "1|RUNNING|2|0|None\n2|PENDING|0|0|Dependency\n3|PENDING|0|0|Dependency\n"
    )
    done = cluster(*words)
    assert done.stdout.count("already running") == 3
    assert "#SBATCH --dependency=afterok:3\n" in scripts(commands)[4]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("PENDING", QUEUED),
        ("RUNNING", RUNNING),
        ("COMPLETING", RUNNING),
        ("TIMEOUT", FAILED),
        ("OUT_OF_MEMORY", FAILED),
        ("NODE_FAIL", FAILED),
        ("CANCELLED by 1000", CANCELLED),
        ("COMPLETED", FAILED),  # it would have left an outcome
        ("SOMETHING_NEW", RUNNING),
    ],
)
def test_slurm_states_map_to_run_states(
    name: str, state: str, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    (commands / "queue").write_text(f"12_3|{name}|0|0|None\n12_4|RUNNING|0|0|None\n")
    assert slurm.query_jobs(["12_3"])["12_3"].state == state


def test_jobs_that_left_the_queue_are_queried_from_sacct(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    (commands / "queue").write_text("1|RUNNING|0|0|None\n")
    write_command(commands, "sacct", "echo '2|OUT_OF_MEMORY|0:125'; echo '3|RUNNING|0:0'")
    found = slurm.query_jobs(["1", "2", "3"])
    assert found["1"].state == RUNNING
    assert found["2"] == slurm.JobStatus(FAILED, "Slurm: out of memory (exit code 0:125)")
    assert "3" not in found  # squeue is current: a job that it does not list is not running


def test_job_that_an_operator_holds_has_no_command_for_its_user(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    (commands / "queue").write_text("1|PENDING|0|0|JobHeldAdmin\n2|PENDING|0|0|JobHeldUser\n")
    found = slurm.query_jobs(["1", "2"])
    assert found["1"].reason == "JobHeldAdmin: only the operators of the cluster can release it"
    assert found["2"].reason == "JobHeldUser: scontrol release 2"


@pytest.mark.slow
def test_jobs_are_not_ended_while_slurm_does_not_answer(cluster: Cli, commands: Path) -> None:
    cluster("+stage=pipeline", "dataset=digits", "cluster=slurm")
    write_command(
        commands, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    rows = cluster.jobs()
    assert {row["state"] for row in rows} == {"queued"}
    assert "Unable to contact" in rows[0]["reason"]
    write_command(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert set(cluster.states()) == {"failed"}


@pytest.mark.slow
def test_executor_slurm_without_sbatch_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli.env["PATH"] = str(tmp_path)
    assert "no sbatch" in cli.refused("+stage=download", "dataset=digits", "cluster=slurm")


def blocked(run: Run) -> None:
    """Wait for a Slurm run that a local run needs, as the local worker does."""
    store = RunStore(run.folder.parents[1])
    dependent = store.create("0-dependent", {}, {"stage": "train", "needs": [run.id]})
    worker = Worker(store, since=time.monotonic())
    while worker._blocked(dependent, {}) == "":
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait",
    [
        lambda run: jobs_table.watch([run], jobs_table.terminal()),
        lambda run: logs.show_logs(run, follow=True),
        lambda run: Handle(run.folder).result(),
        connect.wait_until_running,
        blocked,
    ],
    ids=["watch", "logs", "result", "connect", "worker"],
)
def test_long_polling_queries_slurm_rarely_and_reads_outcomes_at_every_tick(
    wait: Callable[[Run], object], commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    write_command(commands, "squeue", f"echo query >> {commands}/queries; cat {commands}/answer")
    (commands / "answer").write_text(queue_row(12, "PENDING", "Priority"))
    run = RunStore(tmp_path).create("0-x", {}, {"stage": "session"})
    attempt = run.new_attempt()
    attempt.submit("slurm", job_id="12")
    clock, long, really = [1000.0], 900.0, time.sleep

    def sleep(seconds: float) -> None:
        if seconds < 0.1:  # from subprocess, which waits for squeue
            return really(seconds)
        assert not attempt.outcome, "the outcome was not read at this tick"
        clock[0] += seconds
        if clock[0] >= 1000 + long:
            attempt.end(FINISHED, result={})
        return None

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock[0])
        patch.setattr(time, "sleep", sleep)
        with contextlib.suppress(UserError):  # connect raises, since the session has ended
            wait(run)
    kinds = 2 if wait is connect.wait_until_running else 1  # connect also queries the expected start
    queries = len((commands / "queries").read_text().splitlines())
    assert long / 15 <= queries <= kinds * 120


def test_cached_reply_is_used_only_while_polling(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    (commands / "queue").write_text("12|PENDING|0|0|Priority\n")
    long_ago = time.monotonic() - 3600
    assert slurm.query_jobs(["12"], long_ago)["12"].state == QUEUED
    (commands / "queue").write_text("12|RUNNING|0|0|None\n")
    assert slurm.query_jobs(["12"], long_ago)["12"].state == QUEUED
    assert slurm.query_jobs(["12"])["12"].state == RUNNING  # not polling
    assert slurm.query_jobs(["12"], time.monotonic())["12"].state == RUNNING  # polling has just begun
    (commands / "queue").write_text("12|COMPLETING|3|0|None\n")
    assert slurm.query_jobs(["12"], long_ago)["12"].restarts == 0
    slurm.cancel_job("12")
    assert slurm.query_jobs(["12"], long_ago)["12"].restarts == 3
