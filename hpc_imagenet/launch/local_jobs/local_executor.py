"""The executor `local`: a queue on this machine, whose worker starts the jobs; see local_queue.py."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.executor import Executor, State, code_version, override_of, setting_name
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.runs.attempt import FINISHED, QUEUED, Attempt
from hpc_imagenet.runs.store import Run, RunStore


class LocalExecutor(Executor):
    """Submit attempts to the queue of this machine."""

    name = "local"
    in_background = True

    def check_settings(self, stage: str, cluster: Cluster, shares_loader: bool = False) -> None:
        """Raise for several nodes."""
        from hpc_imagenet.stages import STAGES  # here, so that commands which query states do not import it

        if STAGES[stage].distributed and cluster.nodes > 1:
            setting = setting_name(cluster, stage, "nodes")
            raise UserError(
                f"{setting}={cluster.nodes}: cluster=local runs {stage} on this machine alone: set "
                f"cluster=slurm, or {override_of(setting, 1)}"
            )

    def submit(
        self, store: RunStore, attempts: Sequence[tuple[Run, Attempt]], state_of: Mapping[str, State]
    ) -> None:
        """Append attempts to the queue and start a worker."""
        from hpc_imagenet.launch.shared_jobs import group_attempts, shares_with  # imports the stages

        # Write the entries first: if this process is killed in between, every submitted attempt is queued.
        jobs = group_attempts(attempts)
        local_queue.enqueue(store, jobs)
        for job in jobs:
            ids = [run.id for run, _ in job]
            for run, attempt in job:
                attempt.submit(
                    self.name, host=socket.gethostname(), code=code_version(), **shares_with(ids, run.id)
                )
        if attempts:
            local_queue.ensure_worker(store)

    def states(self, attempts: Mapping[str, Attempt], since: float | None) -> dict[str, State]:
        """Return the states of attempts by their processes, or why they are still queued."""
        expected: dict[Path, bool] = {}  # whether a worker is there, by workspace: one query for all its runs
        return {key: self._state(attempt, expected) for key, attempt in attempts.items()}

    def cancel(self, run: Run, attempt: Attempt, reason: str, ended: datetime | None = None) -> None:
        """Write the outcome and end the processes of the attempt."""
        local_queue.cancel_here(run, attempt, reason, ended)

    def start_queued(self, store: RunStore) -> None:
        """Start a worker unless one is running, or nothing is in the queue of this machine."""
        if any(local_queue.queue_folder(store).glob("*.entry")):
            local_queue.ensure_worker(store)

    def _state(self, attempt: Attempt, expected: dict[Path, bool]) -> State:
        started = local_queue.process_record(attempt) or local_queue.is_alive(attempt)
        if started or local_queue.is_elsewhere(attempt):
            return local_queue.state_of_process(attempt)
        run = Run(attempt.folder.parents[1])
        if not run.is_mine:  # only its owner can read that queue
            return State(QUEUED, f"waits in the queue of {run.owner}")
        workspace = attempt.folder.parents[3]
        store = RunStore(workspace)
        if workspace not in expected:
            expected[workspace] = local_queue.is_worker_expected(store)
        if not expected[workspace]:
            return State(QUEUED, "no worker is running: retry, or submit again, to start one")
        needs = [store.run(need) for need in run.info.get("needs", ())]
        unmet = [need.id for need in needs if not _has_finished(need)]
        return State(QUEUED, f"waits for {' '.join(unmet)}" if unmet else "waits for its turn")


def _has_finished(run: Run) -> bool:
    attempt = run.attempt
    outcome = attempt.outcome if attempt else None
    return outcome is not None and outcome.state == FINISHED
