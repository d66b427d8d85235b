"""Declaration of the evaluate stage; work/evaluate.py and the package training do the work."""

from __future__ import annotations

from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.recipe import VAL_SETTINGS
from hpc_imagenet.config.schema import PIXEL_VERSION, Cluster, Config, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.checkpoints import check_fingerprint
from hpc_imagenet.runs.job import FindVersion
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.stage import Stage
from hpc_imagenet.stages.train_stage import TRAIN


class EvaluateStage(Stage):
    """Evaluate a checkpoint on a split of a datastore. The command evaluate makes its config."""

    name = "evaluate"
    in_pipeline = False
    distributed = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the content of the checkpoint and of the data, and how images are evaluated."""
        pixels = {"pixels": PIXEL_VERSION} | ({"decode": "gpu"} if config.loader.decode == "gpu" else {})
        recipe = {name: getattr(config.recipe, name) for name in VAL_SETTINGS}
        return (config.evaluate.fingerprint, config.datastore.content, config.evaluate.split, recipe, pixels)

    def label(self, config: Config) -> str:
        """Return stage, model and split."""
        return f"{self.name}-{TRAIN.label(config)}-{config.evaluate.split}"

    def datastore(self, config: Config, find_version: FindVersion) -> Datastore:
        """Return the datastore as the command has pinned it."""
        return config.datastore

    def model(self, config: Config) -> str | None:
        """Return model.name."""
        return config.model.name

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise unless checkpoint and split exist and can be read."""
        check_fingerprint(config)
        version = versions.open_version(config.datastore)
        versions.check_readable(version.backend, cluster.scratch, version.name)
        if config.evaluate.split not in version.manifest.splits:
            raise UserError(
                f"split={config.evaluate.split}: datastore {version.name}@v{version.number} has the splits "
                f"{', '.join(version.manifest.splits)}"
            )

    def check_output(self, config: Config) -> None:
        """Raise never: the result is in the run folder."""

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Evaluate; see `stages.work.evaluate.run`."""
        from hpc_imagenet.stages.work import evaluate

        return evaluate.run(config, run, dist_env)


EVALUATE = EvaluateStage()
