"""Declaration of the download stage; work/download.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.origin import check_same_origin, has_archives, has_at_most, source_folder
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import content_hash
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.stage import Stage

_LISTED = 20_000  # files in a folder up to which it is listed before submission; else by the job


class DownloadStage(Stage):
    """Fetch and verify the archives of a dataset."""

    name = "download"
    shares_output = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the identity of the archives."""
        return (content_hash(config.dataset),)

    def label(self, config: Config) -> str:
        """Return stage and dataset."""
        return f"{self.name}-{config.dataset.name}"

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Read the credentials and list labelled images now, so that errors do not wait in the queue."""
        if config.download.login is not None:
            HttpCredentials(config.dataset.source, config.download.login)
        if config.dataset.format == "images":
            self._check_images(config)

    def check_output(self, config: Config) -> None:
        """Raise unless all archives of the dataset are downloaded and verified."""
        folder = Path(config.workspace) / "archives" / config.dataset.name
        files = [archive.file for archive in config.dataset.archives.values()]
        if absent := receipt.missing_receipts(folder, files):
            raise UserError(f"{folder} has no verified {', '.join(absent)}: run +stage={self.name} first")

    def _check_images(self, config: Config) -> None:
        """Raise for a folder that is missing, or small and of an ambiguous layout."""
        folder, dataset = source_folder(config.dataset), config.dataset
        archives = [archive.file for archive in dataset.archives.values()]
        target = Path(config.workspace) / "archives" / dataset.name
        check_same_origin(dataset, target)
        if folder is None or not receipt.missing_receipts(target, archives):
            return
        if not folder.is_dir():
            if dataset.make is None:
                problem = "is a file, not a folder" if folder.exists() else "no such folder"
                raise UserError(f"dataset.source={dataset.source}: {problem}; set the images' folder")
        elif not has_archives(folder, dataset) and has_at_most(folder, _LISTED):
            from hpc_imagenet.data.layouts.image_finder import find_images

            find_images(folder, dataset, config.download.connections)

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Download; see `stages.download.run`."""
        from hpc_imagenet.stages.work import download

        return download.run(config, run, dist_env)


DOWNLOAD = DownloadStage()
