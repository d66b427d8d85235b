"""The batches of a training as one numbered sequence: of each epoch those of train, then those of val."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hpc_imagenet.training.loading.batch_loader import BatchBuilder
from hpc_imagenet.training.loading.sampler import Key, TrainSampler, ValSampler

# Builder of the batches, their keys, and the numbers of their windows, if there are any.
Part = tuple[BatchBuilder, Iterator[list[Key]], Iterator[int] | None]


class BatchSequence:
    """Numbers the device batches of a training; the number of a batch is its position.

    Trainings with equal `values` have the same batches at the same positions.

    Args:
        train: builder of the train batches.
        val: builder of the val batches.
        sampler: order of the train images, for a single process; its position is changed.
        values: what decides the content of the batches, by name, as JSON values.

    Attributes:
        images: images of a batch.
        train_batches: train batches of an epoch; val batches follow them.
    """

    def __init__(
        self, train: BatchBuilder, val: BatchBuilder, sampler: TrainSampler, values: dict[str, Any]
    ) -> None:
        share = sampler.share
        self.train, self.val, self.values = train, val, values
        self._sampler = sampler
        self._val_sampler = ValSampler(len(val.split), share.images)
        self._accumulate = share.accumulate
        self.images = share.images
        self.train_batches, self._val_batches = len(self._sampler), len(self._val_sampler)

    def train_position(self, epoch: int, step: int = 0) -> int:
        """Return the position of the first device batch of a step."""
        return epoch * self._per_epoch + step * self._accumulate

    def val_position(self, epoch: int) -> int:
        """Return the position of the first val batch after an epoch."""
        return epoch * self._per_epoch + self.train_batches

    def end(self, epochs: int) -> int:
        """Return the position after the last batch of a training of this many epochs."""
        return epochs * self._per_epoch

    def shape(self, position: int) -> tuple[int, int]:
        """Return the number of images of a batch and their side in px."""
        epoch, index = divmod(position, self._per_epoch)
        if index < self.train_batches:
            return self.images, self.train.crop_policy(epoch).size
        return self._val_sampler.batch, self.val.crop_policy(0).size

    def largest(self, epochs: int) -> int:
        """Return the bytes of the pixels of the largest batch in this many epochs."""
        starts = [self.train_position(epoch) for epoch in range(epochs)]
        shapes = {self.shape(position) for position in (*starts, self.val_position(0))}
        return max(images * 3 * size * size for images, size in shapes)

    def begins_epoch(self, position: int) -> bool:
        """Whether a position is that of the first batch of an epoch."""
        return position % self._per_epoch == 0

    def parts(self, position: int) -> Iterator[Part]:
        """Yield the parts of the sequence from a position on, train and val in turn, without an end.

        Args:
            position: position of the first batch.

        Returns:
            of each part the builder of its batches, their keys, and the numbers of their windows.
        """
        first, index = divmod(position, self._per_epoch)
        for epoch in itertools.count(first):
            if index < self.train_batches:
                self._sampler.epoch = epoch
                self._sampler.start, done = divmod(index, self._accumulate)
                yield self.train, itertools.islice(self._sampler, done, None), self._sampler.windows(done)
            done = max(0, index - self.train_batches)
            yield self.val, itertools.islice(self._val_sampler, done, None), None
            index = 0

    @property
    def _per_epoch(self) -> int:
        return self.train_batches + self._val_batches
