"""Worker of the local queue: start queued jobs through submitit, in order, until the queue is empty.

All its state is in the run folders: if it is killed at any moment, the next worker continues, and the jobs it
had started keep running. The command line starts it: `python -m hpc_imagenet.launch.local_jobs.local_worker
WORKSPACE`.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from filelock import FileLock, Timeout

from hpc_imagenet.cluster import dist_env, gpus
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.retries.error_logs import error_logs
from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.launch.tasks.shared_task import SharedTask
from hpc_imagenet.launch.tasks.start_task import start_command
from hpc_imagenet.launch.tasks.task import Task
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, Attempt, read_record
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.stages import STAGES

TICK = 0.2  # s
_LINGER = 2.0  # s that an idle worker waits for new entries
_NO_LIMIT = 60 * 24 * 365.0  # minutes: local jobs have no time limit unless cluster.time is set


@dataclass
class Worker:
    """The worker loop of one queue; `step` is one pass over its entries."""

    store: RunStore
    handles: list[Any] = field(default_factory=list)  # submitit jobs, kept so that ended children are reaped
    # Parallel jobs allowed, by attempt folder (cache)
    parallel: dict[Path, int] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)  # when polling of needed runs began

    def work(self) -> None:
        """Run jobs until the queue is empty; return at once if another worker is running."""
        queue = local_queue.make_queue_folder(self.store)
        lock = FileLock(queue / "worker.lock")
        while True:
            try:
                # Wait 1 s: `is_worker_alive` of another process holds the lock for an instant.
                lock.acquire(timeout=1)
            except Timeout:
                return
            idle = time.monotonic()
            while time.monotonic() - idle < _LINGER:
                if self.step():
                    idle = time.monotonic()
                time.sleep(TICK)
            lock.release()
            # A submission made before the release started no worker of its own: check the queue once more.
            if not any(queue.glob("*.entry")):
                return

    def step(self) -> bool:
        """Process every entry once: remove ended ones, start those that may start. False if none is left."""
        self.handles = [job for job in self.handles if not job.done()]
        waiting: dict[str, list[tuple[Run, Attempt]]] = {}  # attempts of each job
        running: list[Attempt] = []  # one of each job
        jobs: set[str] = set()  # that are running
        # Sessions do not count as running: jobs submitted from a session would wait for its end.
        sessions: list[Attempt] = []
        for path in sorted(local_queue.queue_folder(self.store).glob("*.entry")):
            entry = read_record(path)
            if not (isinstance(entry.get("run"), str) and isinstance(entry.get("attempt"), int)):
                if path.exists():
                    print(
                        f"the entry {path.name} of the queue is damaged: removed", file=sys.stderr, flush=True
                    )
                    path.unlink(missing_ok=True)  # its run counts as never started, and can be retried
                continue
            run = self.store.run(entry["run"])
            attempt = Attempt(run.folder / "attempts" / str(entry["attempt"]))
            job = entry.get("job", path.stem)
            if local_queue.is_alive(attempt):
                if job not in jobs:
                    (sessions if _is_session(run) else running).append(attempt)
                jobs.add(job)
            elif attempt.outcome or not attempt.folder.exists():
                notification.run_ended(run, attempt)
                path.unlink()
            elif local_queue.process_record(attempt):
                attempt.end(FAILED, error_logs(attempt).last_error() or local_queue.NO_OUTCOME)
                notification.run_ended(run, attempt)
                path.unlink()
            elif (newest := run.attempt) and newest.number > attempt.number:
                # Its submission was interrupted and repeated: two attempts must never write one run.
                attempt.end(CANCELLED, f"replaced by attempt {newest.number}")
                path.unlink()
            else:
                try:
                    run.check_format()
                    run.frozen()  # a damaged config must not end the worker of all others
                except UserError as error:
                    attempt.end(FAILED, str(error))
                    path.unlink()
                else:
                    waiting.setdefault(job, []).append((run, attempt))
        for attempts in waiting.values():
            run, attempt = attempts[0]
            if _is_session(run) and self._start(attempts, running + sessions):
                sessions.append(attempt)
        for attempts in waiting.values():
            run, attempt = attempts[0]
            if _is_session(run):
                continue
            if len(running) >= self._parallel(run, attempt):
                break  # keep the order: later entries do not overtake one that waits for a free slot
            blocked = self._blocked(run)
            if blocked:
                for _, each in attempts:
                    each.end(CANCELLED, blocked)
            elif blocked is None:
                if not self._start(attempts, running + sessions):
                    break  # nor one that waits for GPUs
                running.append(attempt)
        return bool(waiting or running or sessions)

    def _parallel(self, run: Run, attempt: Attempt) -> int:
        """Return the maximum number of parallel jobs, including this attempt."""
        if attempt.folder not in self.parallel:
            self.parallel[attempt.folder] = _max_parallel(run)
        return self.parallel[attempt.folder]

    def _blocked(self, run: Run) -> str | None:
        """Return None if `run` may start, "" while it must wait, else the reason why it never can."""
        needs = [self.store.run(need) for need in run.info.get("needs", ())]
        state_of = states(needs, self.since)
        for need in needs:
            state = state_of[need.id]
            if state.ended and not state.finished:
                ended = "failed" if state.name == FAILED else "was cancelled"
                return f"needs {need.id}, which {ended}: fix that, then retry"
        return None if all(state.finished for state in state_of.values()) else ""

    def _start(self, attempts: list[tuple[Run, Attempt]], running: list[Attempt]) -> bool:
        """Start the process of a job; False if it must wait for GPUs."""
        run, attempt = attempts[0]
        try:
            cluster, *_ = [each.own_cluster() for each, _ in attempts]
        except UserError as error:
            for _, each in attempts:
                each.end(FAILED, str(error))
            return True
        shares = bool(run.info.get("shares_loader"))
        taken = {str(gpu) for other in running for gpu in local_queue.process_record(other).get("gpus", ())}
        all_gpus = gpus.available_gpus()
        requested = gpus_for(cluster, run.info["stage"], len(all_gpus))
        if shares:  # each run uses one
            requested = min(requested, len(attempts))
        free = [gpu for gpu in all_gpus if gpu not in taken]
        if len(free) < requested <= len(all_gpus):
            return False  # wait for free GPUs; a request for more than the machine has fails in the job
        assigned = free[:requested]
        shared = _is_session(run) and cluster.gpus_per_node is None  # it sees all GPUs and reserves none
        tasks = 1 if _is_session(run) or shares else cluster.tasks_per_node or max(1, requested)
        os.environ[dist_env.CPUS_VARIABLE] = str(_cpus_per_task(run, cluster, tasks))
        # Runs that share a loader have their own logs, beside that of the job.
        together = len(attempts) > 1
        shared_folder = self.store.make_own_folder("shared", str(time.time_ns())) if together else None
        executor = _LocalJobs(folder=shared_folder or attempt.folder)
        executor.update_parameters(
            timeout_min=cluster.time or _NO_LIMIT,
            tasks_per_node=tasks,
            setup=cluster.setup,
        )
        # Set here, not in update_parameters: submitit's check accepts numbers only, not names such as GPU-….
        executor.parameters["visible_gpus"] = visible = all_gpus if shared else assigned
        executor.parameters["gpus_per_node"] = len(visible)
        tasks_of_job = tuple((str(run.folder), attempt.number) for run, attempt in attempts)
        job = executor.submit(SharedTask(tasks_of_job) if together else Task(*tasks_of_job[0]))
        for _, attempt in attempts:
            local_queue.record_process(attempt, int(job.job_id), job_id=job.job_id, gpus=assigned)
        self.handles.append(job)
        for _, attempt in attempts:
            if attempt.outcome:  # cancelled before the launch, when there was no process to kill yet
                local_queue.kill(attempt)
        return True


class _LocalJobs(submitit.LocalExecutor):
    _submitit_command_str = property(lambda self: start_command(self.python, self.folder))


def _is_session(run: Run) -> bool:
    stage = STAGES.get(run.info.get("stage", ""))
    return stage is not None and stage.interactive


def gpus_for(cluster: Cluster, stage: str, available: int) -> int:
    """Return the GPUs of a local job: cluster.gpus_per_node, else one for a training if any is available."""
    if cluster.gpus_per_node is not None:
        return int(cluster.gpus_per_node)
    return min(1, available) if STAGES[stage].distributed else 0


def _max_parallel(run: Run) -> int:
    """Return the maximum of parallel jobs: cluster.parallel, else one per GPU, or per CPU for parts."""
    if parallel := run.cluster().parallel:
        return parallel
    return len(os.sched_getaffinity(0)) if "part" in run.info else max(1, len(gpus.available_gpus()))


def _cpus_per_task(run: Run, cluster: Cluster, tasks: int) -> int:
    """Return the CPUs of one task: cluster.cpus_per_task, else an equal share among parallel jobs."""
    available = len(os.sched_getaffinity(0))
    return cluster.cpus_per_task or max(1, available // (tasks * _max_parallel(run)))


def main() -> None:
    """Run the queued jobs of the workspace named on the command line."""
    Worker(RunStore(Path(sys.argv[1]))).work()


if __name__ == "__main__":
    main()
