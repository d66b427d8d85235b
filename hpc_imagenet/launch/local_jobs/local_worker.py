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
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.retries.error_logs import error_logs
from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.launch.tasks.shared_task import SharedTask
from hpc_imagenet.launch.tasks.start_task import start_command
from hpc_imagenet.launch.tasks.task import Task
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, Attempt, read_record
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import last_seen
from hpc_imagenet.stages import STAGES

TICK = 0.2  # s
_LINGER = 2.0  # s that an idle worker waits for new entries
_NO_LIMIT = 60 * 24 * 365.0  # minutes: local jobs have no time limit unless cluster.time is set


@dataclass
class _Entry:
    """An attempt in the queue, as this worker has last seen it."""

    path: Path
    run: Run
    attempt: Attempt
    job: str
    session: bool
    waiting: bool = False  # nothing but this worker starts it: it is read again when its turn has come
    parallel: int | None = None  # parallel jobs allowed; None: its config has not been read yet


@dataclass
class Worker:
    """The worker loop of one queue; `step` is one pass over its entries.

    A pass reads the records of running and of new jobs, and of those whose turn it is: a queue may have
    thousands of jobs, and each has a handful of records.
    """

    store: RunStore
    handles: list[Any] = field(default_factory=list)  # submitit jobs, kept so that ended children are reaped
    entries: dict[str, _Entry] = field(default_factory=dict)  # of the queue, by file name, in order
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
        """Process the entries once: remove ended ones, start those that may start. False if none is left."""
        self.handles = [job for job in self.handles if not job.done()]
        waiting: dict[str, list[_Entry]] = {}  # entries of each job
        running: list[Attempt] = []  # one of each job
        jobs: set[str] = set()  # that are running
        # Sessions do not count as running: jobs submitted from a session would wait for its end.
        sessions: list[Attempt] = []
        self._list_entries()
        for entry in list(self.entries.values()):
            if not entry.waiting and local_queue.is_alive(entry.attempt):
                if entry.job not in jobs:
                    (sessions if entry.session else running).append(entry.attempt)
                jobs.add(entry.job)
            elif entry.waiting or self._is_waiting(entry):
                entry.waiting = True
                waiting.setdefault(entry.job, []).append(entry)
        for job in waiting.values():
            if job[0].session and (ready := self._ready(job)) and self._start(ready, running + sessions):
                sessions.append(ready[0].attempt)
        state_of: dict[str, State] = {}  # of needed runs
        for job in waiting.values():
            if job[0].session or not (ready := self._ready(job)):
                continue
            if len(running) >= (ready[0].parallel or 1):
                break  # keep the order: later entries do not overtake one that waits for a free slot
            blocked = self._blocked(ready[0].run, state_of)
            if blocked:
                for entry in ready:
                    entry.attempt.end(CANCELLED, blocked)
                    entry.waiting = False
            elif blocked is None:
                if not self._start(ready, running + sessions):
                    break  # nor one that waits for GPUs
                running.append(ready[0].attempt)
        return bool(self.entries)

    def _list_entries(self) -> None:
        """Read the entries that are new, and forget those that are gone."""
        found: dict[str, _Entry] = {}
        for path in sorted(local_queue.queue_folder(self.store).glob("*.entry")):
            if path.name in self.entries:
                found[path.name] = self.entries[path.name]
                continue
            entry = read_record(path)
            if isinstance(entry.get("run"), str) and isinstance(entry.get("attempt"), int):
                run = self.store.run(entry["run"])
                attempt = Attempt(run.folder / "attempts" / str(entry["attempt"]))
                job = entry.get("job", path.stem)
                found[path.name] = _Entry(path, run, attempt, job, _is_session(run))
            elif path.exists():
                print(f"the entry {path.name} of the queue is damaged: removed", file=sys.stderr, flush=True)
                path.unlink(missing_ok=True)  # its run counts as never started, and can be retried
        self.entries = found

    def _is_waiting(self, entry: _Entry) -> bool:
        """Whether an attempt that does not run may start; the entry of one that may not is removed."""
        run, attempt = entry.run, entry.attempt
        if attempt.outcome or not attempt.folder.exists():
            notification.run_ended(run, attempt)
        elif local_queue.process_record(attempt):
            reason = error_logs(attempt).last_error() or local_queue.NO_OUTCOME
            attempt.end(FAILED, reason, ended=last_seen(attempt))  # perhaps long ago: the machine restarted
            notification.run_ended(run, attempt)
        elif (newest := run.attempt) and newest.number > attempt.number:
            # Its submission was interrupted and repeated: two attempts must never write one run.
            attempt.end(CANCELLED, f"replaced by attempt {newest.number}")
        else:
            return True
        self._remove(entry)
        return False

    def _remove(self, entry: _Entry) -> None:
        entry.path.unlink()
        del self.entries[entry.path.name]

    def _ready(self, job: list[_Entry]) -> list[_Entry]:
        """Return the entries of a job whose turn it is that still wait and whose configs can be read."""
        ready = [entry for entry in job if self._is_waiting(entry)]
        for entry in ready:
            if entry.parallel is None:
                try:
                    entry.run.check_format()
                    entry.parallel = _max_parallel(entry.run)
                except UserError as error:  # a damaged config must not end the worker of all others
                    entry.attempt.end(FAILED, str(error))
                    self._remove(entry)
        return [entry for entry in ready if entry.parallel is not None]

    def _blocked(self, run: Run, state_of: dict[str, State]) -> str | None:
        """Return None if `run` may start, "" while it must wait, else the reason why it never can.

        `state_of` keeps the states of needed runs for the entries of one pass.
        """
        needs = list(run.info.get("needs", ()))
        state_of |= states([self.store.run(need) for need in needs if need not in state_of], self.since)
        for need in needs:
            state = state_of[need]
            if state.ended and not state.finished:
                ended = "failed" if state.name == FAILED else "was cancelled"
                return f"needs {need}, which {ended}: fix that, then retry"
        return None if all(state_of[need].finished for need in needs) else ""

    def _start(self, entries: list[_Entry], running: list[Attempt]) -> bool:
        """Start the process of a job; False if it must wait for GPUs."""
        attempts = [(entry.run, entry.attempt) for entry in entries]
        run, attempt = attempts[0]
        try:
            cluster, *_ = [each.own_cluster() for each, _ in attempts]
        except UserError as error:
            for entry in entries:
                entry.attempt.end(FAILED, str(error))
                entry.waiting = False
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
        for entry in entries:
            entry.waiting = False
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
