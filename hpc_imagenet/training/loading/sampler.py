"""Which images make up which batch: pure functions of seed, epoch, position and world.

An epoch is one permutation of the split, drawn from (seed, epoch) and cut into global batches. Each global
batch is shared out over the ranks, so another number of GPUs sees the same images in the same steps, and a
run that goes on from step s needs nothing but s. Images travel as keys (epoch, index): whoever decodes one
can seed its augmentation by (seed, epoch, index) and so does the same in any worker of any rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Key = tuple[int, int]  # epoch, index in the split
PADDING = -1  # an index that is no image


@dataclass(frozen=True)
class BatchShare:
    """One rank's part of the work.

    Attributes:
        batch: images a step over all ranks.
        accumulate: parts that a rank takes its share of a step in, one after another.
    """

    batch: int
    rank: int = 0
    size: int = 1
    accumulate: int = 1

    @property
    def images(self) -> int:
        """Images that this rank hands to its device at once."""
        return self.batch // (self.size * self.accumulate)


def permutation(images: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of one epoch, shape [images]."""
    return np.random.default_rng([seed, epoch]).permutation(images)


class TrainSampler(Sampler[list[Key]]):
    """Lists of keys, one a device batch, of one epoch from its step `start` on.

    The images that do not fill a last global batch are left out; the next epoch's order leaves out others.
    Lightning calls `set_epoch` before every epoch; `len` is that of a whole epoch, as its loop counts.
    """

    def __init__(self, images: int, seed: int, share: BatchShare, epoch: int = 0, start: int = 0) -> None:
        self.images, self.seed, self.share = images, seed, share
        self.epoch, self.start = epoch, start

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.images // self.share.batch

    def __len__(self) -> int:
        return self.steps * self.share.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`, unless it is the one that `start` belongs to."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[Key]]:
        share, epoch = self.share, self.epoch
        order = permutation(self.images, self.seed, epoch)
        for step in range(self.start, self.steps):
            whole = order[step * share.batch : (step + 1) * share.batch]
            # Shape [accumulate, ranks, images]: what is summed up to a step is the same for every world.
            mine = whole.reshape(share.accumulate, share.size, share.images)[:, share.rank]
            for part in mine:
                yield [(epoch, index) for index in part.tolist()]


class ValSampler(Sampler[list[Key]]):
    """Every image once over all ranks, in equally many lists on each, filled by `PADDING` to one length.

    Equal, because ranks that run out of batches early leave the others waiting, and a batch of another shape
    would be compiled, and its kernels chosen, for itself; marked, because padding by repetition (the usual
    way) counts some images twice.
    """

    def __init__(self, images: int, batch: int, rank: int = 0, size: int = 1) -> None:
        self.images, self.rank, self.size = images, rank, size
        self._each = -(-images // size)
        self.batch = min(batch, self._each)

    def __len__(self) -> int:
        return -(-self._each // self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        first = self.rank * self._each
        end = min(first + self._each, self.images)
        for begin in range(first, first + self._each, self.batch):
            yield [(0, i if i < end else PADDING) for i in range(begin, begin + self.batch)]
