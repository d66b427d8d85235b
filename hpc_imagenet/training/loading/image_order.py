"""The order of the images of an epoch: a random permutation, of the whole split or within windows.

A permutation of the whole split reads single images at random places of the shards. With a window, the
order is less random and the reads are long. The split is cut into blocks of `BLOCK` consecutive images,
beginning at a random image, and the blocks are put in random order. Up to `STREAMS` streams divide that
sequence evenly. Each step takes equally many images from every stream, and each stream is shuffled within a
window of some steps. So a window is a set of whole blocks, whose images can be read in the order of the
shards.

As the slots of a global batch belong to streams, each rank reads whole blocks too, as long as the number of
ranks (times micro-batches) divides that of the streams. The order never depends on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 64  # consecutive images that are read together: 7 MB of ImageNet's
STREAMS = 1024  # most streams: the largest number of ranks of which each has blocks of its own
_WINDOW = 1  # marks the random numbers of a window; those of an epoch have no mark

Indices = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class ImageOrder:
    """The images of every global batch, as a function of seed, epoch and step.

    The images after the last full global batch are dropped; each epoch drops others.

    Attributes:
        images: number of images of the split.
        seed: seed of the run.
        batch: images of a global batch.
        window: images among which the order is random, rounded up to global batches; None: the whole split.
    """

    images: int
    seed: int
    batch: int
    window: int | None = None

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.images // self.batch

    @property
    def window_steps(self) -> int:
        """Steps of a window; without a window those of an epoch."""
        return self.steps if self.window is None else -(-self.window // self.batch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Indices]:
        """Yield the indices of each global batch of an epoch, shape [batch], from step `start` on."""
        if self.window is None:
            order = permutation(self.images, self.seed, epoch)
            for step in range(start, self.steps):
                yield order[step * self.batch : (step + 1) * self.batch]
            return
        blocks = _Blocks(self.images, self.seed, epoch)
        for number in range(start // self.window_steps, -(-self.steps // self.window_steps)):
            batches = self._window(blocks, epoch, number)
            yield from batches[max(0, start - number * self.window_steps) :]

    def _window(self, blocks: _Blocks, epoch: int, number: int) -> Indices:
        """Return the global batches of a window, shape [steps, batch]."""
        streams = math.gcd(self.batch, STREAMS)
        share = self.batch // streams  # images of each stream in a step
        first = number * self.window_steps
        steps = min(self.window_steps, self.steps - first)
        begins = np.arange(streams) * (self.steps * share) + first * share
        positions = begins[:, None] + np.arange(steps * share)
        rng = np.random.default_rng([self.seed, epoch, _WINDOW, number])
        rng.permuted(positions, axis=1, out=positions)
        order = blocks.images_at(positions).reshape(streams, steps, share)
        batches: Indices = order.transpose(1, 0, 2).reshape(steps, self.batch)
        return batches


class _Blocks:
    """The blocks of a split in the order of an epoch, without a list of the images: 8 bytes per block.

    The blocks begin at a random image and continue from the last image with the first. The last block, which
    may be shorter, remains the last.
    """

    def __init__(self, images: int, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([seed, epoch])
        self._images, self._begin = images, int(rng.integers(images))
        self._order = np.arange(-(-images // BLOCK))
        rng.shuffle(self._order[: images // BLOCK])

    def images_at(self, positions: npt.NDArray[np.int64]) -> Indices:
        """Return the images at some positions of the sequence of blocks."""
        block, offset = np.divmod(positions, BLOCK)
        images = (self._order[block] * BLOCK + offset + self._begin) % self._images
        indices: Indices = images.astype(np.uint32)
        return indices


def permutation(images: int, seed: int, epoch: int) -> Indices:
    """Return the order of the images in one epoch, shape [images]: 4 bytes per image."""
    order = np.arange(images, dtype=np.uint32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order
