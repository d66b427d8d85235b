"""Classes of failure: of jobs that really fail in the local queue, of Slurm's states, and of hostile logs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Cli, eventually

from hpc_imagenet.launch.retries.diagnosis import Diagnosis, diagnose, failure_class, failure_words
from hpc_imagenet.launch.retries.error_logs import ErrorLogs, error_logs
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED
from hpc_imagenet.runs.store import Run, RunStore

TESTS = Path(__file__).resolve().parents[2]


def found(cli: Cli, name: str) -> Diagnosis:
    """Return the diagnosis of the newest attempt of a run."""
    diagnosis = diagnose(RunStore(cli.workspace).find(name))
    assert diagnosis is not None
    return diagnosis


@pytest.mark.slow
def test_jobs_that_fail_in_the_local_queue(cli: Cli) -> None:
    """Each in its own process, by a function of failing.py."""
    cli.env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    classes = {
        "bug": ("bug", "bug: RuntimeError: an unexpected value  of <b>4</b> (_make_source in download.py:"),
        "memory": ("host_memory", "out of host memory: MemoryError"),
        "full": ("disk_full", f"no space left in {cli.workspace}"),
        "missing": ("missing_file", "labels.csv"),
        "module": ("environment", "No module named 'a_module_that_is_not_installed'"),
        "killed": ("killed", "ended without an outcome"),
        "crash": ("crash", "Segmentation fault"),
    }
    cli(
        *("-m", "+stage=download", "dataset=ilsvrc", "cluster=local", "cluster.parallel=2"),
        *(f"dataset.source={cli.cwd}/${{dataset.name}}", "dataset.make=failing:${dataset.name}"),
        f"dataset.name={','.join(classes)}",
    )
    kinds = [kind for kind, _ in classes.values()]
    # The state is known a moment before the worker has read the log and written the outcome.
    eventually(lambda: [row["failure"] for row in cli.jobs()] == kinds, 120)
    rows = cli.jobs()
    table = cli("jobs").stdout
    for row, (name, (kind, text)) in zip(rows, classes.items(), strict=True):
        diagnosis = found(cli, f"download-{name}")
        assert diagnosis.kind == kind
        assert text in diagnosis.text
        assert diagnosis.text in cli("logs", row["run"]).stderr
    assert "bug: RuntimeError" in table
    assert "\x1b" not in table + cli("logs", "download-bug").stdout
    assert "in failing.py:" in found(cli, "download-bug").text


@pytest.mark.slow
def test_trainings_that_fail_in_the_local_queue(cli: Cli) -> None:
    for stage in ("download", "process", "upload"):
        cli(f"+stage={stage}", "dataset=digits", "cluster=foreground")
    model = ("dataset=digits", "model=squeezenet1_1", "cluster=local", "cluster.gpus_per_node=0")
    cli(*model, "recipe.learning_rate=1e30")
    cli(*model, "seed=1", "cluster.tasks_per_node=2", "recipe.epochs=1000")
    store = RunStore(cli.workspace)
    *_, diverging, shared = store.all()
    eventually(lambda: "epoch" in str(shared.progress.get("note")))
    _kill_rank(shared, 1)
    eventually(lambda: shared.attempt is not None and shared.attempt.outcome is not None, 240)
    shard = cli.workspace / "datastores/digits/v1/shards/ILSVRC2012_img_train.tar"
    _damage_images(shard)
    cli(*model, "seed=2")
    damaged = store.all()[-1]
    eventually(lambda: cli.jobs()[-1]["state"] == "failed")
    shard.unlink()
    cli(*model, "seed=3")
    bare = store.all()[-1]
    eventually(lambda: cli.jobs()[-1]["state"] == "failed")
    kinds = [row["failure"] for row in cli.jobs() if row["state"] == "failed"]
    assert kinds == ["not_finite", "peer_lost", "bad_data", "missing_file"]
    nan, lost, bad, missing = map(diagnose, (diverging, shared, damaged, bare))
    assert nan
    assert lost
    assert bad
    assert missing
    assert "images of this step: n9" in nan.text
    assert "rank 1 failed first" in lost.text
    assert "image n9" in bad.text
    assert bad.command.endswith("loader.on_corrupt=skip")
    assert shard.name in missing.text


def _kill_rank(run: Run, rank: int) -> None:
    """Kill one task of a running job."""
    for process in psutil.process_iter():
        try:
            environment = process.environ() if str(run.folder) in " ".join(process.cmdline()) else {}
        except psutil.Error:
            continue
        if environment.get("SUBMITIT_LOCAL_GLOBALID") == str(rank):
            process.send_signal(signal.SIGKILL)


def _damage_images(shard: Path) -> None:
    """Overwrite the headers of all JPEGs in a tar, as a failing disk does: its time stays the same."""
    modified = shard.stat().st_mtime_ns
    content = bytearray(shard.read_bytes())
    begin = 0
    while (begin := content.find(b"\xff\xd8\xff", begin)) >= 0:
        content[begin : begin + 200] = bytes(200)
    shard.write_bytes(content)
    os.utime(shard, ns=(modified, modified))


def end_job(cluster: Cli, row: str, errors: str = "", rank: int = 0) -> None:
    """Set squeue's row of job 1, and what a task has written to stderr."""
    (cluster.cwd / "slurm/queue").write_text(f"1|{row}\n")
    (run,) = RunStore(cluster.workspace).all()
    assert run.attempt
    (run.attempt.folder / f"1_{rank}_log.err").write_text(errors)


SUBMIT = ("+stage=download", "dataset=digits", "cluster=slurm", "cluster.time=60", "cluster.memory_gb=4")
MEMORY, TIME = {"cluster.memory_gb": 6}, {"cluster.time": 120}  # remedies
NODE = {"cluster.sbatch.exclude": "n3"}
SRUN = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 75\n"
PEER = "lost another task of this job: [gloo/transport/tcp/pair.cc:538] Connection reset by peer\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "errors", "kind", "remedy"),
    [
        ("OUT_OF_MEMORY|0|125|None", "", "host_memory", MEMORY),
        ("FAILED|0|256|None", "slurmstepd: error: Detected 1 oom_kill event", "host_memory", MEMORY),
        ("TIMEOUT|0|0|None", "", "time_limit", TIME),
        ("FAILED|0|15|None", "slurmstepd: error: *** CANCELLED DUE TO TIME LIMIT ***", "time_limit", TIME),
        ("NODE_FAIL|0|0|None", "slurmstepd: error: * CANCELLED DUE TO NODE n3 FAILURE", "node_failure", NODE),
        ("PREEMPTED|0|0|None", "", "requeued_too_often", {}),
        ("FAILED|0|256|None", "Traceback\n  File \"a.py\", line 3, in f\nValueError: no", "bug", {}),
        ("FAILED|0|256|None", "bash: line 1: module: command not found", "environment", {}),
        ("FAILED|0|32512|None", "/usr/bin/python3: No module named hpc_imagenet", "environment", {}),
        ("CANCELLED|0|0|None", "", "cancelled", {}),
        ("COMPLETED|0|0|None", "", "unknown", {}),
    ],
)  # fmt: skip
def test_jobs_that_slurm_ends(
    cluster: Cli, row: str, errors: str, kind: str, remedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(*SUBMIT)
    end_job(cluster, row, errors)
    monkeypatch.setenv("PATH", cluster.env["PATH"])
    diagnosis = found(cluster, "download-digits")
    assert (diagnosis.kind, diagnosis.remedy) == (kind, remedy)
    assert "\n" not in diagnosis.text


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("requeued 11 times, more than cluster.max_requeues=10: retry resumes it", "requeued_too_often"),
        ("a task was ended by SIGKILL, and cluster.max_requeues=3 is used up", "requeued_too_often"),
        ("srun lost a node, and cluster.max_requeues=3 is used up: retry resumes it", "node_failure"),
        ("out of memory at step 3: 64 images at a time are too many for NVIDIA A100: …", "device_memory"),
        ("out of memory at step 3: 64 images at a time are too many for this machine: …", "host_memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "device_memory"),
        ("exit code 139 (SIGSEGV: the program crashed) without an outcome; last error line: none", "crash"),
        ("out of host memory: raise cluster.memory_gb, or lower loader.workers, then run …", "host_memory"),
        ("[Errno 122] Disk quota exceeded: '/home/me/x'", "disk_full"),
        ("ImportError: libcudart.so.12: cannot open shared object file", "environment"),
        ("cluster.gpus_per_node=1, but torch 2.4 sees no GPU on this node", "environment"),
        ("torch 2.11 cannot use the GPU of this node (Error 802: …): install a torch build …", "environment"),
        ("torch 2.11 has no kernels for Tesla V100 (it has sm_75 sm_80): install another …", "environment"),
        ("NCCL cannot connect the GPUs of this job: Duplicate GPU detected : rank 1 and …", "environment"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12040). …", "environment"),
        ("RuntimeError: Found no NVIDIA driver on your system. Please check …", "environment"),
        ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you …", "environment"),
        ("torch.AcceleratorError: CUDA error: no kernel image is available for …", "environment"),
        ("torch.AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy …", "environment"),
        ("RuntimeError: No HIP GPUs are available", "environment"),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970", "peer_lost"),
        ("stopped near its time limit or by a preemption (SIGUSR2), but Slurm refused …", "time_limit"),
        ("a task was ended by SIGKILL, but Slurm refused to requeue the job (…): …", "killed"),
        ("outcome.json of this attempt is damaged: retry resumes it", "unknown"),
        ("https://x.org/a.tar: HTTP 503", "input"),
        ("", "input"),
    ],
)
def test_class_of_a_reason(reason: str, kind: str) -> None:
    assert failure_class(FAILED, reason) == kind
    assert failure_class(FINISHED, reason) == ""
    assert failure_class(CANCELLED, reason) == "cancelled"
    assert failure_words("cancelled", reason) == failure_words("", reason) == ""


def test_task_that_failed_first() -> None:
    def first(*logs: str) -> str:
        return str(ErrorLogs({rank: text.splitlines() for rank, text in enumerate(logs)}).first_failure())

    assert first(PEER, "") == "rank 1 failed first: it ended without an error line"
    assert first(PEER, "Traceback (most recent call last):\nValueError: no\n", PEER) == (
        "rank 1 failed first: ValueError: no"
    )
    assert first(PEER + SRUN, "") == "rank 1 on n2 failed first: Killed"
    assert first(PEER + SRUN, "MemoryError\n") == "rank 1 on n2 failed first: MemoryError"
    assert first(PEER, PEER) == first("ValueError: no") == "None"


def test_last_error_of_a_log() -> None:
    def last(text: str) -> str:
        return ErrorLogs({0: text.splitlines()}).last_error()

    cuda = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nRuntimeError: CUDA error: x\n'
    assert last(f"{cuda}Compile with `TORCH_USE_CUDA_DSA`.\n\n") == "RuntimeError: CUDA error: x"
    assert last("ConnectionError: survived\nstill working\n") == ""
    assert (
        last("ValueError: \x1b[31mred\x1b[0m\x07 \u202eabc\nsrun: error: n1: task 0: Exited\n")
        == "ValueError: red abc"
    )
    assert len(last("ValueError: " + "x" * 10_000)) == 200
    assert last("error: model.name=x is unknown\n") == "model.name=x is unknown"
    assert last("INFO: a\nFATAL: container creation failed: x\n") == "FATAL: container creation failed: x"
    assert last("what is this\n") == last("") == ErrorLogs({0: []}).last_line() == ""
    assert ErrorLogs({0: ["a", "what is this"], 1: []}).last_line() == "what is this"


def test_lines_of_torch_before_which_the_rank_is(tmp_path: Path) -> None:
    attempt = RunStore(tmp_path).create("00000000-x", {}, {"stage": "train"}).new_attempt()
    for rank in (0, 1):
        lines = (
            "Traceback (most recent call last):",
            '  File "a.py", line 3, in fit',
            "ValueError: x",
            "of y",
        )
        text = "".join(f"[rank{rank}]: {line}\n" for line in lines)
        (attempt.folder / f"7_{rank}_log.err").write_text(text)
    logs = error_logs(attempt)
    assert (logs.last_error(), logs.last_frames()) == ("ValueError: x", "fit in a.py:3")


@pytest.mark.slow
def test_failure_of_damaged_records(cluster: Cli) -> None:
    cluster(*SUBMIT)
    (run,) = RunStore(cluster.workspace).all()
    assert run.attempt
    (run.folder / "config.yaml").write_bytes(b"\xff{")
    (run.attempt.folder / "outcome.json").write_text('{"state": "fail')
    assert found(cluster, "download-digits").remedy == {}
    (run.attempt.folder / "outcome.json").write_text(
        json.dumps({"state": "failed", "reason": "</script>\x1b]0;title\x07\nMemoryError"})
    )
    diagnosis = found(cluster, "download-digits")
    assert (diagnosis.kind, diagnosis.text) == ("host_memory", "out of host memory: </script> MemoryError")
