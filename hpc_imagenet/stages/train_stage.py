"""Declaration of the train stage; work/train.py and the package training do the work."""

from __future__ import annotations

import re
from dataclasses import astuple
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.loader_key import check_shared_loader, loader_key
from hpc_imagenet.config.names import backbones
from hpc_imagenet.config.names.tracker_names import check_installed
from hpc_imagenet.config.schema import Cluster, Config, Datastore, cluster_for
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import Manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import FindVersion
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.process_stage import load_dataset
from hpc_imagenet.stages.stage import Stage
from hpc_imagenet.stages.upload_stage import UPLOAD


class TrainStage(Stage):
    """Train a backbone on a datastore."""

    name = "train"
    distributed = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the content of the data, the model, the recipe and the seed."""
        return (config.datastore.content, config.training_identity())

    def label(self, config: Config) -> str:
        """Return the model, as a name that a folder can have."""
        return re.sub("[/:]", "-", config.model.name)

    def needs(self, config: Config) -> tuple[str, ...]:
        """Return the upload; none if only the datastore is known."""
        return (UPLOAD.run_id(config),) if config.dataset.source else ()

    def datastore(self, config: Config, find_version: FindVersion) -> Datastore:
        """Return the datastore with its newest or pinned version, if it has one."""
        return find_version(config.datastore) or super().datastore(config, find_version)

    def model(self, config: Config) -> str | None:
        """Return model.name."""
        return config.model.name

    def loader_key(self, config: Config) -> str | None:
        """Return what the loader depends on, with `train.share_loader`."""
        return loader_key(config, cluster_for(config, self.name)) if config.train.share_loader else None

    def check_settings(self, config: Config, cluster: Cluster) -> None:
        """Raise for an unknown model or weights, and for GPUs, tasks and a batch that do not fit together."""
        _check_model(config)
        if config.train.share_loader:
            check_shared_loader(config, cluster)
        _check_resources(config, cluster)
        if not cluster.container:  # an image has its own packages
            check_installed(config.tracker)

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise unless the datastore can be read and has enough images for a batch."""
        datastore = config.datastore
        if versions.is_remote(datastore.url):
            versions.check_readable(versions.open_backend(datastore.url), cluster.scratch, datastore.name)
        if not planned:
            _check_global_batch(versions.open_version(datastore).manifest, config)
            return
        try:
            manifest = load_dataset(config)
        except UserError:  # not processed yet
            return
        _check_global_batch(manifest, config)

    def input_key(self, config: Config, cluster: Cluster) -> object:
        """Return what the check of the input depends on: a sweep shares it, and remote queries are slow."""
        return (astuple(config.datastore), cluster.scratch, config.recipe.global_batch)

    def check_output(self, config: Config) -> None:
        """Raise never: the result of a training is in its run folder."""

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Train; see `stages.work.train.run`."""
        from hpc_imagenet.stages.work import train

        return train.run(config, run, dist_env)


def _check_model(config: Config) -> None:
    """Raise for an unknown model, unknown weights, or frozen layers without pretrained weights."""
    name, weights = config.model.name, config.model.weights
    backbones.check_name("model.name", name)
    backbones.check_preprocessing(config.model.preprocessing)
    if config.recipe.freeze and not weights:
        raise UserError(
            f"recipe.freeze=true trains the classifier alone: set model.weights={backbones.example(name)}"
        )
    if config.recipe.keep_optimizer and not config.model.weights_run:
        raise UserError("recipe.keep_optimizer=true continues with the state of a run: set model.weights=RUN")
    if weights:
        backbones.check_weights(name, weights)


def _check_resources(config: Config, cluster: Cluster) -> None:
    """Raise for GPUs, tasks and a global batch that do not fit together."""
    batch = config.recipe.global_batch
    # Every process takes an equal share of a step, in train.accumulate micro-batches.
    parts = (1 if config.train.share_loader else cluster.tasks) * config.train.accumulate
    if config.loader.decode == "gpu" and cluster.gpus_per_node == 0:
        raise UserError("loader.decode=gpu, but cluster.gpus_per_node=0: set loader.decode=cpu")
    gpus, tasks = cluster.gpus_per_node, cluster.tasks_per_node
    if gpus and tasks and gpus != tasks:
        raise UserError(
            f"cluster.tasks_per_node={tasks} with cluster.gpus_per_node={gpus}: a training runs one "
            f"task per GPU: remove cluster.tasks_per_node, or set it to {gpus}"
        )
    if batch % parts:
        above = (batch // parts + 1) * parts
        raise UserError(
            f"recipe.global_batch={batch} is not divisible by {parts} (processes times train.accumulate): "
            f"set it to {' or '.join(str(n) for n in (above - parts, above) if n)}"
        )


def _check_global_batch(manifest: Manifest, config: Config) -> None:
    train, batch = manifest.splits.get("train"), config.recipe.global_batch
    if train and train.images < batch:
        raise UserError(
            f"recipe.global_batch={batch} is more than the {train.images} images of train: "
            f"set at most {train.images}"
        )


TRAIN = TrainStage()
