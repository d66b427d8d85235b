"""Lightning data module: the train and val loaders of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus, pinned_cpus
from hpc_imagenet.config.loader_key import RECIPE
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import SplitReader
from hpc_imagenet.training.loading import device_prefetch, shared_loader
from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.batch_sequence import BatchSequence
from hpc_imagenet.training.loading.crop import CenterCrop, RandomResizedCrop
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler, ValSampler
from hpc_imagenet.training.loading.shared_loader import SharedBatchLoader
from hpc_imagenet.training.models.preprocessing import preprocessing


class ImageDataModule(pl.LightningDataModule):
    """Train and val loaders of one rank; the train loader starts at the trainer's global step.

    Args:
        config: config of the run.
        train: train split; the image size of each epoch is set by the recipe.
        val: val split.
        share: this rank's share of a global batch.
        dist_env: rank and size of this task.
        device: device of the batches.

    Attributes:
        workers: number of decoding threads; 0: the training thread decodes.

    Raises:
        UserError: loader.decode=gpu, but the device cannot decode.
    """

    def __init__(
        self,
        config: Config,
        train: SplitReader,
        val: SplitReader,
        share: BatchShare,
        dist_env: DistEnv,
        device: torch.device,
    ) -> None:
        super().__init__()
        workers = config.loader.workers
        self.config, self.share, self.dist_env, self.device = config, share, dist_env, device
        self.workers = available_cpus(dist_env) - 1 if workers is None else workers
        if config.loader.decode == "gpu":
            line = device_prefetch.check_gpu_decode(device, max(1, self.workers))
            if dist_env.is_rank_zero:
                print(f"loader.decode=gpu: {line}", flush=True)
        self.train, self.val = builders(config, train, val)
        self._sequence = batch_sequence(config, self.train, self.val, share)
        self._shared = shared_loader.connect(self._sequence, config.recipe.epochs, device)
        self._last_epoch = config.recipe.epochs - 1

    def train_dataloader(self) -> Any:
        """Return the train loader, starting at the trainer's global step."""
        sampler = self.train_sampler()
        assert self.trainer is not None
        sampler.epoch, sampler.start = divmod(self.trainer.global_step, sampler.steps)
        return self._loader(
            self.train, sampler, lambda: self._sequence.train_position(sampler.epoch, sampler.start)
        )

    def train_sampler(self) -> TrainSampler:
        """Return a sampler of the train split, at its first batch."""
        return train_sampler(self.config, len(self.train.split), self.share)

    def val_dataloader(self) -> Any:
        """Return the val loader: each image once over all ranks."""
        share = self.share
        sampler = ValSampler(len(self.val.split), share.images, share.rank, share.size)
        return self._loader(self.val, sampler, lambda: self._sequence.val_position(self._epoch()))

    def _epoch(self) -> int:
        """Return the epoch (from 0) whose validation is due."""
        return min(self.trainer.current_epoch if self.trainer else 0, self._last_epoch)

    def _loader(self, batches: BatchBuilder, sampler: Any, begin: Callable[[], int]) -> BatchLoader:
        arguments = batches, sampler, self.workers, self.device, pinned_cpus(self.dist_env)
        if self._shared is None:
            return BatchLoader(*arguments)
        return SharedBatchLoader(*arguments, shared=self._shared, begin=begin)

    def close(self) -> None:
        """End the connection of a shared loader."""
        if self._shared is not None:
            self._shared.close()

    def images(self, step: int) -> list[tuple[str, int]]:
        """Return name and position of each image of a step (counted from 0), over all ranks."""
        split, order = self.train.split, self.train_sampler().order
        indices = next(order.batches(*divmod(step, order.steps)))
        return [(split.name(i), i) for i in indices.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"skipped": sorted(self.skipped())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the names of images that earlier attempts could not read."""
        self.train.skipped |= set(state_dict["skipped"])

    def skipped(self) -> set[str]:
        """Return the names of unreadable images of both splits, over all ranks and attempts."""
        names = self.train.skipped | self.val.skipped
        if dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, names)
            names = set().union(*gathered)
        return names


def builders(config: Config, train: SplitReader, val: SplitReader) -> tuple[BatchBuilder, BatchBuilder]:
    """Return the builders of the train and val batches of a training."""
    recipe, images = config.recipe, preprocessing(config)
    options = config.seed, config.loader.on_corrupt == "skip", config.loader.decode == "gpu"
    crops = [
        RandomResizedCrop(size, recipe.crop_scale, recipe.flip, images.interpolation) for size in recipe.sizes
    ]
    centre = CenterCrop(images.size, images.resize, images.interpolation, images.squash)
    return BatchBuilder(train, crops, *options), BatchBuilder(val, centre, *options)


def train_sampler(config: Config, images: int, share: BatchShare) -> TrainSampler:
    """Return the sampler of a training, at its first batch.

    Args:
        config: config of the run.
        images: number of images of the train split.
        share: batch of a step and its parts.
    """
    return TrainSampler(images, config.seed, share, window=config.recipe.shuffle_window)


def batch_sequence(
    config: Config, train: BatchBuilder, val: BatchBuilder, share: BatchShare
) -> BatchSequence:
    """Return the sequence of the batches of a training, with what decides their content.

    Args:
        config: config of the run.
        train: builder of the train batches.
        val: builder of the val batches.
        share: batch of a step and its parts.
    """
    images = preprocessing(config)
    values = {name: getattr(config.recipe, name) for name in RECIPE}
    values |= {"seed": config.seed, "train.accumulate": share.accumulate}
    values |= {"loader.on_corrupt": config.loader.on_corrupt, "filter": images.interpolation}
    values |= {"validation crop": [images.resize, images.size, images.squash]}
    values |= {"train images": len(train.split), "val images": len(val.split)}
    values |= {"data": train.split.store.manifest.content}
    return BatchSequence(train, val, train_sampler(config, len(train.split), share), values)
