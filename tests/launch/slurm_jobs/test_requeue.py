"""Requeue or fail after srun, by its exit code and error log, with stub Slurm commands."""

from __future__ import annotations

import errno
import functools
import json
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command
from recorded_runs import set_times

from hpc_imagenet.config.compose import compose
from hpc_imagenet.errors import EXIT_REQUEUE
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.retries.diagnosis import DEVICE_MEMORY, diagnose
from hpc_imagenet.launch.slurm_jobs import requeue
from hpc_imagenet.runs import attempt as attempts
from hpc_imagenet.runs import job as jobs
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import FAILED, FINISHED, Attempt, record_time
from hpc_imagenet.runs.store import Run, RunStore


class Job:
    """A job whose srun has just ended."""

    def __init__(self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run, self.monkeypatch = folder, run, monkeypatch
        assert run.attempt is not None
        self.attempt: Attempt = run.attempt
        write_command(folder, "squeue", "echo RUNNING")
        write_command(folder, "scontrol", f'echo "$@" >> {folder}/requeued')

    def end(self, code: int, errors: str = "", restarts: int = 0) -> int:
        """Return the exit code of the job's script after srun ended with `code` and wrote `errors`."""
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        lease.acquire(self.run.folder, 1)
        self.attempt.start()
        (self.attempt.folder / "5_0_log.err").write_text(errors)
        return requeue.requeue_or_fail([(self.run, self.attempt)], code)

    @property
    def requeued(self) -> str:
        path = self.folder / "requeued"
        return path.read_text() if path.exists() else ""

    @property
    def reason(self) -> str:
        assert self.attempt.outcome is not None
        return self.attempt.outcome.reason


@functools.cache
def planned() -> jobs.Job:
    (job,) = make_plan(
        compose(["+stage=download", "dataset=digits", "cluster=slurm", "cluster.max_requeues=3"]),
        lambda _: None,
    )
    return job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    info = {"stage": planned().stage, "label": planned().label, "needs": []}
    run = RunStore(tmp_path / "jobs").create(planned().run_id, planned().frozen(), info)
    run.new_attempt()
    return Job(folder, run, monkeypatch)


@pytest.mark.parametrize(
    ("code", "errors"),
    [
        (137, ""),  # kill -9
        (143, ""),
        (134, "NCCL watchdog"),  # SIGABRT, at a lost peer
        (135, ""),  # SIGBUS, at a lost file server
        (128 + 12, ""),  # SIGUSR2 before the time limit, in a stage without a handler
        (EXIT_REQUEUE, "stopped by SIGUSR2 after step 7, which is saved"),
        (1, "srun: error: Task launch for StepId=5.0 failed on node n2: Communication connection failure"),
        (1, "srun: error: Node failure on n2"),
    ],
)
def test_transient_failure_requeues_the_job(job: Job, code: int, errors: str) -> None:
    assert job.end(code, errors) == EXIT_REQUEUE
    assert job.requeued == "requeue 5\n"
    assert job.attempt.outcome is None


@pytest.mark.parametrize(
    ("code", "errors", "reason"),
    [
        (1, "Traceback\nModuleNotFoundError: No module named 'hpc_imagenet'", "No module named"),
        (127, "srun: error: n1: task 0: Exited with exit code 127\nbash: python: not found", "127"),
        (127, "sh: module: command not found\nsrun: error: n1: task 0: Exited", "module: command not found"),
        (1, "libx: error: no such device\nsrun: error: n1: task 0: Exited", "libx: error: no such device"),
        (2, "", "error log is empty"),
        (139, "srun: error: n1: task 0: Segmentation fault", "SIGSEGV"),
        (132, "", "SIGILL"),
        (136, "", "SIGFPE"),
        (137, "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.", "then run the command again"),
        (1, "slurmstepd: error: task 0 was Out Of Memory", "cluster.memory_gb"),
        (134, "Cuda failure 2 'out of memory'", "out of device memory: set a larger train.accumulate"),
        (
            EXIT_REQUEUE,
            "this task did not exit within 60 s of an error, so it is terminated (CUDA out of memory)",
            "out of device memory: set a larger train.accumulate",
        ),
        (
            EXIT_REQUEUE,
            "this task did not exit within 60 s of an error, so it is terminated (out of host memory: x)",
            "out of host memory: raise cluster.memory_gb",
        ),
        (137, "CUDA out of memory\nslurmstepd: error: Detected 1 oom_kill event", "cluster.memory_gb"),
    ],
)
def test_permanent_failure_writes_an_outcome_with_the_reason(
    job: Job, code: int, errors: str, reason: str
) -> None:
    assert job.end(code, errors) == 1
    assert job.requeued == ""
    assert reason in job.reason
    assert "\n" not in job.reason


def test_device_memory_of_another_rank_fails_the_job(job: Job) -> None:
    other = job.attempt.folder / "5_3_log.err"
    end = "this task did not exit within 60 s of an error, so it is terminated"
    other.write_text(f"{end} (Connection closed by peer)")
    assert job.end(EXIT_REQUEUE, "lost another task of this job") == EXIT_REQUEUE
    other.write_text(f"{end} (CUDA out of memory)")
    assert job.end(EXIT_REQUEUE, "lost another task of this job") == 1
    assert job.reason.startswith("out of device memory: ")
    diagnosis = diagnose(job.run, job.attempt)
    assert diagnosis
    assert diagnosis.kind == DEVICE_MEMORY


def test_a_log_that_cannot_be_read_does_not_prevent_a_requeue(job: Job) -> None:
    def stale(path: Path, begin: int = 0) -> list[str]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    for module in (requeue, attempts):
        job.monkeypatch.setattr(module, "last_lines", stale)
    assert job.end(137) == EXIT_REQUEUE
    assert job.requeued == "requeue 5\n"


def test_lines_of_an_earlier_start_in_an_allocation_do_not_fail_a_later_one(job: Job) -> None:
    job.end(137)
    end = "this task did not exit within 60 s of an error, so it is terminated (CUDA out of memory)\n"
    log, other = (job.attempt.folder / f"5_{rank}_log.err" for rank in (0, 3))
    for path in (log, other):
        path.write_text(end)
    both = [(job.run, job.attempt)]
    assert requeue.requeue_or_fail(both, EXIT_REQUEUE, log, begin=len(end)) == EXIT_REQUEUE
    assert requeue.requeue_or_fail(both, EXIT_REQUEUE, log) == 1


def test_finished_outcome_is_kept_and_not_requeued(job: Job) -> None:
    job.attempt.end(FINISHED, result={})
    assert job.end(137) == 0
    assert job.requeued == ""


def test_failed_outcome_gives_exit_code_1_for_afterok(job: Job) -> None:
    job.attempt.end("failed", "why")
    assert job.end(0) == 1


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED"])
def test_job_not_running_according_to_slurm_is_left_to_slurm(job: Job, state: str) -> None:
    write_command(job.folder, "squeue", f"echo {state}")
    assert job.end(143) == EXIT_REQUEUE
    assert job.requeued == ""
    assert job.attempt.outcome is None


def test_job_fails_after_max_requeues(job: Job) -> None:
    assert job.end(137, restarts=3) == 1
    assert "cluster.max_requeues=3 is used up" in job.reason
    assert "SIGKILL" in job.reason


def test_refused_requeue_fails_with_slurms_error(job: Job) -> None:
    write_command(job.folder, "scontrol", "echo 'Requested operation not supported' >&2; exit 1")
    assert job.end(137) == 1
    assert "not supported" in job.reason


def test_superseded_copy_neither_requeues_nor_fails(job: Job) -> None:
    job.attempt.start()
    job.monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lease.acquire(job.run.folder, 1)
    job.monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert requeue.requeue_or_fail([(job.run, job.attempt)], 137) == EXIT_REQUEUE
    assert job.requeued == ""
    assert job.attempt.outcome is None


def test_restart_that_ends_before_its_task_takes_the_lease_is_no_old_copy(job: Job) -> None:
    job.end(143)
    job.monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    log = job.attempt.folder / "5_0_log.err"
    log.write_text("srun: error: Task launch for StepId=5.0 failed on node n2: Communication failure")
    assert requeue.requeue_or_fail([(job.run, job.attempt)], 1) == EXIT_REQUEUE
    assert job.requeued == "requeue 5\n" * 2
    log.write_text("bash: python: command not found")
    assert requeue.requeue_or_fail([(job.run, job.attempt)], 127) == 1
    assert "exit code 127" in job.reason
    assert job.attempt.outcome
    assert job.attempt.outcome.time == job.attempt.started["time"]  # in the queue since then


@pytest.mark.slow
def test_run_and_attempt_are_read_from_submitits_pickle(cli: Cli, job: Job) -> None:
    write_command(job.folder, "sbatch", "echo Submitted batch job 5")
    write_command(job.folder, "srun", "true")
    cli.env["PATH"] = f"{job.folder}:{cli.env['PATH']}"
    cli("+stage=download", "dataset=digits", "cluster=slurm")
    (run,) = RunStore(cli.workspace).all()
    assert run.attempt is not None
    ((found, attempt),) = requeue._attempts(run.attempt.folder)
    assert (found.id, attempt.number) == (run.id, 1)


def test_runs_that_share_a_loader_are_requeued_together_unless_they_have_ended(
    job: Job, tmp_path: Path
) -> None:
    """Srun and Slurm write into the log of the job, not into those of the runs."""
    other = RunStore(tmp_path / "other").create("0-other", planned().frozen(), {})
    attempt = other.new_attempt()
    attempt.end(FAILED, "its own reason")
    both = [(other, attempt), (job.run, job.attempt)]
    lease.acquire(job.run.folder, 1)
    job.attempt.start()
    assert requeue.requeue_or_fail(both, EXIT_REQUEUE) == EXIT_REQUEUE
    assert job.requeued
    assert job.attempt.outcome is None
    log = tmp_path / "job.err"
    log.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.\n")
    assert requeue.requeue_or_fail(both, 137, log) == 1
    assert "out of host memory" in job.reason
    assert attempt.outcome
    assert attempt.outcome.reason == "its own reason"
    assert requeue.requeue_or_fail(both, 0) == 1


@pytest.mark.slow
def test_a_requeued_job_that_is_cancelled_in_the_queue_has_the_hours_that_it_ran(
    cluster: Cli, commands: Path
) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=slurm")
    (run,) = RunStore(cluster.workspace).all()
    assert run.attempt
    run.attempt.start()
    set_times(run, submitted=timedelta(hours=77), started=timedelta(hours=76))
    stopped = record_time(datetime.now(timezone.utc) - timedelta(hours=72))
    write_json(run.folder / "progress.json", {"done": 1, "time": stopped})
    (commands / "queue").write_text("1|PENDING|1|0|None\n")
    cluster("cancel", run.id)
    assert (commands / "cancelled").read_text() == "1\n"
    (found,) = json.loads(cluster("show", run.id, "--json").stdout)["attempts"]
    assert (found["state"], round(found["resources"]["hours"], 1)) == ("cancelled", 4)
