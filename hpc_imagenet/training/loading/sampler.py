"""Samplers: the images of each batch, as a function of seed, epoch, step, rank and world size.

`ImageOrder` gives the global batches of an epoch. Each is divided among the ranks, so any number of GPUs
sees the same images in the same steps, and a run needs only the step to resume. A sampler yields keys
(epoch, index), and the loader seeds the augmentation of an image by (seed, epoch, index), so it is the same
in any thread of any rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.loading.image_order import ImageOrder

Key = tuple[int, int]  # epoch, index in the split
PADDING = -1  # index and label of a padding entry


@dataclass(frozen=True)
class BatchShare:
    """One rank's share of a global batch.

    Attributes:
        batch: images per step over all ranks.
        rank: rank of this task.
        size: number of ranks.
        accumulate: device batches per step and rank.
    """

    batch: int
    rank: int = 0
    size: int = 1
    accumulate: int = 1

    @property
    def images(self) -> int:
        """Images per device batch."""
        return self.batch // (self.size * self.accumulate)


def batch_share(config: Config, dist_env: DistEnv) -> BatchShare:
    """Return this rank's share of the global batch.

    Raises:
        UserError: the global batch is not divisible by ranks times `train.accumulate`.
    """
    batch, parts = config.recipe.global_batch, dist_env.size * config.train.accumulate
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        near = f"{below} or {above}" if below else str(above)
        accumulate = (
            f" times train.accumulate={config.train.accumulate}" if config.train.accumulate > 1 else ""
        )
        raise UserError(
            f"recipe.global_batch={batch} is not divisible by {dist_env.size} tasks{accumulate}: "
            f"set it to {near}"
        )
    return BatchShare(batch, dist_env.rank, dist_env.size, config.train.accumulate)


def steps_per_epoch(images: int, batch: int) -> int:
    """Return the number of global batches of `batch` images in an epoch of `images` train images.

    Raises:
        UserError: there is none.
    """
    if batch > images:
        raise UserError(
            f"recipe.global_batch={batch} is more than the {images} images of train: set at most {images}"
        )
    return images // batch


class TrainSampler(Sampler[list[Key]]):
    """Yields the keys of each device batch of an epoch, from step `start` on.

    Lightning calls `set_epoch` before every epoch. `len` is that of a whole epoch, as Lightning expects.

    Args:
        images: number of images of the split.
        seed: seed of the run.
        share: this rank's share of a global batch.
        epoch: epoch to begin with.
        start: first step of that epoch.
        window: images among which the order is random; None: all.
    """

    def __init__(
        self,
        images: int,
        seed: int,
        share: BatchShare,
        epoch: int = 0,
        start: int = 0,
        window: int | None = None,
    ) -> None:
        self.order = ImageOrder(images, seed, share.batch, window)
        self.share, self.epoch, self.start = share, epoch, start

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.order.steps

    def __len__(self) -> int:
        return self.steps * self.share.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; a new one starts at its first step."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[Key]]:
        share, epoch = self.share, self.epoch
        for global_batch in self.order.batches(epoch, self.start):
            # Shape [accumulate, ranks, images]: the images of a step are the same for every number of ranks.
            device_batches = global_batch.reshape(share.accumulate, share.size, share.images)[:, share.rank]
            for indices in device_batches:
                yield [(epoch, index) for index in indices.tolist()]

    def windows(self, taken: int = 0) -> Iterator[int] | None:
        """Return the number of the window of each device batch, without an end; None if there are no windows.

        Args:
            taken: device batches that are left out.
        """
        if self.order.window is None:
            return None
        per_step = self.share.accumulate
        batches = itertools.count(self.start * per_step + taken)
        return (batch // (self.order.window_steps * per_step) for batch in batches)


class ValSampler(Sampler[list[Key]]):
    """Yields every image once over all ranks; all ranks get equally many batches of the same size.

    A rank with fewer batches would leave the others waiting in a collective, and a smaller batch would be
    compiled and tuned separately. Batches are filled with `PADDING`: padding by repetition, as in torch's
    DistributedSampler, counts some images twice.

    Args:
        images: number of images of the split.
        batch: largest number of images in a device batch.
        rank: rank of this task.
        size: number of ranks.
    """

    def __init__(self, images: int, batch: int, rank: int = 0, size: int = 1) -> None:
        self.images, self.rank, self.size = images, rank, size
        self._per_rank = -(-images // size)
        self.batch = min(batch, self._per_rank)

    def __len__(self) -> int:
        return -(-self._per_rank // self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        first = self.rank * self._per_rank
        end = min(first + self._per_rank, self.images)
        for begin in range(first, first + self._per_rank, self.batch):
            yield [(0, i if i < end else PADDING) for i in range(begin, begin + self.batch)]
