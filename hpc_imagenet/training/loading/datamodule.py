"""The batches of one rank: which images, how they are looked at, on whose threads, for which device."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import SplitReader
from hpc_imagenet.launch.dist_env import DistEnv, available_cpus, pinned_cpus
from hpc_imagenet.training.loading import device_prefetch
from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import CenterCrop, RandomResizedCrop
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler, ValSampler, permutation


class ImageDataModule(pl.LightningDataModule):
    """The loaders of one rank. The training one begins at the trainer's step, which a checkpoint has set.

    Args:
        config: of the run.
        train: the images to train on; each epoch looks at them in the size that the recipe gives it.
        val: the images to judge by.
        share: of this rank in a step.
        world: the tasks.
        place: where the batches are wanted.

    Attributes:
        workers: threads that decode; 0: the training's own does.

    Raises:
        UserError: the place cannot decode, and was to.
    """

    def __init__(
        self,
        config: Config,
        train: SplitReader,
        val: SplitReader,
        share: BatchShare,
        dist_env: DistEnv,
        place: torch.device,
    ) -> None:
        super().__init__()
        recipe, asked = config.recipe, config.loader.workers
        self.seed, self.share, self.dist_env, self.place = config.seed, share, dist_env, place
        self.workers = available_cpus(dist_env) - 1 if asked is None else asked
        options = config.seed, config.loader.on_corrupt == "skip", config.loader.decode == "gpu"
        if config.loader.decode == "gpu":
            line = device_prefetch.check_gpu_decode(place, max(1, self.workers))
            if dist_env.is_rank_zero:
                print(f"loader.decode=gpu: {line}", flush=True)
        views = [RandomResizedCrop(size, recipe.crop_scale, recipe.flip) for size in recipe.sizes]
        self.train = BatchBuilder(train, views, *options)
        self.val = BatchBuilder(val, CenterCrop(recipe.val_size, recipe.val_resize), *options)

    def train_dataloader(self) -> Any:
        """Return the batches from here on."""
        sampler = TrainSampler(len(self.train.split), self.seed, self.share)
        assert self.trainer is not None
        sampler.epoch, sampler.start = divmod(self.trainer.global_step, sampler.steps)
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> Any:
        """Return every image of the val split once over all ranks."""
        share = self.share
        sampler = ValSampler(len(self.val.split), share.images, share.rank, share.size)
        return self._loader(self.val, sampler)

    def _loader(self, batches: BatchBuilder, sampler: Any) -> BatchLoader:
        return BatchLoader(batches, sampler, self.workers, self.place, pinned_cpus(self.dist_env))

    def names(self, step: int) -> list[str]:
        """Return the names of the images of a step (from 0), in all ranks."""
        split, batch = self.train.split, self.share.batch
        epoch, place = divmod(step, len(split) // batch)
        chosen = permutation(len(split), self.seed, epoch)[place * batch : (place + 1) * batch]
        return [split.name(i) for i in chosen.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return what a later attempt takes over."""
        return {"skipped": sorted(self.skipped())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which images earlier attempts could not read."""
        self.train.skipped |= set(state_dict["skipped"])

    def skipped(self) -> set[str]:
        """Return the names of images that could not be read, of both splits, all ranks and attempts."""
        names = self.train.skipped | self.val.skipped
        if dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, names)
            names = set().union(*gathered)
        return names
