"""Declaration of the upload stage; work/upload.py does the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Cluster, Config, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import content_hash
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.process_stage import PROCESS, load_dataset
from hpc_imagenet.stages.stage import Stage


class UploadStage(Stage):
    """Store a processed dataset as the next version of a datastore."""

    name = "upload"
    shares_output = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the identity of the images and their datastore."""
        # A folder in the workspace is hashed relative to it, so that a workspace can be moved.
        url = config.datastore.url.replace(config.workspace, "workspace:", 1)
        return (content_hash(config.dataset, config.process), config.datastore.name, url)

    def label(self, config: Config) -> str:
        """Return stage and datastore."""
        return f"{self.name}-{config.datastore.name}"

    def needs(self, config: Config) -> tuple[str, ...]:
        """Return the process run."""
        return (PROCESS.run_id(config),)

    def parts(self, config: Config) -> int:
        """Return upload.tasks."""
        return config.upload.tasks

    def processing_run(self, config: Config) -> str | None:
        """Return the process run, whose dataset it reads."""
        return PROCESS.run_id(config)

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise for an upload to an existing version with other content, or a missing dataset."""
        _check_pinned_version(config.datastore)
        if not planned:
            load_dataset(config)

    def check_output(self, config: Config) -> None:
        """Raise unless the version exists."""
        versions.open_version(config.datastore)

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Upload; see `stages.work.upload.run`."""
        from hpc_imagenet.stages.work import upload

        return upload.run(config, run, dist_env)


def _check_pinned_version(datastore: Datastore) -> None:
    """Raise for an upload to an existing version with other content."""
    name, number = versions.parse_reference(datastore.name)
    if number is None or number not in versions.complete_versions(datastore.url, name):
        return
    if versions.open_version(replace(datastore, content=None)).manifest.content != datastore.content:
        raise UserError(
            f"datastore {name}@v{number} exists and versions never change: "
            f"set datastore.name={name} to upload the next version"
        )


UPLOAD = UploadStage()
