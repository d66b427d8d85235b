"""The executor `foreground`: what is recorded of its jobs, and how signals end them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest
from command_line import Cli, Gate, eventually
from fake_slurm import SRUN, write_command
from recorded_runs import change, set_times

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.config.schema import Cluster, cluster_for
from hpc_imagenet.errors import EXIT_REQUEUE, UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.executors import EXECUTORS
from hpc_imagenet.launch.foreground_executor import ForegroundExecutor, start_job
from hpc_imagenet.runs.attempt import record_time
from hpc_imagenet.runs.store import RunStore

DOWNLOAD = ("+stage=download", "dataset=ilsvrc", "download.retries=0", "cluster=foreground")
TWO = ("-m", *DOWNLOAD, "dataset.name=a,b")
SENTENCE = "interrupted: the jobs of this command have ended; the same command resumes them\n"


def _heed_signals() -> None:
    """Undo what nohup, or a shell that started the tests in the background, would pass on."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def start(cli: Cli, *words: str) -> subprocess.Popen[str]:
    """Start a command that leads a group of processes, as one in a terminal does."""
    command = [sys.executable, "-m", "hpc_imagenet", *words]
    return subprocess.Popen(
        command,
        cwd=cli.cwd,
        env=cli.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def start_two(cli: Cli, gate: tuple[Gate, str]) -> subprocess.Popen[str]:
    """Start two downloads, and wait until the first runs."""
    process = start(cli, *TWO, f"dataset.source={gate[1]}/${{dataset.name}}")
    eventually(lambda: gate[0].waiting == ["a"])
    return process


def test_a_job_prints_where_its_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    start_job(["echo", "table"], os.environ).wait()
    with contextlib.redirect_stdout(sys.stderr):  # as price --json does
        start_job(["echo", "beside JSON"], os.environ).wait()
    assert capfd.readouterr() == ("table\n", "beside JSON\n")


@pytest.mark.parametrize("name", ["gpus_per_node", "tasks_per_node", "nodes"])
def test_processes_that_nothing_starts_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    check = ForegroundExecutor().check_settings
    for value in (0, 1, None):
        check("train", Cluster(executor="foreground", **{name: value}))
    cluster = Cluster(executor="foreground", **{name: 4})
    for stage in ("train", "evaluate", "search"):
        with pytest.raises(
            UserError, match=rf"cluster.{name}=4: .* {stage} as one process, .*cluster.{name}=1"
        ):
            check(stage, cluster)
    check("process", cluster)  # one process in any case
    check("train", cluster, shares_loader=True)  # a process for each run, on the GPUs in turn
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    check("train", cluster)  # srun starts them


@pytest.mark.parametrize("stage", ["train", "search", "evaluate"])
@pytest.mark.parametrize(
    ("executor", "name"), [("foreground", "gpus_per_node"), ("foreground", "nodes"), ("local", "nodes")]
)
def test_the_advice_names_the_setting_of_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str, executor: str, name: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = ["dataset=digits", f"workspace={tmp_path}", f"cluster={executor}", f"cluster.{name}=1"]
    words.append(f"+cluster.stage.train.{name}=2")
    if stage == "search":  # gets the settings of train
        words += ["+search=halving", "recipe.learning_rate=interval(0.01,0.1)"]
    elif stage == "evaluate":
        words.append(f"+cluster.stage.evaluate.{name}=2")

    def check(*more: str) -> None:
        config = compose(with_defaults(words, more), config_dir=str(tmp_path))[0]
        EXECUTORS[executor].check_settings(stage, cluster_for(config, stage))

    with pytest.raises(UserError, match=rf"^cluster\.stage\.{stage}\.{name}=2: ") as caught:
        check()
    advice = str(caught.value).rpartition(", or ")[2]
    check(advice)
    (tmp_path / "cluster").mkdir()
    file = {"executor": executor, "stage": {stage: {name: 2}}}
    (tmp_path / "cluster" / "mine.yaml").write_text(json.dumps(file))
    words = [word for word in words if "cluster" not in word] + ["cluster=mine"]
    with pytest.raises(UserError, match=re.escape(str(caught.value))):
        check()
    check(advice)


def test_a_missing_time_limit_is_that_of_the_stage() -> None:
    check = EXECUTORS["slurm"].check_settings
    with pytest.raises(UserError, match=r"such as cluster\.time=1440$"):
        check("train", Cluster(executor="slurm"))
    with pytest.raises(UserError, match=r"such as \+\+cluster\.stage\.train\.time=1440$"):
        check("train", Cluster(executor="slurm", stage={"train": {"time": None}}))


@pytest.mark.slow
def test_gpus_that_no_process_uses_are_refused_at_submission(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = ("-m", "+stage=pipeline", "dataset=digits", "cluster=foreground", "cluster.gpus_per_node=4")
    assert "cluster.gpus_per_node=4: outside of a Slurm allocation" in cli.refused(*words)
    shared = ("recipe.learning_rate=0.1,0.2", "train.share_loader=true", "dry_run=true")
    assert "one job with one loader" in cli(*words, *shared).stdout
    local = (*words[:3], "cluster=local", "cluster.nodes=2", "dry_run=true")
    assert "cluster.nodes=2: cluster=local runs train on this machine alone" in cli.refused(*local)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGINT, "Ctrl-C"),
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGHUP, "SIGHUP, as of a closed terminal"),
        (signal.SIGQUIT, "SIGQUIT"),
    ],
)
def test_an_interrupted_command_ends_its_jobs(
    cli: Cli, gate: tuple[Gate, str], number: int, cause: str
) -> None:
    process = start_two(cli, gate)
    os.killpg(process.pid, number)
    assert process.communicate()[1].endswith(f"\n{SENTENCE}")
    assert process.returncode == 130
    assert [(row["state"], row["reason"]) for row in cli.jobs()] == [
        ("cancelled", f"interrupted by {cause}"),
        ("cancelled", f"not started: interrupted by {cause}"),
    ]
    assert cli.processes() == []


@pytest.mark.slow
def test_the_same_command_resumes_interrupted_jobs(cli: Cli, gate: tuple[Gate, str]) -> None:
    process = start_two(cli, gate)
    assert cli.states() == ["running", "queued"]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    gate[0].waiting.clear()
    process = start_two(cli, gate)
    assert [(row["state"], row["attempt"]) for row in cli.jobs()] == [("running", 2), ("queued", 2)]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()


@pytest.mark.slow
def test_a_queued_job_is_cancelled_alone(cli: Cli, gate: tuple[Gate, str]) -> None:
    process = start_two(cli, gate)
    cli("cancel", "download-b")
    assert cli.states() == ["running", "cancelled"]
    gate[0].open.set()
    process.communicate()
    assert process.returncode == 1
    assert gate[0].waiting == ["a"]


@pytest.mark.slow
def test_a_killed_job_has_failed(cli: Cli, gate: tuple[Gate, str]) -> None:
    process = start_two(cli, gate)
    (attempt,) = RunStore(cli.workspace).find("download-a").attempts()
    psutil.Process(attempt.started["pid"]).kill()
    process.communicate()
    assert process.returncode == 1
    first, second = cli.jobs()
    assert (first["state"], second["state"]) == ("failed", "cancelled")
    how = "SIGKILL: killed, or out of memory"
    assert first["reason"] == f"ended without an outcome ({how}): the same command resumes it"


@pytest.mark.slow
def test_jobs_of_a_killed_command_have_failed(cli: Cli, gate: tuple[Gate, str]) -> None:
    process = start_two(cli, gate)
    for each in (process.pid, *(task.pid for task in cli.processes("launch.tasks.task"))):
        psutil.Process(each).kill()
    (attempt,) = RunStore(cli.workspace).find("download-a").attempts()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(attempt.started["pid"]).kill()
    process.communicate()
    rows = cli.until("failed", "failed")
    assert all("the same command resumes it" in row["reason"] for row in rows)


@pytest.mark.slow
def test_ctrl_c_in_an_allocation_ends_the_step(cluster: Cli, commands: Path) -> None:
    # Like srun's, the first SIGINT ends nothing.
    write_command(
        commands,
        "srun",
        "trap '' INT; trap 'touch $here/ended; exit 143' TERM; touch $here/started; "
        "while true; do sleep 0.05; done",
    )
    (commands / "queue").write_text("5|RUNNING|0|0|None\n")
    cluster.env["SLURM_JOB_ID"] = "5"
    process = start(cluster, *TWO, "dataset.source=/nowhere")
    eventually((commands / "started").exists)
    assert cluster.states() == ["running", "running"]
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1].endswith(f"\n{SENTENCE}")
    assert (commands / "ended").exists()
    assert [(row["state"], row["reason"]) for row in cluster.jobs()] == [
        ("cancelled", "interrupted by Ctrl-C"),
        ("cancelled", "not started: interrupted by Ctrl-C"),
    ]


@pytest.mark.slow
def test_in_an_allocation_no_attempt_waits_for_its_record(cluster: Cli, commands: Path) -> None:
    """Slurm may requeue the job at any moment, and a later one runs after hours."""
    attempts = f"{cluster.workspace}/runs/*/attempts/1"
    write_command(commands, "git", f"ls -d {attempts} >> $here/before 2> /dev/null; echo abc")
    write_command(commands, "srun", f"ls {attempts}/submitted.json > $here/records")
    cluster.env["SLURM_JOB_ID"] = "5"
    cluster.process(*TWO, "dataset.source=/nowhere", code=1)
    assert (commands / "before").read_text() == ""
    assert len((commands / "records").read_text().split()) == 2


@pytest.mark.slow
def test_a_requeued_job_cancels_no_later_one(cluster: Cli, commands: Path) -> None:
    write_command(commands, "srun", f"echo start >> $here/starts; exit {EXIT_REQUEUE}")
    cluster.env["SLURM_JOB_ID"] = "5"
    done = cluster(*TWO, "dataset.source=/nowhere", code=1)
    assert "requeueing the job" in done.stderr
    assert (commands / "starts").read_text() == "start\n"
    for run in RunStore(cluster.workspace).all():
        assert run.attempt is not None
        assert run.attempt.outcome is None
        assert run.attempt.submitted["job_id"] == "5"


@pytest.mark.slow
def test_a_requeued_job_goes_on_with_its_attempt(cluster: Cli, commands: Path) -> None:
    write_command(commands, "srun", f"exit {EXIT_REQUEUE}")
    cluster.env["SLURM_JOB_ID"] = "5"
    words = ("+stage=download", "dataset=digits", "cluster=foreground")
    cluster(*words, code=1)
    (run,) = RunStore(cluster.workspace).all()
    assert run.attempt
    run.attempt.start()
    set_times(run, submitted=timedelta(hours=40), started=timedelta(hours=30))
    record = run.attempt.folder / "submitted.json"
    change(record, shares_with=["another"], code={"commit": "old"})  # which has finished
    submitted = run.attempt.submitted
    stopped = datetime.now(timezone.utc) - timedelta(hours=10)
    write_json(run.folder / "progress.json", {"done": 1, "time": record_time(stopped)})
    write_command(commands, "srun", f'echo "$@" >> $here/options{SRUN}')
    cluster.env["SLURM_RESTART_COUNT"] = "1"
    (commands / "queue").write_text("5|RUNNING|1|0|None\n")
    cluster(*words)
    assert "--open-mode=append" in (commands / "options").read_text().split()
    (row,) = cluster.jobs()
    assert (row["state"], row["attempt"], row["requeued"]) == ("finished", 1, 1)
    again = run.attempt.submitted
    assert (again["time"], "shares_with" in again) == (submitted["time"], False)
    assert again["code"] != submitted["code"]
    (found,) = json.loads(cluster("show", run.id, "--json").stdout)["attempts"]
    assert round(found["resources"]["hours"], 1) == 20
    assert round(found["queued_seconds"] / 3600, 1) == 10 + 10
    cluster.env["SLURM_RESTART_COUNT"] = "2"  # after its end another attempt is made
    (run.folder.parents[1] / "archives/digits").rename(run.folder.parents[1] / "archives/gone")
    cluster(*words)
    assert [attempt.started["restarts"] for attempt in run.attempts()] == [1, 2]


@pytest.mark.slow
def test_a_requeued_job_ends_by_what_its_own_start_wrote(cluster: Cli, commands: Path) -> None:
    lost = "ValueError: old\nsrun: error: Node failure on n2"
    log = "for each; do [[ $each == --error=* ]] && log=${each#*=}; done"
    own = "[rank0]: RuntimeError: new\nsrun: error: n1: task 0: Exited with exit code 1"
    starts = f'lines="{own}"; [ -e $here/first ] || {{ touch $here/first; lines="{lost}"; }}'
    write_command(commands, "srun", f'{log}\n{starts}\necho "$lines" >> ${{log//%t/0}}\nexit 1')
    cluster.env["SLURM_JOB_ID"] = "5"
    words = ("+stage=download", "dataset=digits", "cluster=foreground")
    assert "srun lost a node: requeueing the job" in cluster(*words, code=1).stderr
    cluster.env["SLURM_RESTART_COUNT"] = "1"
    assert "requeueing" not in cluster(*words, code=1).stderr
    (run,) = RunStore(cluster.workspace).all()
    assert run.attempt
    assert run.attempt.outcome
    reason = "exit code 1 without an outcome; last error line: RuntimeError: new"
    assert (run.attempt.number, run.attempt.outcome.reason) == (1, reason)
