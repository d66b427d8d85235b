"""Stage `train`: train a backbone on a datastore; see `hpc_imagenet.training.fit`."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.runs.checkpoints import INITIAL
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work.node_copies import wait_for_copies
from hpc_imagenet.training.torch_import import torch_import


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Train, or resume a training, and return its metrics: top1, images_per_second and more.

    Raises:
        UserError: bad input.
        Preempted: a stop signal arrived; a checkpoint is saved.
        PeerLost: another task of the job has ended.
    """
    with torch_import():
        from hpc_imagenet.training.fit import fit

    version = open_version(config.datastore)
    cluster, stages = cluster_for(config, "train"), dist_env.local_rank == 0
    with open_dataset(version, cluster, stages, splits=("train", "val")) as store:
        wait_for_copies(store, run, dist_env)
        return fit(_with_initial_weights(config, run), store, run, dist_env)


def _with_initial_weights(config: Config, run: Run) -> Config:
    """Return the config with the run's own link to the checkpoint of a warm start."""
    kept = run.folder / INITIAL
    if config.model.weights_run is None or not kept.exists():
        return config
    return replace(config, model=replace(config.model, weights=str(kept)))


def decode_for(configs: Sequence[Config], connections: Mapping[str, socket.socket], memory: int) -> None:
    """Decode the batches of trainings that share a loader, until all have ended.

    Args:
        configs: their configs, which differ only in what does not change the images.
        connections: connection to each training, by any name.
        memory: file descriptor of the memory that they share.

    Raises:
        UserError: the datastore cannot be read.
    """
    with torch_import():
        from hpc_imagenet.training.loading import datamodule
        from hpc_imagenet.training.loading.sampler import BatchShare
        from hpc_imagenet.training.loading.shared_decoder import SharedDecoder

    config = max(configs, key=lambda each: each.recipe.epochs)
    share = BatchShare(config.recipe.global_batch, accumulate=config.train.accumulate)
    workers = config.loader.workers
    with open_dataset(
        open_version(config.datastore), cluster_for(config, "train"), True, splits=("train", "val")
    ) as store:
        train, val = datamodule.builders(config, store.open_split("train"), store.open_split("val"))
        SharedDecoder(
            datamodule.batch_sequence(config, train, val, share),
            config.recipe.epochs,
            connections,
            memory,
            available_cpus(DistEnv()) - 1 if workers is None else workers,
            config.train.share_wait_seconds,
        ).run()
