"""Declaration of the process stage; work/process.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.data.download.receipt import load_receipt
from hpc_imagenet.datastore.manifest import Manifest, load_manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import content_hash
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.download_stage import DOWNLOAD
from hpc_imagenet.stages.stage import Stage


class ProcessStage(Stage):
    """Make a dataset of verified archives."""

    name = "process"
    shares_output = True
    writes_dataset = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the identity of the archives and the settings that decide which files are written.

        Also that every image is decoded: a run that read the headers only has not checked them.
        """
        process, identity = config.process, config.process.identity()
        if process.check == "decode":
            identity["check"] = process.check
        return (content_hash(config.dataset), identity)

    def label(self, config: Config) -> str:
        """Return stage and dataset."""
        return f"{self.name}-{config.dataset.name}"

    def needs(self, config: Config) -> tuple[str, ...]:
        """Return the download."""
        return (DOWNLOAD.run_id(config),)

    def parts(self, config: Config) -> int:
        """Return process.tasks."""
        return config.process.tasks

    def processing_run(self, config: Config) -> str | None:
        """Return this run."""
        return self.run_id(config)

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise unless all archives of the dataset are downloaded and verified."""
        if not planned:
            DOWNLOAD.check_output(config)

    def check_output(self, config: Config) -> None:
        """Raise unless the dataset has the configured layout and check; every layout contains the index."""
        manifest, process = load_dataset(config), config.process
        if process.layout != "index" and manifest.provenance.get("process") != process.identity():
            raise UserError(
                f"the {process.layout} were made with other settings: run +stage={self.name} "
                f"process.layout={process.layout}"
            )
        # A later run that read the headers may have replaced a dataset of decoded images.
        if process.check == "decode" and manifest.provenance.get("check") != "decode":
            raise UserError(f"not all images were decoded: run +stage={self.name} process.check=decode")

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Process; see `stages.work.process.run`."""
        from hpc_imagenet.stages.work import process

        return process.run(config, run, dist_env)


def load_dataset(config: Config) -> Manifest:
    """Return the manifest of the processed dataset.

    Raises:
        UserError: it is missing, has other content, or was made of other archives than those there now.
    """
    folder = Path(config.workspace) / "datasets" / config.dataset.name
    try:
        manifest = load_manifest(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no dataset: run +stage=process first") from None
    if manifest.content != config.datastore.content:
        raise UserError(
            f"{folder} was made from other archives or with other settings: run +stage=process again"
        )
    archives = Path(config.workspace) / "archives" / config.dataset.name
    for file, md5 in (manifest.provenance.get("archives") or {}).items():
        made = load_receipt(archives / file)
        if made is not None and made.md5 != md5:
            raise UserError(
                f"{archives / file} is not the archive that {folder} was made of: run +stage=process"
            )
    return manifest


PROCESS = ProcessStage()
