"""Declaration of the price stage; work/price.py does the work. `price=true` makes its configs.

Its job times a short part of a training, on one task of the training's resources.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Cluster, Config, Datastore, StageSelection, cluster_for
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import FindVersion
from hpc_imagenet.runs.store import Run
from hpc_imagenet.runs.time_record import find_record, training_shape
from hpc_imagenet.stages.stage import Stage
from hpc_imagenet.stages.train_stage import TRAIN

MINUTES = 15  # time limit of the job, if cluster.stage.price sets no other
_NEVER = 1e6  # minutes


class PriceStage(Stage):
    """Time a few steps of a training."""

    name = "price"
    in_pipeline = False
    distributed = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return what decides the speed of the training."""
        return (training_shape(config, cluster_for(config, self.name)),)

    def label(self, config: Config) -> str:
        """Return stage and model."""
        return f"{self.name}-{TRAIN.label(config)}"

    def datastore(self, config: Config, find_version: FindVersion) -> Datastore:
        """Return the datastore of the training, which is pinned."""
        return config.datastore

    def model(self, config: Config) -> str | None:
        """Return model.name."""
        return config.model.name

    def check_settings(self, config: Config, cluster: Cluster) -> None:
        """Raise for what a training with these settings would be refused for, and for several tasks."""
        if cluster.tasks > 1:
            raise UserError("cluster.stage.price has several tasks: a price job is one task on one GPU")
        TRAIN.check_settings(config, cluster)

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise unless the datastore can be read and has enough images for a batch."""
        TRAIN.check_input(config, cluster, planned=False)

    def check_output(self, config: Config) -> None:
        """Raise if the record was deleted or damaged, so that the job runs again."""
        if find_record(Path(config.workspace) / "runs", *self.identity(config)) is None:
            raise UserError("the record of the times is missing or damaged")

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Time the training; see `stages.work.price.run`."""
        from hpc_imagenet.stages.work import price

        return price.run(config, run, dist_env)


def price_config(config: Config) -> Config:
    """Return the config of the price job of a training, whose datastore is pinned.

    It has one task, with the CPUs, the GPU, and the share of memory and batch of one task of the training.
    """
    cluster = cluster_for(config, TRAIN.name)
    tasks = cluster.tasks_of_node
    memory = None if cluster.memory_gb is None else math.ceil(1024 * cluster.memory_gb / tasks) / 1024
    stages = {name: values for name, values in cluster.stage.items() if name == PRICE.name}
    return replace(
        config,
        stage=StageSelection(PRICE.name),
        tracker=[],
        notify=None,
        sweep=None,
        price=False,
        cluster=replace(
            cluster,
            nodes=1,
            gpus_per_node=cluster.gpus_per_node and 1,
            tasks_per_node=cluster.tasks_per_node and 1,
            memory_gb=memory,
            time=min(cluster.time or MINUTES, MINUTES),
            stage=stages,
        ),
        recipe=replace(config.recipe, global_batch=config.recipe.global_batch // (cluster.nodes * tasks)),
        train=replace(
            config.train,
            share_loader=False,
            checkpoint_every_minutes=_NEVER,
            keep_checkpoints=None,
            bottleneck_after_seconds=60 * _NEVER,  # at the end
        ),
    )


PRICE = PriceStage()
