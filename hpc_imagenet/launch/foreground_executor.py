"""The executor `foreground`: run jobs one after another and wait, with srun inside a Slurm allocation.

An attempt inside an allocation is recorded as one of Slurm, which knows its state.
"""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.launch.executor import Executor, State, code_version
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.slurm_jobs import requeue
from hpc_imagenet.launch.slurm_jobs.container import (
    PACKAGE_ROOT,
    bound_folders,
    check_container,
    container_command,
)
from hpc_imagenet.launch.slurm_jobs.slurm_executor import SlurmExecutor
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.runs.attempt import CANCELLED, FINISHED, Attempt
from hpc_imagenet.runs.store import Run, RunStore


class ForegroundExecutor(Executor):
    """Run attempts as children of this process."""

    name = "foreground"
    in_background = False

    def check_settings(self, stage: str, cluster: Cluster) -> None:
        """Raise for a container without an image or a runtime."""
        check_container(cluster)

    def submit(
        self, store: RunStore, attempts: Sequence[tuple[Run, Attempt]], state_of: Mapping[str, State]
    ) -> None:
        """Run the attempts one after another and wait; after a failure the others are cancelled."""
        from hpc_imagenet.launch.shared_jobs import group_attempts, shares_with  # imports the stages

        allocation, failed = slurm.this_job(), ""
        if allocation:
            # At a preemption srun forwards SIGTERM and this process waits for the tasks to save. A handler,
            # not SIG_IGN, which the tasks would inherit.
            signal.signal(signal.SIGTERM, lambda *_: None)
        environment = local_queue.job_environment()
        if allocation and "SLURM_CPUS_PER_TASK" in environment:
            # Since 22.05 srun does not inherit --cpus-per-task from sbatch: a task would get one CPU.
            environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
        for job in group_attempts(attempts):
            if failed:
                for _, attempt in job:
                    attempt.end(CANCELLED, f"not started, because {failed} before it failed")
                continue
            module = "task" if len(job) == 1 else "shared_task"
            words = [word for run, attempt in job for word in (str(run.folder), str(attempt.number))]
            task = ["-u", "-m", f"hpc_imagenet.launch.tasks.{module}", *words]
            command = [sys.executable, *task]
            log = None
            for run, attempt in job:
                details = {"code": code_version(), **shares_with([run.id for run, _ in job], run.id)}
                if allocation:
                    attempt.submit(SlurmExecutor.name, job_id=allocation, logs=str(attempt.folder), **details)
                else:
                    attempt.submit(self.name, host=socket.gethostname(), **details)
                    local_queue.record_process(attempt)
            if allocation:
                log = _log_folder(store, job) / f"{allocation}_0_log.err"
                srun = ["srun", *_srun_arguments(job[0][0], f"{log.parent}/{allocation}_%t_log")]
                command = [*srun, *command]
                if job[0][0].cluster().container:
                    command = _in_container(job[0][0], srun, task)
                    environment["PYTHONPATH"] = str(PACKAGE_ROOT)
            code = run_job(command, environment)
            if allocation:
                requeue.requeue_or_fail(job, code, log)
            for run, attempt in job:
                notification.run_ended(run, attempt)
                outcome = attempt.outcome
                if outcome is None or outcome.state != FINISHED:
                    failed = run.id

    def states(self, attempts: Mapping[str, Attempt], since: float | None) -> dict[str, State]:
        """Return the states of attempts by their processes."""
        return {key: local_queue.state_of_process(attempt) for key, attempt in attempts.items()}

    def cancel(self, run: Run, attempt: Attempt, reason: str) -> None:
        """Write the outcome and end the processes of the attempt."""
        local_queue.cancel_here(run, attempt, reason)


def run_job(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command of a job, wait, and return its exit code."""
    return subprocess.run(command, env=environment, cwd="/", check=False).returncode


def _in_container(run: Run, srun: Sequence[str], task: Sequence[str]) -> list[str]:
    """Return the command that starts the tasks of a run in its container; a shell expands its variables."""
    config = run.own_config()
    start = container_command(run.cluster(), bound_folders(config))
    words = [shlex.join([*srun, *start.srun_args]), start.python, shlex.join(task)]
    return ["sh", "-c", f"exec {' '.join(words)}"]


def _log_folder(store: RunStore, job: Sequence[tuple[Run, Attempt]]) -> Path:
    """Return the folder of srun's logs; runs that share a loader have their own, beside those of the job."""
    if len(job) == 1:
        return job[0][1].folder
    return store.make_own_folder("shared", str(time.time_ns()))


def _srun_arguments(run: Run, log: str) -> list[str]:
    from hpc_imagenet.stages import STAGES  # here, so that commands which query states do not import it

    arguments = ["--kill-on-bad-exit=1", f"--output={log}.out", f"--error={log}.err"]
    if run.info.get("shares_loader") or not STAGES[run.info["stage"]].distributed:
        arguments += ["--nodes=1", "--ntasks=1"]  # one process, whatever the size of the allocation
    return [*arguments, *run.cluster().srun]
