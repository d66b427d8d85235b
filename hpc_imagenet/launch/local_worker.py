"""Worker of the local queue: start queued jobs through submitit, in order, until the queue is empty.

All its state is in the run folders: if it is killed at any moment, the next worker continues, and the jobs it
had started keep running. The command line starts `python -m hpc_imagenet.launch.local_worker WORKSPACE`.
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

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.launch import local_queue
from hpc_imagenet.launch.states import VANISHED, states
from hpc_imagenet.launch.task import Task
from hpc_imagenet.runs.store import CANCELLED, FAILED, Attempt, Run, RunStore

TICK = 0.2  # s
_LINGER = 2.0  # s that an idle worker waits for more
_ENDLESS = 60 * 24 * 365.0  # minutes: this machine has no time limit of its own


@dataclass
class Worker:
    """One pass through the queue is `step`; everything else is waiting."""

    store: RunStore
    handles: list[Any] = field(default_factory=list)  # of submitit; kept so that ended children are reaped
    parallel: dict[Path, int] = field(default_factory=dict)  # by attempt; its config is frozen
    began: float = field(default_factory=time.monotonic)

    def work(self) -> None:
        """Work until the queue is empty; return at once if another worker lives."""
        queue = local_queue.queue_folder(self.store)
        queue.mkdir(parents=True, exist_ok=True)
        lock = FileLock(queue / "worker.lock")
        while True:
            try:
                # More than a moment: whoever looks whether a worker lives holds the lock for an instant.
                lock.acquire(timeout=1)
            except Timeout:
                return
            idle = time.monotonic()
            while time.monotonic() - idle < _LINGER:
                if self.step():
                    idle = time.monotonic()
                time.sleep(TICK)
            lock.release()
            # Whoever came while the lock was still held started no worker; this one looks once more.
            if not any(queue.glob("*.entry")):
                return

    def step(self) -> bool:
        """Look at every entry once: drop the ended, start what may start. False when nothing is left."""
        self.handles = [job for job in self.handles if not job.done()]
        waiting: list[tuple[Run, Attempt]] = []
        running: list[Attempt] = []
        sessions: list[
            Attempt
        ] = []  # in nobody's way: the jobs that are sent from them would wait for their end
        for path in sorted(local_queue.queue_folder(self.store).glob("*.entry")):
            entry = read_json(path)
            if entry is None:
                continue
            run = self.store.run(entry["run"])
            attempt = Attempt(run.folder / "attempts" / str(entry["attempt"]))
            if local_queue.is_alive(attempt):
                (sessions if _is_session(run) else running).append(attempt)
            elif attempt.outcome or not attempt.folder.exists():
                path.unlink()
            elif local_queue.process_record(attempt):
                attempt.end(FAILED, attempt.last_error_line() or VANISHED)
                path.unlink()
            elif (newest := run.attempt) and newest.number > attempt.number:
                # Its submission was cut off and asked for again: two attempts never write one run.
                attempt.end(CANCELLED, f"attempt {newest.number} took its place")
                path.unlink()
            else:
                waiting.append((run, attempt))
        for run, attempt in waiting:
            if _is_session(run) and self._start(run, attempt, running + sessions):
                sessions.append(attempt)
        for run, attempt in waiting:
            if _is_session(run):
                continue
            if len(running) >= self._parallel(run, attempt):
                break  # in order: nobody overtakes who waits for room
            blocked = self._blocked(run)
            if blocked:
                attempt.end(CANCELLED, blocked)
            elif blocked is None:
                if not self._start(run, attempt, running + sessions):
                    break  # nor who waits for GPUs
                running.append(attempt)
        return bool(waiting or running or sessions)

    def _parallel(self, run: Run, attempt: Attempt) -> int:
        """Return how many jobs may run beside each other for this attempt to be one of them."""
        if attempt.folder not in self.parallel:
            self.parallel[attempt.folder] = _side_by_side(run)
        return self.parallel[attempt.folder]

    def _blocked(self, run: Run) -> str | None:
        """Return None if `run` may start, "" while it must wait, the reason if it waits in vain."""
        needs = [self.store.run(need) for need in run.info.get("needs", ())]
        told = states(needs, self.began)
        for need in needs:
            if not told[need.id].active and not told[need.id].finished:
                was = "failed" if told[need.id].name == FAILED else "was cancelled"
                return f"needs {need.id}, which {was}: mend that, then retry"
        return None if all(state.finished for state in told.values()) else ""

    def _start(self, run: Run, attempt: Attempt, running: list[Attempt]) -> bool:
        cluster = run.cluster()
        taken = {str(gpu) for other in running for gpu in local_queue.process_record(other).get("gpus", ())}
        all_gpus = local_queue.available_gpus()
        wanted = gpus_for(cluster, run.info["stage"], len(all_gpus))
        free = [gpu for gpu in all_gpus if gpu not in taken]
        if len(free) < wanted <= len(all_gpus):
            return False  # its turn comes when GPUs are back; a wish beyond the machine fails in the job
        mine = free[:wanted]
        shared = _is_session(run) and cluster.gpus_per_node is None  # it sees all GPUs and holds none
        tasks = 1 if _is_session(run) else cluster.tasks_per_node or max(1, wanted)
        os.environ[local_queue.CPUS_VARIABLE] = str(_share(run, cluster, tasks))
        executor = submitit.LocalExecutor(folder=attempt.folder)
        executor.update_parameters(
            timeout_min=cluster.time or _ENDLESS,
            tasks_per_node=tasks,
            setup=cluster.setup,
        )
        # Beside what submitit checks: it takes numbers only, and passes on any name.
        executor.parameters["visible_gpus"] = visible = all_gpus if shared else mine
        executor.parameters["gpus_per_node"] = len(visible)
        job = executor.submit(Task(str(run.folder), attempt.number))
        local_queue.record_process(attempt, int(job.job_id), job_id=job.job_id, gpus=mine)
        self.handles.append(job)
        if attempt.outcome:  # cancelled between our look and the launch, when there was nothing to kill yet
            local_queue.kill(attempt)
        return True


def _is_session(run: Run) -> bool:
    return run.info.get("stage") == "session"


def gpus_for(cluster: Cluster, stage: str, there: int) -> int:
    """Return how many GPUs a local job gets: as asked, else one for a training where there are any."""
    if cluster.gpus_per_node is not None:
        return cluster.gpus_per_node
    return min(1, there) if stage == "train" else 0


def _side_by_side(run: Run) -> int:
    """Return how many jobs such as this one run at a time: as asked, else one a GPU, parts one a CPU."""
    if asked := run.cluster().parallel:
        return asked
    return len(os.sched_getaffinity(0)) if "part" in run.info else max(1, len(local_queue.available_gpus()))


def _share(run: Run, cluster: Cluster, tasks: int) -> int:
    """Return the CPUs of one task: jobs side by side share the machine's instead of fighting for them."""
    there = len(os.sched_getaffinity(0))
    return cluster.cpus_per_task or max(1, there // (tasks * _side_by_side(run)))


def main() -> None:
    """Work through the queue of the workspace named on the command line."""
    Worker(RunStore(Path(sys.argv[1]))).work()


if __name__ == "__main__":
    main()
