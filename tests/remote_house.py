"""A workspace with the processed dataset `digits`, of about 20 MB, and the ways to bring it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sample_dataset import make_dataset

from hpc_imagenet.cli import commands
from hpc_imagenet.config.schema import Config, Dataset, Datastore, Stage, Upload
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages import upload


class House:
    def __init__(self, tmp_path: Path) -> None:
        self.workspace = tmp_path / "workspace"
        self.dataset = self.workspace / "datasets" / "digits"
        self.fill("c0ffee")

    def fill(self, content: str, name: str = "digits") -> None:
        """Make another dataset."""
        self.manifest = make_dataset(self.workspace, name, content, images=8, image_bytes=800_000)

    def upload(self, url: str, name: str = "digits", dataset: str = "digits", **stage: Any) -> dict[str, Any]:
        run = Run(self.workspace / "runs" / f"abc-upload-{name}-{dataset}-{stage.get('part')}")
        run.folder.mkdir(parents=True, exist_ok=True)
        config = Config(
            workspace=str(self.workspace),
            stage=Stage("upload", **stage),
            dataset=Dataset(name=dataset),
            datastore=Datastore(name, url),
            upload=Upload(connections=4),
        )
        return upload.run(config, run, DistEnv())

    def verb(self, url: str, *words: str) -> int:
        return commands.run_command_line(
            "datastores", [*words, f"datastore.url={url}", f"workspace={self.workspace}"]
        )

    def holds(self, url: str, target: Path, name: str = "digits") -> None:
        """Fetch the newest version and compare every image; nothing but what belongs to it is there."""
        assert self.verb(url, "fetch", name, str(target)) == 0
        version = versions.open_version(Datastore(name, str(target)))
        assert self.images(version.folder) == self.images(self.dataset)
        assert set(versions.open_backend(url).files(version.path)) == {
            "manifest.json",
            *(file.path for file in upload.placed(self.manifest).all_files()),
        }

    def images(self, at: Path) -> list[tuple[bytes, int]]:
        store = DatasetReader(at)
        return [image for name in store.manifest.splits for image in store.open_split(name)]
