"""What is done to a whole batch on its device, in training: TrivialAugment, MixUp or CutMix, erasing.

TrivialAugment and erasing draw for every image of the global batch from (seed, step), and each rank takes the
rows of its own images: another world does the same to the same image. MixUp and CutMix pair the images that a
device has at once; torchvision draws for them from torch's generator, which every step seeds anew.
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

AREA, ASPECT, TRIES = (0.02, 0.33), (0.3, 3.3), 10  # of an erased rectangle, Zhong et al. 2017

Rows = npt.NDArray[np.float64]


class BatchAugment:
    """The recipe's augmentations of a device batch.

    Args:
        recipe: what is to be done.
        classes: of the dataset.
        seed: of the run.
        share: which rows of a global batch this rank has.
    """

    def __init__(self, recipe: Recipe, classes: int, seed: int, share: BatchShare) -> None:
        self.recipe, self.classes, self.seed, self.share = recipe, classes, seed, share
        chosen: list[v2.Transform] = []
        if recipe.mixup:
            chosen.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
        if recipe.cutmix:
            chosen.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
        self._mix = v2.RandomChoice(chosen) if chosen else None

    def pixels(self, images: Tensor, step: int, part: int) -> Tensor:
        """Return uint8 images [batch, 3, side, side] after TrivialAugment, of part `part` of `step`."""
        if self.recipe.augment == "none":
            return images
        return trivial_augment.trivial_augment(images, self._rows(step, part, 3, 2))

    def normalised(self, images: Tensor, labels: Tensor, step: int, part: int) -> tuple[Tensor, Tensor]:
        """Return images (float, normalised) and labels: [batch], or [batch, classes] where they are mixed.

        An image that was left out has no share of any class.
        """
        if self.recipe.erase:
            images = erase(images, self._rows(step, part, 1 + 4 * TRIES, 3), self.recipe.erase)
        if self._mix is not None:
            shares = F.one_hot(labels.clamp(min=0), self.classes) * (labels != PADDING)[:, None]
            images, labels = self._mix(images, shares.float())
        return images.contiguous(memory_format=torch.channels_last), labels  # erasing and MixUp may lose it

    def _rows(self, step: int, part: int, columns: int, what: int) -> Rows:
        """Return this part's random numbers from 0 to 1, shape [images, columns].

        `what` is above 1: a zero at the end would draw what the order of an epoch is drawn from.
        """
        share = self.share
        numbers = np.random.default_rng([self.seed, step, what]).random((share.batch, columns))
        shape = (share.accumulate, share.size, share.images, columns)  # as the sampler cuts it
        mine: Rows = numbers.reshape(shape)[part, share.rank]
        return mine


def erase(images: Tensor, rows: Rows, chance: float) -> Tensor:
    """Set a rectangle of some images to 0, the mean of normalised pixels.

    Args:
        images: [batch, channels, side, side].
        rows: random numbers, [batch, 1 + 4 * TRIES].
        chance: of an image to be erased.
    """
    height, width = images.shape[-2:]
    tries = rows[:, 1:].reshape(-1, TRIES, 4)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * tries[..., 0])
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(low + (high - low) * tries[..., 1])
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < height) & (w < width)
    top, left = np.floor(tries[..., 2] * (height - h + 1)), np.floor(tries[..., 3] * (width - w + 1))
    boxes = np.stack([top, left, top + h, left + w])  # [4, batch, tries]
    first = np.argmax(fits, axis=1)  # the first that fits inside the image
    chosen = boxes[:, np.arange(len(rows)), first]
    chosen[:, ~(fits.any(axis=1) & (rows[:, 0] < chance))] = 0
    top, left, bottom, right = trivial_augment.to_device(chosen, images.device)[..., None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    down, across = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0)
