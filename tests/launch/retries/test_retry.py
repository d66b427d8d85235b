"""Retry with the remedy of a diagnosis, with a fake Slurm: what is shown, submitted and refused."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import SBATCH, scripts, write_command
from recorded_runs import set_times

from hpc_imagenet import Handle, UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.retries.retry_plan import plan_retry
from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import usage_path

pytestmark = pytest.mark.slow

SUBMIT = ("dataset=digits", "cluster=slurm", "cluster.time=1:00:00", "cluster.memory_gb=4G")


def queue(cluster: Cli, *rows: str) -> None:
    (cluster.cwd / "slurm/queue").write_text("".join(f"{row}\n" for row in rows))


def script(cluster: Cli, number: int) -> str:
    return (cluster.cwd / f"slurm/script.{number}").read_text()


def only_run(cluster: Cli) -> Run:
    (run,) = RunStore(cluster.workspace).all()
    return run


def set_time(path: Path, other: Path, later: float) -> None:
    """Set the modification time of a file to that of another one and some seconds."""
    moment = other.stat().st_mtime + later
    os.utime(path, (moment, moment))


def fail(run: Run, reason: str) -> None:
    assert run.attempt
    assert run.attempt.end(FAILED, reason)


def test_more_memory_after_too_little(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT)
    run = only_run(cluster)
    queue(cluster, "1|OUT_OF_MEMORY|0|125|None")
    shown = f"{run.id}  out of host memory · cluster.memory_gb: 4 → 6\n"
    dry = cluster("retry", "--failed", "--dry-run").stdout
    assert dry == f"{shown}nothing was submitted (--dry-run)\n"
    assert len(run.attempts()) == 1
    assert run.frozen()["cluster"]["memory_gb"] == 4
    assert cluster("retry", run.id).stdout == f"{shown}submitted  {run.id}\n"
    assert "#SBATCH --mem=6144M\n" in script(cluster, 2)
    first = run.attempts()[0].outcome
    assert first  # Slurm forgets its jobs
    assert first.reason == "Slurm: out of memory (exit code 0:125)"
    queue(cluster, "2|OUT_OF_MEMORY|0|125|None")
    assert "cluster.memory_gb: 6 → 9" in cluster("retry", run.id).stdout  # a change each time
    assert run.id == only_run(cluster).id


def test_refused_run_keeps_no_other_from_its_retry(cluster: Cli, commands: Path) -> None:
    names = "dataset.name=a,b"
    cluster("-m", "+stage=download", *SUBMIT, names, "cluster.array_parallelism=1")
    first, second = RunStore(cluster.workspace).all()
    error = "sbatch: error: Requested node configuration is not available"
    refusal = f"grep -qs -e --mem=6144M $1 && {{ echo '{error}' >&2; exit 1; }}"
    write_command(commands, "sbatch", refusal + SBATCH)
    queue(cluster, "1_0|OUT_OF_MEMORY|0|125|None", "1_1|NODE_FAIL|0|0|None")
    done = cluster("retry", "--failed", code=2)
    (line,) = done.stderr.splitlines()
    assert (
        line == f"error: sbatch refused {first.info['label']}: Requested node configuration is not available"
    )
    assert f"refused  {first.id}\nsubmitted  {second.id}\n" in done.stdout
    assert [len(run.attempts()) for run in (first, second)] == [2, 2]
    assert first.attempt
    assert second.attempt
    assert first.attempt.outcome
    assert (second.attempt.outcome, second.attempt.submitted["job_id"]) == (None, "2")
    queue(cluster, "2|RUNNING|0|0|None")
    # Never with the memory that was too little; and a refusal that repeats is not tried for ever.
    assert "unchanged" in cluster("retry", "--failed", code=2).stdout
    assert len(scripts(commands)) == 2
    assert f"left out  {first.id} failed twice the same way" in cluster("retry", "--failed").stderr
    shown = cluster("retry", first.id, "cluster.memory_gb=5").stdout
    assert "cluster.memory_gb: 6 → 5" in shown
    assert "#SBATCH --mem=5120M\n" in script(cluster, 3)


def test_remedies_stay_within_the_partition(cluster: Cli, commands: Path) -> None:
    write_command(
        commands, "sinfo", "echo 'cpu|10-00:00:00|900000|9|'; echo 'gpu*|1-00:00:00|257000|9|gpu:4'"
    )
    cluster("+stage=download", *SUBMIT[:2], "cluster.time=1440", "cluster.memory_gb=225")
    run = only_run(cluster)
    queue(cluster, "1|TIMEOUT|0|0|None")
    assert f"{run.id}  time limit · unchanged\n" in cluster("retry", run.id, "--dry-run").stdout
    queue(cluster, "1|OUT_OF_MEMORY|0|125|None")
    assert "cluster.memory_gb: 225 → 250" in cluster("retry", run.id).stdout
    queue(cluster, "2|OUT_OF_MEMORY|0|125|None")
    assert "set fewer loader.workers, or give it more memory" in cluster.refused("retry", run.id)


def test_training_that_saved_work_before_its_time_limit_needs_no_longer_one(cluster: Cli) -> None:
    cluster("+stage=pipeline", *SUBMIT)
    *needed, run = RunStore(cluster.workspace).all()
    for each in needed:
        assert each.attempt
        assert each.attempt.end(FINISHED)
    checkpoint = run.folder / "checkpoints/last.ckpt"
    checkpoint.parent.mkdir()
    for _ in range(3):
        assert run.attempt
        run.attempt.start()
        checkpoint.touch()
        set_time(checkpoint, run.attempt.folder / "started.json", 1)
        queue(cluster, f"{run.attempt.submitted['job_id']}|TIMEOUT|0|0|None")
        assert f"retry {run.id} continues it" in cluster("logs", run.id).stderr
        assert f"{run.id}  time limit · unchanged\n" in cluster("retry", run.id).stdout
    # Progress that no checkpoint keeps does not count, however far it is.
    assert run.attempt
    run.attempt.start()
    write_json(run.folder / "progress.json", {"done": 5010, "total": 9000})
    set_time(checkpoint, run.attempt.folder / "started.json", -1)
    queue(cluster, f"{run.attempt.submitted['job_id']}|TIMEOUT|0|0|None")
    assert "time limit · cluster.time: 60 → 120" in cluster("retry", run.id).stdout


def test_progress_of_other_stages_keeps_no_remedy_from_them(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT)
    run = only_run(cluster)
    assert run.attempt
    run.attempt.start()
    write_json(run.folder / "progress.json", {"done": 5, "total": 9})
    queue(cluster, "1|TIMEOUT|0|0|None")
    assert "time limit · cluster.time: 60 → 120" in cluster("retry", run.id).stdout


@pytest.mark.parametrize("row", ["TIMEOUT|0|0|None", "OUT_OF_MEMORY|0|125|None"])
def test_again_submits_a_run_unchanged(cluster: Cli, row: str) -> None:
    cluster("+stage=download", *SUBMIT)
    run = only_run(cluster)
    queue(cluster, f"1|{row}")
    assert "· unchanged\n" in cluster("retry", run.id, "--again").stdout
    assert {"#SBATCH --time=60", "#SBATCH --mem=4096M"} <= set(script(cluster, 2).splitlines())


def test_unknown_end_is_neither_recorded_nor_compared(cluster: Cli, commands: Path) -> None:
    cluster("+stage=download", *SUBMIT)
    run = only_run(cluster)
    write_command(commands, "sacct", "echo 'sacct: error: Problem talking to the database' >&2; exit 1")
    for _ in range(3):
        assert "Slurm's accounting does not answer" in cluster.jobs()[0]["reason"]
        assert f"{run.id}  unchanged\n" in cluster("retry", run.id).stdout
    assert [each.outcome for each in run.attempts()] == [None] * 4


def test_stage_with_a_value_of_its_own(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT, "+cluster.stage.download.time=10")
    run = only_run(cluster)
    queue(cluster, "1|TIMEOUT|0|0|None")
    assert "time limit · cluster.stage.download.time: 10 → 20" in cluster("retry", run.id).stdout
    assert "#SBATCH --time=20\n" in script(cluster, 2)
    queue(cluster, "2|FAILED|0|0|None")
    cluster("retry", run.id, "cluster.time=33")
    assert "#SBATCH --time=33\n" in script(cluster, 3)


def test_failed_node_is_excluded_beside_those_before(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT, "+cluster.sbatch.exclude=[n1,n2]")
    run = only_run(cluster)
    assert run.attempt
    (run.attempt.folder / "1_0_log.err").write_text("srun: error: Node failure on n3\n")
    queue(cluster, "1|NODE_FAIL|0|0|None")
    assert "node failure · cluster.sbatch.exclude: n1,n2 → n1,n2,n3" in cluster("retry", run.id).stdout
    assert "#SBATCH --exclude=n1,n2,n3\n" in script(cluster, 2)


def test_an_attempt_that_slurm_ended_has_the_hours_that_it_ran(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT, "++cluster.stage.download.gpus_per_node=8")
    run = only_run(cluster)
    first = run.attempt
    assert first
    first.start()
    set_times(run, submitted=timedelta(hours=69), started=timedelta(hours=69))
    usage_path(first, 0, 0).parent.mkdir()
    write_json(usage_path(first, 0, 0), {"seconds": 86_400})
    queue(cluster, "1|TIMEOUT|0|0|None")
    details = json.loads(cluster("show", run.id, "--json").stdout)
    assert (round(details["gpu_hours"]), round(details["seconds"])) == (192, 86_400)
    shown = " ".join(cluster("show", run.id).stdout.split())
    assert "failed · Slurm: timeout (exit code 0:0) · 24:00:00" in shown
    assert "ran 24:00:00 of 1:00:00" in shown
    cluster("retry", run.id, "cluster.stage.download.gpus_per_node=2")
    queue(cluster, "2|PENDING|0|0|None")
    (found, _) = json.loads(cluster("show", run.id, "--json").stdout)["attempts"]
    assert round(found["resources"]["hours"], 2) == 24
    assert found["ended"] == details["attempts"][0]["ended"]
    assert found["diagnosis"]["class"] == "time_limit"


def test_accumulate_after_too_little_device_memory(cluster: Cli) -> None:
    cluster("+stage=pipeline", *SUBMIT, "model=resnet18")
    queue(cluster)
    *_, train = RunStore(cluster.workspace).all()
    for need in RunStore(cluster.workspace).all()[:-1]:
        assert need.attempt
        need.attempt.end("finished", result={})
    fail(train, "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "out of device memory · train.accumulate: 1 → 2" in cluster("retry", train.id).stdout
    assert train.config().train.accumulate == 2
    fail(
        train,
        "out of memory at step 3: 32 images at a time are too many for A100: train.accumulate=8 takes …",
    )
    assert "train.accumulate: 2 → 8" in cluster("retry", train.id).stdout
    fail(train, "out of memory at step 3: 1 images at a time are too many for A100: take a smaller model")
    done = cluster("retry", train.id)  # computed: 64 = 16 x 4
    assert "train.accumulate: 8 → 16" in done.stdout


def test_needs_have_remedies_of_their_own(cluster: Cli) -> None:
    cluster("+stage=pipeline", *SUBMIT)
    download, process, upload, train = RunStore(cluster.workspace).all()
    dependency = "CANCELLED|0|0|DependencyNeverSatisfied"
    queue(cluster, "1|TIMEOUT|0|0|None", *(f"{number}|{dependency}" for number in (2, 3, 4)))
    lines = cluster("retry", train.id).stdout.splitlines()
    assert lines[:4] == [
        f"{download.id}  time limit · cluster.time: 60 → 120",
        *(f"{run.id}  cancelled · unchanged" for run in (process, upload, train)),
    ]
    assert [line.split()[0] for line in lines[4:]] == ["submitted"] * 4


def test_same_failure_is_not_submitted_a_third_time(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT)
    run = only_run(cluster)
    queue(cluster)
    fail(run, "ValueError: 17 is not a number")
    assert "bug · unchanged" in cluster("retry", run.id).stdout
    fail(run, "ValueError: 18 is not a number")
    line = cluster.refused("retry", run.id)
    assert line.startswith(
        f"error: {run.id} failed twice the same way (bug: ValueError: 18 is not a number): "
    )
    assert line.endswith("retry it with SETTING=VALUE, or unchanged with --again")
    done = cluster("retry", "--failed")
    assert "left out" in done.stderr
    assert len(run.attempts()) == 2
    assert "cluster.time: 60 → 90" in cluster("retry", run.id, "cluster.time=90").stdout
    fail(run, "ValueError: 19 is not a number")
    assert "bug · unchanged" in cluster("retry", "--failed", "--again").stdout
    fail(run, "TypeError: another failure")
    cluster("retry", run.id)
    assert len(run.attempts()) == 5


def test_failure_that_is_certain_to_recur_is_refused_at_once(cluster: Cli) -> None:
    # cluster.memory_gb is the cluster's default
    cluster("+stage=download", "dataset=digits", "cluster=slurm")
    run = only_run(cluster)
    queue(cluster, "1|OUT_OF_MEMORY|0|125|None")
    line = cluster.refused("retry", run.id)
    assert "would fail again, since nothing has changed" in line
    assert "cluster.memory_gb" in line
    assert "cluster.memory_gb: default → 8" in cluster("retry", run.id, "cluster.memory_gb=8").stdout


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("dataset.name=other", "dataset.name=other makes it another run than"),
        ("dataset.source=/elsewhere", "makes it another run than"),
        ("cluster.executor=local", "makes it another run than"),
        ("cluster.time=0", "cluster.time=0 is too small: at least 1"),
        ("cluster.times=5", "cluster.times is an unknown setting; did you mean: cluster.time"),
        ("cluster.time=5,6", "cluster.time=5,6: only single values can be set"),
        ("cluster=local", "selects a file of conf/"),
        ("cluster.time=null", "cluster.time is not set"),
    ],
)
def test_setting_that_a_retry_cannot_change(cluster: Cli, setting: str, error: str) -> None:
    cluster("+stage=download", *SUBMIT)
    queue(cluster, "1|TIMEOUT|0|0|None")
    line = cluster.refused("retry", "download-digits", setting)
    assert error in line
    assert len(only_run(cluster).attempts()) == 1


def test_option_of_sbatch_is_added(cluster: Cli) -> None:
    cluster("+stage=download", *SUBMIT)
    queue(cluster, "1|FAILED|0|256|None")
    cluster("retry", "download-digits", "cluster.sbatch.reservation=spring")
    assert "#SBATCH --reservation=spring\n" in script(cluster, 2)


def test_retry_of_a_handle(cluster: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster("+stage=download", *SUBMIT)
    queue(cluster)
    monkeypatch.setenv("PATH", cluster.env["PATH"])
    run = only_run(cluster)
    handle = Handle(run.folder)
    fail(run, "ValueError: no")
    handle.retry()
    fail(run, "ValueError: no")
    with pytest.raises(UserError, match="failed twice the same way"):
        handle.retry()
    handle.retry("cluster.time=70")
    fail(run, "ValueError: no")
    handle.retry(again=True)
    assert len(run.attempts()) == 4


def failed_run(store: RunStore, number: int, stage: str, executor: str = "local", **info: object) -> Run:
    frozen = {"cluster": {"executor": executor}, "stage": {"name": stage}}
    run = store.create(f"{number:08x}-{stage}", frozen, {"stage": stage, "label": stage, "needs": [], **info})
    attempt = run.new_attempt()
    attempt.submit(executor)
    attempt.end(FAILED, "killed")
    return run


def test_run_that_cannot_be_retried_is_left_out_of_a_selection(tmp_path: Path) -> None:
    store, names = RunStore(tmp_path), ("1-process-x", "2-process-x", "3-process-y")
    usual = failed_run(store, 1, "train", processing_run=names[2])
    old = failed_run(store, 2, "train")
    write_json(old.folder / "run.json", {**old.info, "format": 1})
    conflicting = failed_run(store, 3, "train", processing_run=names[1])
    active = store.create(names[0], {}, {"stage": "process", "processing_run": names[0]})
    active.new_attempt().submit("local", host="elsewhere")
    plan = plan_retry(store, [old, conflicting, usual], leave_out=True)
    assert [planned.run.id for planned in plan.planned] == [usual.id]
    assert "made by another version" in str(plan.refused[0])
    assert f"needs the folder of {active.id}" in str(plan.refused[1])
    for run in (old, conflicting):
        with pytest.raises(UserError, match=run.id):
            plan_retry(store, [run, usual])


def test_run_of_another_executor_that_is_needed_is_retried_by_itself_first(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    process = failed_run(store, 1, "process", "slurm")
    train = failed_run(store, 2, "train", needs=[process.id])
    with pytest.raises(
        UserError, match=rf"{process.id}, a run of cluster.executor=slurm: retry {process.id}"
    ):
        plan_retry(store, [train])
