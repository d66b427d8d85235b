"""Declaration of the download stage; work/download.py does the work."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.origin import (
    check_same_origin,
    has_archives,
    has_at_most,
    origin_of,
    source_folder,
)
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
        """Read the credentials and list the images of a small folder now: errors do not wait in the queue."""
        dataset = config.dataset
        if config.download.login is not None and re.match("https?:", dataset.source, re.IGNORECASE):
            HttpCredentials(dataset.source, config.download.login)
        target = Path(config.workspace) / "archives" / dataset.name
        if dataset.format == "images":
            check_same_origin(dataset, target)
        folder = source_folder(dataset)
        if folder is None:
            return
        if not receipt.missing_receipts(target, [archive.file for archive in dataset.archives.values()]):
            if _has_images(folder, dataset):
                _check_unchanged(config, folder, target)
        elif dataset.format == "images":
            _check_layout(config, folder)

    def check_output(self, config: Config) -> None:
        """Raise unless all archives of the dataset are downloaded and verified."""
        folder = Path(config.workspace) / "archives" / config.dataset.name
        files = [archive.file for archive in config.dataset.archives.values()]
        if absent := receipt.missing_receipts(folder, files):
            raise UserError(f"{folder} has no verified {', '.join(absent)}: run +stage={self.name} first")
        check_same_origin(config.dataset, folder)

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Download; see `stages.work.download.run`."""
        from hpc_imagenet.stages.work import download

        return download.run(config, run, dist_env)


def _check_layout(config: Config, folder: Path) -> None:
    """Raise for a folder of labelled images that is missing, or small and of an ambiguous layout."""
    dataset = config.dataset
    if not folder.is_dir():
        if dataset.make is None:
            problem = "is a file, not a folder" if folder.exists() else "no such folder"
            raise UserError(f"dataset.source={dataset.source}: {problem}; set the images' folder")
    elif not has_archives(folder, dataset) and has_at_most(folder, _LISTED):
        from hpc_imagenet.data.layouts.image_finder import find_images

        find_images(folder, dataset, config.download.connections)


def _check_unchanged(config: Config, folder: Path, target: Path) -> None:
    """Raise if images have changed since the archives in `target` were made of them."""
    dataset, threads = config.dataset, config.download.connections
    if dataset.format == "images":
        from hpc_imagenet.data.layouts.image_finder import find_images
        from hpc_imagenet.data.sources.labelled_images_source import check_unchanged

        check_unchanged(find_images(folder, dataset, threads), target)
        return
    from hpc_imagenet.data.sources.class_folder_source import ClassFolderSource, detect_layout

    files = {split: archive.file for split, archive in dataset.archives.items()}
    layout = detect_layout(folder)
    if layout and ClassFolderSource(layout, origin_of(dataset), files, threads).is_outdated(target):
        raise UserError(
            f"{folder} has changed since {target} was made of it: remove {target} and, if more than the "
            "times of files has changed, set dataset.revision=NAME, a new name; stages after the download, "
            "such as +stage=train, still use the images of then"
        )


def _has_images(folder: Path, dataset: Dataset) -> bool:
    """Whether a source is a small folder of images, and not of archives.

    Images may be removed, or be readable by one user of the workspace only, once archives are made of them.
    """
    from hpc_imagenet.data.layouts.folder_tree import IMAGE_ENDINGS

    try:
        if not folder.is_dir() or has_archives(folder, dataset) or not has_at_most(folder, _LISTED):
            return False
        names = (name.lower() for _, _, files in os.walk(folder, followlinks=True) for name in files)
        return any(name.endswith(IMAGE_ENDINGS) for name in names)
    except OSError:
        return False


DOWNLOAD = DownloadStage()
