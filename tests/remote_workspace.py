"""A workspace with the processed dataset `digits` of about 20 MB, with methods to upload and fetch it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sample_dataset import make_dataset

from hpc_imagenet.cli import commands
from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Config, Datastore, StageSelection, Upload
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import upload


class Workspace:
    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "workspace"
        self.dataset = self.root / "datasets" / "digits"
        self.replace_dataset("c0ffee")

    def replace_dataset(self, content: str, name: str = "digits") -> None:
        """Make another dataset of that name."""
        self.manifest = make_dataset(self.root, name, content, images=8, image_bytes=800_000)

    def upload(self, url: str, name: str = "digits", dataset: str = "digits", **stage: Any) -> dict[str, Any]:
        """Run the upload stage and return its result."""
        run = Run(self.root / "runs" / f"abc-upload-{name}-{dataset}-{stage.get('part')}")
        run.folder.mkdir(parents=True, exist_ok=True)
        config = Config(
            workspace=str(self.root),
            stage=StageSelection("upload", **stage),
            dataset=Dataset(name=dataset),
            datastore=Datastore(name, url),
            upload=Upload(connections=4),
        )
        return upload.run(config, run, DistEnv())

    def command(self, url: str, *arguments: str) -> int:
        """Run `datastores ARGUMENTS` on the command line and return its exit code."""
        return commands.run_command_line(
            "datastores", [*arguments, f"datastore.url={url}", f"workspace={self.root}"]
        )

    def assert_stored(self, url: str, target: Path, name: str = "digits") -> None:
        """Fetch the newest version, compare every image, and check that no other files are stored."""
        assert self.command(url, "fetch", name, str(target)) == 0
        version = versions.open_version(Datastore(name, str(target)))
        assert self.images(version.folder) == self.images(self.dataset)
        assert set(versions.open_backend(url).files(version.path)) == {
            "manifest.json",
            *(file.path for file in upload.version_layout(self.manifest).all_files()),
        }

    def images(self, folder: Path) -> list[tuple[bytes, int]]:
        """Return bytes and label of every image of a dataset folder."""
        reader = DatasetReader(folder)
        return [image for name in reader.manifest.splits for image in reader.open_split(name)]
