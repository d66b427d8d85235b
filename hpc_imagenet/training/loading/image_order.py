"""The order of the images of an epoch: a random permutation, of the whole split or within windows.

A permutation of the whole split reads single images at random places of the shards. With a window, the
order is less random and the reads are long. The split is cut into blocks of `BLOCK` consecutive images,
beginning at a random image, and the blocks are distributed at random over streams of equal length. Each
step takes equally many images from every stream, and each stream is shuffled within a window of some steps.
So a window is a set of blocks, whose images can be read in the order of the shards.

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
        blocks = _Blocks(self, epoch)
        for number in range(start // self.window_steps, -(-self.steps // self.window_steps)):
            batches = self._window(blocks, epoch, number)
            yield from batches[max(0, start - number * self.window_steps) :]

    @property
    def streams(self) -> int:
        """Number of streams: a power of two that divides the batch, with a block of each in a window."""
        streams = math.gcd(self.batch, STREAMS)
        while streams > 1 and self.window_steps * self.batch < streams * BLOCK:
            streams //= 2
        return streams

    def _window(self, blocks: _Blocks, epoch: int, number: int) -> Indices:
        """Return the global batches of a window, shape [steps, batch]."""
        streams, share = self.streams, self.batch // self.streams  # images of each stream in a step
        first = number * self.window_steps
        steps = min(self.window_steps, self.steps - first)
        images = blocks.images_at(np.arange(first * share, (first + steps) * share))
        np.random.default_rng([self.seed, epoch, _WINDOW, number]).permuted(images, axis=1, out=images)
        batches: Indices = images.reshape(streams, steps, share).transpose(1, 0, 2).reshape(steps, self.batch)
        return batches


class _Blocks:
    """The blocks of each stream in one epoch: 8 bytes per block, and no list of the images.

    Blocks follow each other from a random image on, and after the last image from the first on. The last
    block of a stream is shorter, unless the length of the streams is a multiple of `BLOCK`.
    """

    def __init__(self, order: ImageOrder, epoch: int) -> None:
        length = order.steps * order.batch // order.streams
        sizes = np.full((order.streams, -(-length // BLOCK)), BLOCK)
        sizes[:, -1] -= sizes.shape[1] * BLOCK - length
        rng = np.random.default_rng([order.seed, epoch])
        self._images, first = order.images, int(rng.integers(order.images))
        placed = rng.permutation(sizes.size)  # the blocks in the order of the split
        ends = first + np.cumsum(sizes.flat[placed])
        self._begins = np.empty_like(sizes)
        self._begins.flat[placed] = ends - sizes.flat[placed]

    def images_at(self, positions: npt.NDArray[np.int64]) -> Indices:
        """Return the images at some positions of every stream, shape [streams, positions]."""
        images = (self._begins[:, positions // BLOCK] + positions % BLOCK) % self._images
        indices: Indices = images.astype(np.uint32)
        return indices


def permutation(images: int, seed: int, epoch: int) -> Indices:
    """Return the order of the images in one epoch, shape [images]: 4 bytes per image."""
    order = np.arange(images, dtype=np.uint32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order
