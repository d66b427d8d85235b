"""Turn composed configs into a validated plan that can be submitted; used by the command line and the API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.config.input.stored_settings import SENT
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import explain_permission_error
from hpc_imagenet.launch import submission, validate
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.executors import EXECUTORS
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.pricing.time_limits import check_time_limits
from hpc_imagenet.launch.split import choose_clusters
from hpc_imagenet.launch.submission import Submitted
from hpc_imagenet.launch.warm_start import find_weights
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import RunStore


@dataclass(frozen=True)
class PreparedPlan:
    """A validated plan that is not submitted yet; nothing has been written.

    Attributes:
        jobs: the jobs, each after those it needs.
        store: the runs of the workspace.
        executor: name of the executor, the same for all jobs.
        state_of: states of the jobs and the runs they need, by run id, when the plan was validated.
        first: the first config, for the settings that all configs share (workspace, wait, dry_run).
        split: one line about how the jobs are split over several clusters, or nothing.
    """

    jobs: list[Job]
    store: RunStore
    executor: str
    state_of: Mapping[str, State]
    first: Config
    split: str = ""

    @property
    def in_background(self) -> bool:
        """Whether `submit` returns before the jobs have ended."""
        return EXECUTORS[self.executor].in_background

    def submit(self) -> list[Submitted]:
        """Submit the jobs that are neither finished nor running; see `submission.submit_plan`.

        Raises:
            UserError: the workspace cannot be written, or Slurm refused a job.
        """
        validate.prepare_workspace(self.store.folder.parent)
        try:
            return submission.submit_plan(self.jobs, self.store, self.executor, self.state_of)
        except PermissionError as error:
            raise UserError(explain_permission_error(error)) from None
        except OSError as error:  # such as a disk that fills up meanwhile
            file = f" ({error.filename})" if error.filename else ""
            raise UserError(
                f"workspace={self.first.workspace}: {error.strerror or error}{file}: "
                "fix it, then submit again"
            ) from None


def prepare(configs: Sequence[Config]) -> PreparedPlan:
    """Return the validated plan of all configs.

    Raises:
        UserError: an invalid job, or a setting that cannot differ between the configs.
    """
    first = configs[0]
    for setting in ("workspace", "wait", "dry_run", "price", "sweep", "tracker", "notify"):
        if any(getattr(config, setting) != getattr(first, setting) for config in configs):
            raise UserError(f"{setting} cannot be swept: set one value for the whole command")
    if len({config.cluster.executor for config in configs}) > 1:
        raise UserError("cluster cannot be swept over executors: use one command per executor")
    if first.cluster.host and SENT not in os.environ:  # the command line has its own way there
        raise UserError(
            f"cluster.host={first.cluster.host} is for the command line: python -m hpc_imagenet …; from "
            "Python set cluster.host=null to submit on this machine"
        )
    EXECUTORS[first.cluster.executor].check_available()
    store = RunStore(Path(first.workspace))
    configs = [find_weights(config, store) for config in configs]
    find_version = validate.version_finder()
    jobs = make_plan(configs, find_version)
    state_of = validate.validate_jobs(jobs, store)
    jobs, split = choose_clusters(jobs, state_of)
    if not first.price:  # which shows the limit that would be long enough
        check_time_limits(jobs, store, state_of, find_version)
    return PreparedPlan(jobs, store, first.cluster.executor, state_of, first, split)
