"""The interface of a stage: everything that is particular to it, declared in one class.

A stage is a file `<name>_stage.py` with a class `…Stage`, one line in `stages/__init__.py` and its name in
`config.schema.STAGES`. The submitting side imports these files, so they import heavy packages, and the module
that does the work, within `run` only.
"""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import Any, ClassVar

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Cluster, Config, Datastore
from hpc_imagenet.runs.job import FindVersion, content_hash, signature
from hpc_imagenet.runs.store import Run, RunStore


class Stage(abc.ABC):
    """One stage of the pipeline, or a session.

    Attributes:
        name: name in `config.schema.STAGES`, in cluster.stage and in run.json.
        in_pipeline: whether `+stage=pipeline` includes it.
        distributed: whether it uses all nodes and GPUs of the cluster settings, with a task per GPU; the
            others are one task on one node, without a GPU unless one is requested.
        interactive: whether a user works in its job: the local queue starts it without waiting for others.
        writes_dataset: whether it writes the dataset's folder, which no other job may then read or write.
        shares_output: whether it writes data for all users of the workspace, with the permissions that their
            umask allows; the others write only the folder of their run, for this user alone.
    """

    name: ClassVar[str]
    in_pipeline: ClassVar[bool] = True
    distributed: ClassVar[bool] = False
    interactive: ClassVar[bool] = False
    writes_dataset: ClassVar[bool] = False
    shares_output: ClassVar[bool] = False

    # Planning: pure functions of the config, which read and write nothing.

    @abc.abstractmethod
    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the settings that decide the result of the stage, as JSON values, for the signature."""

    @abc.abstractmethod
    def label(self, config: Config) -> str:
        """Return the readable part of the run's id."""

    def signature(self, config: Config) -> str:
        """Return the signature of the stage's run."""
        return signature(self.name, *self.identity(config))

    def run_id(self, config: Config) -> str:
        """Return the id of the stage's run."""
        return f"{self.signature(config)}-{self.label(config)}"

    def needs(self, config: Config) -> tuple[str, ...]:
        """Return the ids of the runs that make its input."""
        return ()

    def datastore(self, config: Config, find_version: FindVersion) -> Datastore:
        """Return config.datastore as the stage uses it: with the hash of the images that it should have."""
        return replace(config.datastore, content=content_hash(config.dataset, config.process))

    def parts(self, config: Config) -> int:
        """Return the number of parallel jobs that share the work."""
        return 1

    def model(self, config: Config) -> str | None:
        """Return the name of the model that is trained."""
        return None

    def loader_key(self, config: Config) -> str | None:
        """Return a text that is equal for the runs which share one loader in one job; None: none."""
        return None

    def processing_run(self, config: Config) -> str | None:
        """Return the id of the process run whose dataset it writes or reads in the workspace."""
        return None

    # Validation on the submitting side. Each check raises a UserError.

    def check_settings(self, config: Config, cluster: Cluster) -> None:
        """Check settings alone, without reading files."""
        return

    @abc.abstractmethod
    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Check that the input of the stage exists and can be used.

        Args:
            config: the config.
            cluster: cluster settings of the stage.
            planned: whether jobs of the plan, or running ones, will make the input.
        """

    def input_key(self, config: Config, cluster: Cluster) -> object:
        """Return a hashable value: the input is checked once for jobs with the same one. None: always."""
        return None

    @abc.abstractmethod
    def check_output(self, config: Config) -> None:
        """Check that the output of a finished job still exists, so that the job can be skipped."""

    def check_active(self, config: Config, run: Run) -> None:
        """Check that a queued or running job can be taken for the one that a command describes."""
        return

    def prepare(self, config: Config, store: RunStore) -> None:
        """Write what the jobs of one command share, before they are submitted."""
        return

    # On a node.

    @abc.abstractmethod
    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Do the work and return its result, which is written into the attempt's outcome.

        Raises:
            UserError: bad input.
            Preempted: a signal requested a stop and the work is saved.
            PeerLost: another task of the job has ended.
        """
