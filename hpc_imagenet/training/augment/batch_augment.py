"""Augmentation of a training batch on its device: TrivialAugment, MixUp or CutMix, random erasing.

TrivialAugment and erasing draw random numbers for the whole global batch from (seed, step), and each rank
uses the rows of its own images, so that the result does not depend on the world size. MixUp and CutMix
combine the images of one device batch; torchvision draws from torch's generator, which is seeded every step.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.training.augment import trivial_augment
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare

# Range of the area share and of the aspect ratio of an erased rectangle; Zhong et al. 2017
AREA, ASPECT = (0.02, 0.33), (0.3, 3.3)
CANDIDATES = 10  # random rectangles per image, of which the first that fits is erased

Rows = npt.NDArray[np.float64]


class BatchAugment:
    """The recipe's augmentations of a device batch.

    Args:
        recipe: the recipe.
        classes: number of classes of the dataset.
        seed: seed of the run.
        share: the rows of a global batch that this rank processes.
    """

    def __init__(self, recipe: Recipe, classes: int, seed: int, share: BatchShare) -> None:
        self.recipe, self.classes, self.seed, self.share = recipe, classes, seed, share
        transforms: list[v2.Transform] = []
        if recipe.mixup:
            transforms.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
        if recipe.cutmix:
            transforms.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
        self._mix = v2.RandomChoice(transforms) if transforms else None

    def augment_pixels(self, images: Tensor, step: int, part: int) -> Tensor:
        """Apply TrivialAugment to uint8 images [batch, 3, side, side] of part `part` of `step`."""
        if self.recipe.augment == "none":
            return images
        return trivial_augment.trivial_augment(images, self._rows(step, part, 3, 2))

    def augment_normalized(
        self, images: Tensor, labels: Tensor, step: int, part: int
    ) -> tuple[Tensor, Tensor]:
        """Apply erasing, MixUp and CutMix to normalized float images.

        Returns:
            Images, and labels [batch], or [batch, classes] if mixed. The label of a padding image is all 0.
        """
        if self.recipe.erase:
            images = erase(images, self._rows(step, part, 1 + 4 * CANDIDATES, 3), self.recipe.erase)
        if self._mix is not None:
            shares = F.one_hot(labels.clamp(min=0), self.classes) * (labels != PADDING)[:, None]
            images, labels = self._mix(images, shares.float())
        return images.contiguous(memory_format=torch.channels_last), labels  # may get lost above

    def _rows(self, step: int, part: int, columns: int, stream: int) -> Rows:
        """Return this part's random numbers from 0 to 1, shape [images, columns].

        `stream` must be above 1: with 0 the numbers would equal those of the sampler's shuffle.
        """
        share = self.share
        numbers = np.random.default_rng([self.seed, step, stream]).random((share.batch, columns))
        shape = (share.accumulate, share.size, share.images, columns)  # as the sampler splits a batch
        rows: Rows = numbers.reshape(shape)[part, share.rank]
        return rows


def erase(images: Tensor, rows: Rows, probability: float) -> Tensor:
    """Set a rectangle of some images to 0, the mean of normalized pixels.

    Args:
        images: [batch, channels, side, side].
        rows: random numbers from 0 to 1, [batch, 1 + 4 * CANDIDATES].
        probability: probability of erasing a rectangle of an image.
    """
    height, width = images.shape[-2:]
    draws = rows[:, 1:].reshape(-1, CANDIDATES, 4)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draws[..., 0])
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(low + (high - low) * draws[..., 1])
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < height) & (w < width)
    top, left = np.floor(draws[..., 2] * (height - h + 1)), np.floor(draws[..., 3] * (width - w + 1))
    boxes = np.stack([top, left, top + h, left + w])  # [4, batch, candidates]
    first = np.argmax(fits, axis=1)  # the first that fits into the image
    chosen = boxes[:, np.arange(len(rows)), first]
    chosen[:, ~(fits.any(axis=1) & (rows[:, 0] < probability))] = 0
    top, left, bottom, right = trivial_augment.to_device(chosen, images.device)[..., None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    down, across = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0)
