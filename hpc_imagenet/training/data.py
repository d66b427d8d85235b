"""From keys to batches: read by address, decode, transform, stack; by worker processes or right here."""

from __future__ import annotations

import io
import random
import signal
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hpc_imagenet.datastore.store import Split
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.sampler import PADDING, Key
from hpc_imagenet.world import cpus as cpus

Batch = tuple[Tensor, Tensor]  # uint8 [images, 3, size, size] in channels_last order, int64 [images]


LINGER = 30  # s that a worker outlives SIGTERM; Slurm's own KillWait is as long


class View(Protocol):
    """What turns a decoded picture into the one that is trained on."""

    @property
    def size(self) -> int:
        """Px, both sides of the result."""

    def __call__(self, picture: Image.Image, rng: random.Random) -> Image.Image:
        """Return an RGB picture of `size` px a side."""


class Batches(Dataset[Batch]):
    """A split as batches: indexed by a list of keys, not by one, so that a batch is written only once."""

    def __init__(self, split: Split, view: View, seed: int) -> None:
        self.split, self.view, self.seed = split, view, seed

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        """Return the images of `keys` in order; padding is black and has the label -1.

        Raises:
            UserError: an image that cannot be read, by its name.
        """
        size = self.view.size
        pixels = torch.zeros(len(keys), size, size, 3, dtype=torch.uint8)
        labels = torch.full((len(keys),), PADDING)
        target = pixels.numpy()
        for place, (epoch, index) in enumerate(keys):
            if index != PADDING:
                data, labels[place] = self.split.read(index)
                rng = random.Random(f"{self.seed}/{epoch}/{index}")
                target[place] = np.asarray(self.view(self._decode(data, index), rng))
        return pixels.permute(0, 3, 1, 2), labels  # a view: channels_last without a copy

    def _decode(self, data: bytes, index: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = str(error).split(" <_io")[0]  # PIL names the buffer it was given
            raise UserError(
                f"{self.split.store.folder}: image {self.split.name(index)} cannot be read ({reason}):"
                " the archive it came from is damaged; download and process it again"
            ) from None


def loader(
    batches: Dataset[Batch], sampler: Sampler[list[Key]], workers: int, pin: bool
) -> DataLoader[Batch]:
    """Return what yields the batches of `sampler` in its order, whatever the number of workers.

    Args:
        batches: the images.
        sampler: which make up each batch.
        workers: processes that decode; 0: the training process itself does.
        pin: whether to put batches into page-locked memory, for a GPU.
    """
    return DataLoader(
        batches,
        sampler=sampler,
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_leave_signals if workers else None,
        generator=torch.Generator(),  # its own: torch's global one belongs to the model
    )


def _leave_signals(worker: int) -> None:
    # Slurm signals every process of a step, and a worker that dies of it takes down the step that is to be
    # saved. So SIGTERM only sets a term: it is also how the training process ends a worker when it exits.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LINGER))
