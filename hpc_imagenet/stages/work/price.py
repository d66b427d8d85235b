"""Stage `price`: time about 100 steps of a training, with its data, validation and checkpoints.

Every image size of the schedule is trained for two short epochs, of which the second shows what an epoch
costs once memory is allocated and kernels are chosen. Slow batches make the epochs shorter.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.datastore.versions import open_version
from hpc_imagenet.runs.store import Run
from hpc_imagenet.runs.time_record import training_shape
from hpc_imagenet.stages.work.node_copies import wait_for_copies
from hpc_imagenet.training.torch_import import torch_import

STEPS = 100  # in all, of one image size
LEAST_STEPS = 20  # of each epoch, if there are many sizes
SECONDS = 90.0  # of all training steps together, after which epochs end
VAL_BATCHES = 8  # of a validation, drawn from all its images
SIZES = 4  # at most; the others are interpolated by their pixels


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Time the training and write its record; return images_per_second.

    Raises:
        UserError: bad input.
        Preempted: a stop signal arrived.
    """
    with torch_import():
        from hpc_imagenet.training.callbacks.epoch_times import PassLimit
        from hpc_imagenet.training.fit import fit

    checkpoints = run.folder / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)  # of an attempt that was killed
    cluster, recipe = cluster_for(config, config.stage.name), config.recipe
    passes = [size for size in timed_sizes(recipe) for _ in range(2)]
    steps = max(LEAST_STEPS, STEPS // len(passes))
    limit = PassLimit(steps * config.train.accumulate, SECONDS / len(passes), training_shape(config, cluster))
    values = {entry.name: getattr(recipe, entry.name) for entry in fields(Recipe)}
    short = replace(config, recipe=_ShortRecipe(**{**values, "epochs": len(passes)}, passes=passes))
    version = open_version(config.datastore)
    try:
        with open_dataset(version, cluster, dist_env.local_rank == 0, splits=("train", "val")) as store:
            wait_for_copies(store, run, dist_env)
            partial = _PartialDataset(store, VAL_BATCHES * recipe.global_batch, config.seed)
            result = fit(short, partial, run, dist_env, limit)
    finally:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {"images_per_second": round(result["images_per_second"], 1)}


def timed_sizes(recipe: Recipe) -> list[int]:
    """Return the image sizes to be timed, px: all of the schedule, or some from smallest to largest."""
    sizes = sorted(set(recipe.sizes))
    if len(sizes) <= SIZES:
        return sizes
    return [sizes[round(i * (len(sizes) - 1) / (SIZES - 1))] for i in range(SIZES)]


@dataclass
class _ShortRecipe(Recipe):
    """A recipe with a given size of each epoch."""

    passes: list[int] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        return self.passes


class _PartialDataset(DatasetReader):
    """A dataset with some of its validation images, drawn at random, and all of the others."""

    def __init__(self, store: DatasetReader, images: int, seed: int) -> None:
        self.folder, self.manifest, self.shards = store.folder, store.manifest, store.shards
        self._images, self._seed = images, seed

    def open_split(self, name: str) -> SplitReader:
        split = super().open_split(name)
        if name == "val" and len(split) > self._images:
            chosen = np.random.default_rng(self._seed).permutation(len(split))[: self._images]
            return SplitReader(self, split.index[np.sort(chosen)])
        return split
