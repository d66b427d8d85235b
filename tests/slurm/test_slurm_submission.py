"""Submission to a real Slurm: arrays, dependencies, resources, job states and their reasons."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from command_line import eventually
from lab import LAB, Lab, LabDoor

from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.runs.store import Run

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("dataset=digits", "recipe.epochs=1", "cluster.cpus_per_task=1")


def job_id(row: dict[str, Any]) -> str:
    return str((read_json(Path(row["dir"]) / "attempts/1/submitted.json") or {})["job_id"])


def wait_for(cli: LabDoor, *states: str, seconds: float = 300) -> list[dict[str, Any]]:
    """Wait until the jobs have these states, oldest first, and return their rows."""
    return cli.until(*states, seconds=seconds)


@pytest.fixture
def store(site: LabDoor) -> str:
    return f"datastore.url={site.workspace}/datastores"


def test_sweep_is_one_array_and_outlives_the_terminal(cluster: LabDoor, store: str) -> None:
    words = ["-m", "model=mobilenet_v3_small,squeezenet1_1", *SMALL, store, "cluster=lab"]
    # A closed terminal: the command leads a session, which gets SIGHUP.
    terminal = subprocess.Popen(
        ["sh", "-c", f"{shlex.join([sys.executable, '-m', 'hpc_imagenet', *words])}; sleep 600"],
        env=cluster.env,
        cwd=cluster.cwd,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup would be inherited
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(
            lambda: (
                len(cluster.runs()) == 2
                and all(row["reason"] != "is being submitted" for row in cluster.jobs())
            ),
            120,
        )
    finally:
        os.killpg(terminal.pid, signal.SIGHUP)
        terminal.wait()
    ids = [job_id(row) for row in cluster.jobs()]
    assert [job.partition("_")[2] for job in sorted(ids)] == ["0", "1"]
    assert len({job.partition("_")[0] for job in ids}) == 1
    wait_for(cluster, "finished", "finished")


def test_training_on_two_nodes_of_two_tasks(cluster: LabDoor, store: str) -> None:
    cluster("model=squeezenet1_1", *SMALL, store, "cluster.nodes=2", "cluster.tasks_per_node=2")
    (row,) = wait_for(cluster, "finished")
    attempt = Path(row["dir"]) / "attempts/1"
    started = read_json(attempt / "started.json")
    assert started is not None
    assert (started["world_size"], started["restarts"]) == (4, 0)
    assert len({path.name for path in attempt.glob("*_log.out")}) == 4
    # Only rank 0 prints; all ranks train.
    printed_by = [path.name for path in attempt.glob("*_log.out") if "epoch 1/1" in path.read_text()]
    assert [re.search(r"_(\d)_log", name)[1] for name in printed_by] == ["0"]  # type: ignore[index]
    progress = row["progress"]
    assert progress["done"] == progress["total"] == 22 * 64
    csvs = {"metrics.csv", "val_classes.csv", "val_confusion.csv"}
    assert {path.name for path in Path(row["dir"]).glob("*.csv")} == csvs
    # Its evaluation is a job with the same cluster settings, on one node unless more are set.
    cluster("evaluate", row["run"], "checkpoint=last", "cluster.nodes=2")
    (_, evaluated) = wait_for(cluster, "finished", "finished")
    started = read_json(Path(evaluated["dir"]) / "attempts/1/started.json")
    assert started is not None
    assert started["world_size"] == 4
    for name in ("top1", "top5", "loss"):
        assert evaluated["result"][name] == pytest.approx(row["result"][name], rel=1e-5)
    assert evaluated["result"]["images"] == 360


def test_two_trainings_run_on_one_node(cluster: LabDoor, store: str) -> None:
    node = "+cluster.sbatch.nodelist=n1"
    cluster("-m", "seed=1,2", "model=squeezenet1_1", *SMALL, store, "cluster.tasks_per_node=2", node)
    attempts = [Run(Path(row["dir"])).attempt for row in wait_for(cluster, "finished", "finished")]
    begins = [attempt.started["time"] for attempt in attempts if attempt]
    ends = [read_json(attempt.folder / "outcome.json")["time"] for attempt in attempts if attempt]  # type: ignore[index]
    assert max(begins) < min(ends)  # ISO times of one machine: they ran at once


def test_failed_job_cancels_all_that_depend_on_it(cluster: LabDoor, lab: Lab) -> None:
    cluster(
        "-m", "+stage=pipeline", "dataset=ilsvrc", "dataset.name=x", "dataset.source=/nowhere", "seed=0,1"
    )
    rows = wait_for(cluster, "failed", *["cancelled"] * 4)
    assert "/nowhere" in rows[0]["reason"]
    assert all("DependencyNeverSatisfied" in row["reason"] for row in rows[1:])
    assert lab.slurm("squeue", "--noheader", "--states=PENDING") == ""
    # Retrying the last run also retries the runs it needs.
    assert cluster("retry", rows[-1]["run"]).stdout.count("submitted") == 4


def test_array_larger_than_max_array_size_is_split(cluster: LabDoor, store: str) -> None:
    held = "+cluster.sbatch.hold=true"
    cluster("-m", "seed=range(130)", "model=squeezenet1_1", *SMALL, store, held)  # MaxArraySize is 128
    rows = cluster.jobs()
    arrays = [job_id(row).partition("_")[0] for row in rows]
    assert sorted(arrays.count(array) for array in set(arrays)) == [2, 128]
    assert {(row["state"], row["reason"]) for row in rows} == {
        ("queued", f"JobHeldUser: scontrol release {job}") for job in map(job_id, rows)
    }
    cluster("cancel", *(row["run"] for row in rows[:2]))
    states = cluster.states()
    assert (states[:2], set(states[2:])) == (["cancelled"] * 2, {"queued"})


def test_submission_inside_an_allocation_does_not_inherit_it(cluster: LabDoor, lab: Lab, store: str) -> None:
    words = [sys.executable, "-m", "hpc_imagenet", "model=squeezenet1_1", *SMALL, store, "cluster=lab"]
    inner = f"cd / && export HPC_IMAGENET_WORKSPACE={cluster.workspace} && {shlex.join(words)}"
    # The outer job has 2 tasks of 3 CPUs on 2 nodes; the inner job must inherit none of that.
    lab.sbatch(inner, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3")
    eventually(lambda: bool(cluster.runs()), 120)
    (row,) = wait_for(cluster, "finished")
    job = lab.job(job_id(row))
    assert (job["NumNodes"], job["NumCPUs"], job["CPUs/Task"]) == ("1", "1", "1")


def test_cancelled_foreground_run_keeps_its_allocation(cluster: LabDoor, lab: Lab, store: str) -> None:
    words = [sys.executable, "-m", "hpc_imagenet", "model=squeezenet1_1", store, "cluster=foreground"]
    words += with_defaults(SMALL, ["recipe.epochs=50"])
    inner = f"cd / && export HPC_IMAGENET_WORKSPACE={cluster.workspace}; {shlex.join(words)}"
    after = cluster.cwd / "after"
    job = lab.sbatch(f"{inner}; echo $? > {after}; sleep 600", "--cpus-per-task=2")
    eventually(lambda: bool(cluster.runs()) and bool(cluster.jobs()[0]["progress"].get("done")), 240)
    cluster("cancel", cluster.runs()[0])
    eventually(lambda: after.exists() and after.read_text() == "1\n")
    assert cluster.states() == ["cancelled"]
    assert (lab.job(job)["JobState"], lab.job(job)["Restarts"]) == ("RUNNING", "0")


def test_requeued_foreground_run_goes_on_with_its_attempt(cluster: LabDoor, lab: Lab, store: str) -> None:
    words = [sys.executable, "-m", "hpc_imagenet", "model=squeezenet1_1", store, "cluster=foreground"]
    words += with_defaults(SMALL, ["recipe.epochs=50"])
    inner = f"cd / && export HPC_IMAGENET_WORKSPACE={cluster.workspace}; {shlex.join(words)}"
    job = lab.sbatch(inner, "--cpus-per-task=2", "--requeue")
    eventually(lambda: bool(cluster.runs()) and bool(cluster.jobs()[0]["progress"].get("done")), 240)
    lab.scontrol("requeue", job)
    log = cluster.workspace / "runs" / cluster.runs()[0] / "attempts/1" / f"{job}_0_log.out"
    eventually(lambda: log.read_text().count("device: ") == 2, 240)  # both starts write into it
    cluster("cancel", cluster.runs()[0])
    (found,) = json.loads(cluster("show", cluster.runs()[0], "--json").stdout)["attempts"]
    assert (found["state"], found["requeued"], found["job"]) == ("cancelled", 1, job)


def test_cpus_per_task_of_a_stage_reach_the_task(cluster: LabDoor, lab: Lab, store: str) -> None:
    cores = cluster.workspace.parent / "cores"
    # The setup comes before what the script sets for srun: look when the job calls srun.
    look = f'srun() {{ echo $SRUN_CPUS_PER_TASK >> {cores}; command srun "$@"; }}'
    setup = f"cluster.setup=['{look}']"
    cluster("+stage=download", "dataset=digits", "cluster.stage.download.cpus_per_task=3", setup)
    wait_for(cluster, "finished")
    assert set(cores.read_text().split()) == {"3"}
    assert (
        "cpus-per-task=3"
        in cluster(
            "+stage=process", "dataset=digits", "cluster.stage.process.cpus_per_task=3", "dry_run=true"
        ).stdout
    )


def test_states_and_their_reasons(cluster: LabDoor, lab: Lab) -> None:
    words = ("+stage=download", "dataset=ilsvrc", "dataset.source=/nowhere")
    cluster(*words, "dataset.name=delayed", "+cluster.sbatch.begin=now+1hour")
    cluster(*words, "dataset.name=broken", "cluster.setup=[exit 3]")
    cluster(*words, "dataset.name=lost", "cluster.setup=['kill -9 $$']")
    cluster(*words, "dataset.name=impossible")
    cluster(*words, "dataset.name=scancelled", "+cluster.sbatch.hold=true")
    lab.slurm("scancel", job_id(cluster.jobs()[-1]))
    rows = wait_for(cluster, "queued", "failed", "failed", "failed", "cancelled")
    assert rows[0]["reason"] == "BeginTime"
    assert rows[1]["reason"] == "Slurm: failed (exit code 3:0)"
    assert rows[2]["reason"] == "Slurm: failed (exit code 0:9)"
    assert "/nowhere" in rows[3]["reason"]
    assert rows[4]["reason"] == "Slurm: cancelled"
    # Without squeue and sacct the states are as last recorded, which the reason mentions.
    path = cluster.env["PATH"]
    cluster.env["PATH"] = "/usr/bin/nowhere"
    recorded = cluster.jobs()
    assert [row["state"] for row in recorded] == ["queued", "queued", "queued", "failed", "queued"]
    assert "no Slurm commands here" in recorded[0]["reason"]
    cluster.env["PATH"] = path


def test_job_unknown_to_squeue_is_looked_up_in_sacct(cluster: LabDoor, lab: Lab) -> None:
    words = ("+stage=download", "dataset=ilsvrc", "dataset.name=x", "dataset.source=/nowhere")
    cluster(*words, "cluster.setup=[exit 3]")
    wait_for(cluster, "failed")
    stubs = cluster.workspace.parent / "stubs"
    stubs.mkdir()
    (stubs / "squeue").write_text("#!/bin/sh\nexit 0\n")
    (stubs / "squeue").chmod(0o755)
    cluster.env["PATH"] = f"{stubs}:{cluster.env['PATH']}"
    eventually(lambda: cluster.jobs()[0]["reason"] == "Slurm: failed (exit code 3:0)")


def test_dry_run_prints_the_expected_start(cluster: LabDoor) -> None:
    done = cluster("+stage=pipeline", "dataset=digits", "cluster.partition=low", "dry_run=true")
    assert (
        len(re.findall(r"sbatch --test-only: Job \d+ to start at \S+ using \d+ processors", done.stdout)) == 4
    )
    done = cluster("+stage=download", "dataset=digits", "cluster.partition=nowhere", "dry_run=true")
    assert "invalid partition specified: nowhere" in done.stdout
    assert not cluster.workspace.exists()


def test_unknown_partition_is_a_one_line_error(cluster: LabDoor) -> None:
    error = cluster("+stage=download", "dataset=digits", "cluster.partition=nowhere", code=2).stderr
    assert error.splitlines() == [
        "error: sbatch refused download-digits: " + error.partition("download-digits: ")[2].strip()
    ]
    assert "nowhere" in error


def test_job_of_a_killed_submission_records_its_own_job_id(cluster: LabDoor, lab: Lab) -> None:
    """If the command dies between sbatch and submitted.json, the job writes submitted.json itself."""
    cluster("+stage=download", "dataset=digits", "+cluster.sbatch.hold=true")
    (row,) = cluster.jobs()
    job, submitted = job_id(row), Path(row["dir"]) / "attempts/1/submitted.json"
    submitted.unlink()
    lab.scontrol("release", job)
    wait_for(cluster, "finished")
    assert (read_json(submitted) or {}).get("executor") == "slurm"
    assert job_id(row) == job


def test_requeue_beyond_max_requeues_fails(cluster: LabDoor, lab: Lab, store: str) -> None:
    words = with_defaults(SMALL, ["recipe.epochs=50", "cluster.max_requeues=0"])
    cluster("model=squeezenet1_1", store, *words)
    (row,) = cluster.jobs()
    eventually(lambda: bool(cluster.jobs()[0]["progress"].get("done")), 240)
    lab.scontrol("requeue", job_id(row))
    (row,) = wait_for(cluster, "failed")
    assert "cluster.max_requeues=0" in row["reason"]
    assert row["requeued"] == 1


def test_templates_are_accepted_by_sbatch_test_only(lab: Lab) -> None:
    for stage in ("download", "process", "upload", "train", "sweep"):
        done = subprocess.run(
            ["sbatch", "--test-only", str(ROOT / f"slurm/{stage}.sbatch")],
            env=lab.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (stage, done.stderr)
        assert "to start at" in done.stderr, stage


def test_pipeline_template_chains_all_stages(cluster: LabDoor, lab: Lab) -> None:
    """slurm/pipeline.sh chains the stage templates; the final sweep is an array over the models."""
    env = {**cluster.env, "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}"}
    settings = ("dataset=digits", "model=squeezenet1_1,mobilenet_v3_small", "recipe.epochs=1")
    done = subprocess.run(
        [ROOT / "slurm/pipeline.sh", *settings, "cluster.gpus_per_node=0"],
        env=env,
        cwd=cluster.cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    eventually(lambda: cluster.states() == ["finished"] * 5, 400)
    rows = cluster.jobs()
    assert [row["stage"] for row in rows] == ["download", "process", "upload", "train", "train"]
    assert {row["model"] for row in rows[3:]} == {"squeezenet1_1", "mobilenet_v3_small"}
    assert (
        "no model for array task 7"
        in subprocess.run(
            ["bash", ROOT / "slurm/sweep.sbatch", *settings],
            env={**env, "SLURM_ARRAY_TASK_ID": "7"},
            cwd=cluster.cwd,
            capture_output=True,
            text=True,
            check=False,
        ).stderr
    )


def test_out_of_memory_fails_with_the_setting_and_no_requeue(tmp_path: Path, site: LabDoor) -> None:
    """On a lab that enforces memory limits, which needs root and cgroups v1."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        lab = Lab(folder, options=("--memory",))
        cli = LabDoor(tmp_path / "workspace", lab)
        cli.without_forks()  # their memory would not count
        url = f"datastore.url={site.workspace}/datastores"
        cli("model=squeezenet1_1", *SMALL, url, "cluster.memory_gb=0.25")
        greedy = f"exec {sys.executable} -c 'bytearray(400_000_000)'"
        job, step = lab.sbatch(greedy, "--mem=100M"), lab.sbatch(f"srun {greedy[5:]}", "--mem=100M")
        (row,) = wait_for(cli, "failed")
        assert row["reason"].startswith("out of host memory: raise cluster.memory_gb")
        assert row["requeued"] == 0
        eventually(lambda: lab.final_state(job) == "OUT_OF_MEMORY")
        eventually(lambda: lab.final_state(step) not in ("", "PENDING", "RUNNING"))
        steps = lab.slurm("sacct", "--noheader", f"--jobs={step}.0", "--format=State%30")
        assert steps.strip() == "OUT_OF_MEMORY"  # Slurm reports the job itself as FAILED
        cli.close()
        lab.command("down")
        assert not list(Path("/sys/fs/cgroup/memory").glob("slurm_n*"))
    finally:
        subprocess.run([LAB, "--dir", folder, "down"], check=False)
        shutil.rmtree(folder, ignore_errors=True)
