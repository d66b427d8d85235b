"""The executor `foreground`: run jobs one after another and wait, with srun inside a Slurm allocation.

An attempt inside an allocation is recorded as one of Slurm, which knows its state.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import EXIT_REQUEUE, UserError
from hpc_imagenet.launch.executor import Executor, State, code_version, override_of, setting_name
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
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED, Attempt
from hpc_imagenet.runs.store import Run, RunStore

Job = Sequence[tuple[Run, Attempt]]  # one attempt, or those that share a loader
_SIGNALS = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGQUIT: "SIGQUIT",
    signal.SIGHUP: "SIGHUP, as of a closed terminal",
    signal.SIGTERM: "SIGTERM",
}


class ForegroundExecutor(Executor):
    """Run attempts as children of this process."""

    name = "foreground"
    in_background = False

    def check_settings(self, stage: str, cluster: Cluster, shares_loader: bool = False) -> None:
        """Raise for a container without an image or a runtime, and for processes that nothing would start."""
        from hpc_imagenet.stages import STAGES  # here, so that commands which query states do not import it

        check_container(cluster)
        if STAGES[stage].distributed and not shares_loader and not slurm.this_job():
            for name in ("nodes", "tasks_per_node", "gpus_per_node"):
                if (value := getattr(cluster, name) or 1) > 1:
                    other = "slurm" if name == "nodes" else "local"
                    setting = setting_name(cluster, stage, name)
                    raise UserError(
                        f"{setting}={value}: outside of a Slurm allocation, cluster=foreground runs {stage} "
                        f"as one process, on one GPU: set cluster={other}, or {override_of(setting, 1)}"
                    )

    def submit(
        self, store: RunStore, attempts: Sequence[tuple[Run, Attempt]], state_of: Mapping[str, State]
    ) -> None:
        """Run the attempts one after another and wait; after a failure the others are cancelled.

        Raises:
            KeyboardInterrupt: Ctrl-C, or a signal that ends this process; all attempts have ended.
        """
        from hpc_imagenet.launch.shared_jobs import group_attempts, shares_with  # imports the stages

        allocation, jobs = slurm.this_job(), group_attempts(attempts)
        started: list[tuple[subprocess.Popen[bytes], Job]] = []
        with _interrupted_by_signals(in_allocation=allocation is not None):
            try:
                for job in jobs:  # all at once: an attempt without a record counts as interrupted after 1 min
                    together = [run.id for run, _ in job]
                    for run, attempt in job:
                        self._record(attempt, allocation, **shares_with(together, run.id))
                _run_jobs(store, jobs, allocation, started)
            except KeyboardInterrupt as interrupt:
                _cancel_all(attempts, started, str(interrupt) or _SIGNALS[signal.SIGINT])
                raise KeyboardInterrupt(
                    "interrupted: the jobs of this command have ended; the same command resumes them"
                ) from None

    def _record(self, attempt: Attempt, allocation: str | None, **details: Any) -> None:
        """Record an attempt as one of Slurm in an allocation, else as one of this process."""
        details["code"] = code_version()
        if allocation:
            previous = attempt.submitted
            if previous.get("job_id") == allocation and "time" in previous:
                details["time"] = previous["time"]  # requeued: since then it is in the queue
            attempt.submit(SlurmExecutor.name, job_id=allocation, logs=str(attempt.folder), **details)
        else:
            command = local_queue.process_identity()
            attempt.submit(self.name, host=socket.gethostname(), command=command, **details)

    def states(self, attempts: Mapping[str, Attempt], since: float | None) -> dict[str, State]:
        """Return the states of attempts by their processes."""
        return {key: _state(attempt) for key, attempt in attempts.items()}

    def cancel(self, run: Run, attempt: Attempt, reason: str, ended: datetime | None = None) -> None:
        """Write the outcome and end the processes of the attempt."""
        local_queue.cancel_here(run, attempt, reason, ended)


def start_job(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the command of a job, with its output where this command prints."""
    stdout = 2 if sys.stdout is sys.stderr else None  # as the caller redirected it, beside JSON
    # Ctrl-C reaches only this process, which records it before it ends the job. Not of srun: Slurm may find
    # the processes of an allocation by their group.
    alone = slurm.this_job() is None
    return subprocess.Popen(command, env=environment, cwd="/", stdout=stdout, start_new_session=alone)


def _run_jobs(
    store: RunStore,
    jobs: Sequence[Job],
    allocation: str | None,
    started: list[tuple[subprocess.Popen[bytes], Job]],
) -> None:
    """Run jobs one after another, and append each to `started` with its process."""
    environment, failed = local_queue.job_environment(), ""
    if allocation and "SLURM_CPUS_PER_TASK" in environment:
        # Since 22.05 srun does not inherit --cpus-per-task from sbatch: a task would get one CPU.
        environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
    for job in jobs:
        if failed:
            for _, attempt in job:
                attempt.end(CANCELLED, f"not started, because {failed} before it failed")
            continue
        module = "task" if len(job) == 1 else "shared_task"
        words = [word for run, attempt in job for word in (str(run.folder), str(attempt.number))]
        task = ["-u", "-m", f"hpc_imagenet.launch.tasks.{module}", *words]
        command, log, log_size = [sys.executable, *task], None, 0
        if allocation:
            log = _log_folder(store, job) / f"{allocation}_0_log.err"
            log_size = log.stat().st_size if log.exists() else 0
            srun = ["srun", *_srun_arguments(job[0][0], f"{log.parent}/{allocation}_%t_log")]
            command = [*srun, *command]
            if job[0][0].cluster().container:
                command = _in_container(job[0][0], srun, task)
                environment["PYTHONPATH"] = str(PACKAGE_ROOT)
        else:
            for _, attempt in job:
                local_queue.record_process(attempt)
        process = start_job(command, environment)
        started.append((process, job))
        code = process.wait()
        requeued = allocation and requeue.requeue_or_fail(job, code, log, log_size) == EXIT_REQUEUE
        for run, attempt in job:
            if not allocation:
                attempt.end(FAILED, _without_outcome(code))  # if it has none
            notification.run_ended(run, attempt)
            outcome = attempt.outcome
            if outcome is None or outcome.state != FINISHED:
                failed = run.id
        if requeued:  # the later jobs are, too
            return


def _without_outcome(code: int) -> str:
    """Return the reason of a job whose process ended with an exit code, or by a signal, and no outcome."""
    how = f"{signal.Signals(-code).name}: killed, or out of memory" if code < 0 else f"exit code {code}"
    return f"ended without an outcome ({how}): the same command resumes it"


def _state(attempt: Attempt) -> State:
    recorded = local_queue.process_record(attempt) or local_queue.is_elsewhere(attempt)
    if not recorded and local_queue.find_process(attempt.submitted.get("command") or {}):
        return State(QUEUED, "waits for the jobs before it")
    state = local_queue.state_of_process(attempt)
    how = "killed, or the machine restarted"
    ended = f"its command ended without an outcome ({how}): the same command resumes it"
    return State(FAILED, ended) if state.ended else state


@contextlib.contextmanager
def _interrupted_by_signals(in_allocation: bool) -> Iterator[None]:
    """Raise KeyboardInterrupt at the first of `_SIGNALS`; later ones do not disturb what follows.

    A signal that is ignored, as after nohup, or for which the caller has a handler, is left as it is.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in replaced:
            signal.signal(each, lambda *_: None)
        raise KeyboardInterrupt(_SIGNALS[signal.Signals(number)])

    replaced: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if in_allocation and number == signal.SIGTERM:
                    # At a preemption srun forwards SIGTERM and this process waits for the tasks to save. A
                    # handler, not SIG_IGN, which the tasks would inherit.
                    signal.signal(number, lambda *_: None)
                elif handler in (signal.SIG_DFL, signal.default_int_handler):
                    replaced[number] = handler
                    signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _cancel_all(
    attempts: Sequence[tuple[Run, Attempt]],
    started: Sequence[tuple[subprocess.Popen[bytes], Job]],
    cause: str,
) -> None:
    """Write the outcomes of all attempts that have none, then end the processes of the last job."""
    process, job = started[-1] if started else (None, [])
    running = [attempt.folder for _, attempt in job]
    for _, attempt in attempts:  # before the process ends: the first outcome is kept
        begun = attempt.folder in running
        attempt.end(CANCELLED, f"interrupted by {cause}" if begun else f"not started: interrupted by {cause}")
    if process and process.poll() is None:
        if slurm.this_job() is None:
            local_queue.end_processes([psutil.Process(process.pid)])
        else:  # srun ends the tasks; if it is killed, another process of it does so
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(local_queue.GRACE)
            process.kill()
        process.wait()
    for run, attempt in attempts:
        notification.run_ended(run, attempt)


def _in_container(run: Run, srun: Sequence[str], task: Sequence[str]) -> list[str]:
    """Return the command that starts the tasks of a run in its container; a shell expands its variables."""
    config = run.own_config()
    start = container_command(run.cluster(), bound_folders(config))
    words = [shlex.join([*srun, *start.srun_args]), start.python, shlex.join(task)]
    return ["sh", "-c", f"exec {' '.join(words)}"]


def _log_folder(store: RunStore, job: Job) -> Path:
    """Return the folder of srun's logs; runs that share a loader have their own, beside those of the job."""
    if len(job) == 1:
        return job[0][1].folder
    return store.make_own_folder("shared", str(time.time_ns()))


def _srun_arguments(run: Run, log: str) -> list[str]:
    from hpc_imagenet.stages import STAGES  # here, so that commands which query states do not import it

    arguments = ["--kill-on-bad-exit=1", f"--output={log}.out", f"--error={log}.err"]
    arguments.append("--open-mode=append")  # a requeued job goes on with the logs of its attempt
    if run.info.get("shares_loader") or not STAGES[run.info["stage"]].distributed:
        arguments += ["--nodes=1", "--ntasks=1"]  # one process, whatever the size of the allocation
    return [*arguments, *run.cluster().srun]
