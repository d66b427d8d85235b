"""Lightning data module: the train and val loaders of one rank."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus, pinned_cpus
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import SplitReader
from hpc_imagenet.training.loading import device_prefetch
from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import CenterCrop, RandomResizedCrop
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler, ValSampler, permutation
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
        recipe, workers = config.recipe, config.loader.workers
        self.seed, self.share, self.dist_env, self.device = config.seed, share, dist_env, device
        self.workers = available_cpus(dist_env) - 1 if workers is None else workers
        options = config.seed, config.loader.on_corrupt == "skip", config.loader.decode == "gpu"
        if config.loader.decode == "gpu":
            line = device_prefetch.check_gpu_decode(device, max(1, self.workers))
            if dist_env.is_rank_zero:
                print(f"loader.decode=gpu: {line}", flush=True)
        images = preprocessing(config)
        crops = [
            RandomResizedCrop(size, recipe.crop_scale, recipe.flip, images.interpolation)
            for size in recipe.sizes
        ]
        self.train = BatchBuilder(train, crops, *options)
        centre = CenterCrop(images.size, images.resize, images.interpolation, images.squash)
        self.val = BatchBuilder(val, centre, *options)

    def train_dataloader(self) -> Any:
        """Return the train loader, starting at the trainer's global step."""
        sampler = TrainSampler(len(self.train.split), self.seed, self.share)
        assert self.trainer is not None
        sampler.epoch, sampler.start = divmod(self.trainer.global_step, sampler.steps)
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> Any:
        """Return the val loader: each image once over all ranks."""
        share = self.share
        sampler = ValSampler(len(self.val.split), share.images, share.rank, share.size)
        return self._loader(self.val, sampler)

    def _loader(self, batches: BatchBuilder, sampler: Any) -> BatchLoader:
        return BatchLoader(batches, sampler, self.workers, self.device, pinned_cpus(self.dist_env))

    def images(self, step: int) -> list[tuple[str, int]]:
        """Return name and position of each image of a step (counted from 0), over all ranks."""
        split, batch = self.train.split, self.share.batch
        epoch, position = divmod(step, len(split) // batch)
        indices = permutation(len(split), self.seed, epoch)[position * batch : (position + 1) * batch]
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
