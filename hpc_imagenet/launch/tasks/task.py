"""Run the stage of a frozen config on a node and write the attempt's outcome.

A job is identified by its run folder and the attempt's number alone. Every task of the job runs this module;
rank 0 records the start and the outcome. Without submitit, run
`python -m hpc_imagenet.launch.tasks.task RUN_FOLDER ATTEMPT`.

A task on Slurm that stops for an external reason (a signal, a lost peer) exits with a code and writes no
outcome; requeue.py then decides once per job, after srun.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hpc_imagenet.cluster import slurm
from hpc_imagenet.cluster.dist_env import DistEnv, from_environment
from hpc_imagenet.cluster.gpu_meter import open_meter
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.errors import EXIT_REQUEUE, PeerLost, Preempted, Superseded, UserError
from hpc_imagenet.io.access import explain_permission_error
from hpc_imagenet.io.atomic_files import is_disk_full
from hpc_imagenet.io.ownership import set_job_umask
from hpc_imagenet.io.printable import error_line
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.tasks.usage_recorder import UsageRecorder
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, Attempt
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages import STAGES


@dataclass(frozen=True)
class Task:
    """The callable that submitit pickles: two plain values and the name of this class."""

    run_folder: str
    attempt: int

    @property
    def attempts(self) -> tuple[tuple[str, int], ...]:
        """Run folder and attempt's number, as a shared task has several of them."""
        return ((self.run_folder, self.attempt),)

    def __call__(self) -> dict[str, Any]:
        """Run the attempt; see `run_task`."""
        return run_task(Path(self.run_folder), self.attempt)


def run_task(run_folder: Path, number: int) -> dict[str, Any]:
    """Run the stage that the frozen config names, in this process, and write the attempt's outcome.

    Args:
        run_folder: folder of the run.
        number: the attempt's number.

    Returns:
        The result of the stage, such as top1 (0 to 1) of a training.

    Raises:
        SystemExit: the attempt failed with a one-line reason, had ended before, or is to be requeued.
        Exception: any other failure; the traceback goes to the log.
    """
    # submitit's handlers would ignore SIGTERM and requeue at SIGUSR2. A stage may be killed at any moment,
    # and training sets its own handlers.
    for stop_signal in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(stop_signal, signal.SIG_DFL)
    faulthandler.enable()  # a crash in a library writes its signal and the last frames to the log
    run, dist_env = Run(run_folder), from_environment()
    attempt = Attempt(run_folder / "attempts" / str(number))
    try:
        run.check_mine("run its jobs", "submit the same settings in another workspace=FOLDER")
    except UserError as error:  # nothing is written into the folder of another user
        raise SystemExit(f"error: {error}") from None
    if outcome := attempt.outcome:  # cancelled before it started, or finished by another copy of this job
        print(
            f"this attempt has already ended ({outcome.state}): {outcome.reason}", file=sys.stderr, flush=True
        )
        raise SystemExit(0 if outcome.state == FINISHED else 1)
    try:
        run.check_format()
    except UserError as error:
        _fail(attempt, error)
    if dist_env.is_rank_zero:
        _start_attempt(run, attempt, world_size=dist_env.size)
    try:
        config = run.own_config()
        set_job_umask(STAGES[config.stage.name].shares_output)
        meter = functools.partial(open_meter, most=_used_gpus(config, dist_env))
        with UsageRecorder(attempt, dist_env, meter):
            result = STAGES[config.stage.name].run(config, run, dist_env)
        if dist_env.is_rank_zero:
            if run.lease:
                run.lease.check()
            attempt.end(FINISHED, result=result)
    except Superseded as superseded:
        print(f"exiting: {superseded}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_REQUEUE) from None
    except (Preempted, PeerLost) as reason:
        if not on_slurm():
            attempt.end(FAILED, f"{reason}: retry resumes from the last checkpoint")
        print(reason, file=sys.stderr, flush=True)
        raise SystemExit(EXIT_REQUEUE) from None
    except UserError as error:
        _fail(attempt, error)
    except BaseException as error:
        if is_disk_full(error):
            folder = run_folder.parents[1]
            _fail(attempt, UserError(f"no space left in {folder}: free some space, then retry"))
        if isinstance(error, PermissionError) and error.filename:
            end_failed(attempt, explain_permission_error(error, run_folder.parents[1]))
        end_failed(attempt, traceback.format_exception_only(type(error), error)[-1].strip())
        raise
    return result


def _used_gpus(config: Config, dist_env: DistEnv) -> int:
    """Return the number of GPUs that the tasks of this node use: one for each, or those requested for one."""
    requested = cluster_for(config, config.stage.name).gpus_per_node
    if STAGES[config.stage.name].distributed and requested is None:
        return dist_env.local_size
    return int(requested or 0)


def _fail(attempt: Attempt, error: UserError) -> NoReturn:
    line = error_line(error)
    end_failed(attempt, line)
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def end_failed(attempt: Attempt, reason: str) -> None:
    """Record a failure, unless a later start holds the lease: the failure is not that of the run, then."""
    if not lease.is_superseded(attempt.folder.parents[1], attempt.number):
        attempt.end(FAILED, reason)


def _start_attempt(run: Run, attempt: Attempt, **details: Any) -> None:
    """Acquire the run's lease and record the start in started.json, with `details`.

    Raises:
        SystemExit: another process or a newer attempt has the run, or it has been requeued too often.
    """
    if local_queue.started_elsewhere(attempt):
        raise SystemExit(
            f"another process (pid {attempt.started.get('pid')}) already runs this attempt: exiting"
        )
    if (newest := run.attempt) and newest.number > attempt.number:
        # Its submission was interrupted and repeated: two attempts must never write one run.
        attempt.end(CANCELLED, f"replaced by attempt {newest.number}")
        raise SystemExit(f"this attempt was replaced by attempt {newest.number}")
    if not attempt.submitted and (job := slurm.this_job()):
        # The command that submitted this job was killed before it could record the job id.
        attempt.submit("slurm", job_id=job)
    try:
        run.lease = lease.acquire(run.folder, attempt.number)
    except Superseded as superseded:
        print(f"exiting: {superseded}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_REQUEUE) from None
    if step := slurm.this_step():
        details["step"] = step
    if nodes := slurm.this_node_list():
        details["nodes"] = nodes
    attempt.start(**local_queue.process_identity(), **details)
    limit = run.cluster().max_requeues
    if on_slurm() and lease.restart_count() > limit:
        count = lease.restart_count()
        reason = f"requeued {count} times, more than cluster.max_requeues={limit}: retry resumes it"
        attempt.end(FAILED, reason)
        raise SystemExit(reason)


def on_slurm() -> bool:
    """Whether this is a task of a Slurm job; submitit's local jobs may run inside an allocation."""
    return slurm.this_job() is not None and "SUBMITIT_LOCAL_GLOBALID" not in os.environ


if __name__ == "__main__":
    run_task(Path(sys.argv[1]), int(sys.argv[2]))
