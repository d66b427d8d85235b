"""What happens to a picture between its file and the batch; all of it in 8 bits.

A view says where the result comes from before anything is decoded, so that only that part need be. The random
ones take their randomness as an argument, so a picture looks the same whoever decodes it. Resizing is torch's
antialiased bilinear filter, on average 0.02 grey levels from Pillow's: `python benchmarks/loader.py`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # px: left, upper, right, lower

ASPECT = (3 / 4, 4 / 3)  # of a random crop, Szegedy et al. 2015
TRIES = 10


class CropBox(NamedTuple):
    """From a picture to a square of it.

    The pixels within `source` are resized to `width` x `height`; of that the square whose upper left corner
    is `left`, `upper` is taken (px), and mirrored or not.
    """

    source: Box
    width: int
    height: int
    left: int = 0
    upper: int = 0
    mirrored: bool = False


class CropPolicy(Protocol):
    """What of a picture is looked at, and how."""

    @property
    def size(self) -> int:
        """Px, both sides of the result."""

    def __call__(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Return what is taken of a picture of that size (px)."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random crop of at least `scale` of the area, resized to `size` px; mirrored with chance `flip`."""

    size: int
    scale: float
    flip: float

    def __call__(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Return what is taken of a picture of that size (px)."""
        box = random_box(width, height, self.scale, rng)
        return CropBox(box, self.size, self.size, mirrored=rng.random() < self.flip)


@dataclass(frozen=True)
class CenterCrop:
    """The middle `size` px of a picture whose short side was resized to `resize` px."""

    size: int
    resize: int

    def __call__(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Return what is taken of a picture of that size (px)."""
        # The long side is cut to whole px and the crop rounded as in torchvision, whose weights' published
        # accuracies we want to meet.
        if width <= height:
            wide, high = self.resize, int(self.resize * height / width)
        else:
            wide, high = int(self.resize * width / height), self.resize
        left, upper = round((wide - self.size) / 2), round((high - self.size) / 2)
        if (wide, high) == (width, height):  # nothing to resize, so the rest need not be decoded
            return CropBox((left, upper, left + self.size, upper + self.size), self.size, self.size)
        return CropBox((0, 0, width, height), wide, high, left, upper)


def apply_crop(pixels: Tensor, crop: CropBox, out: Tensor) -> None:
    """Write what `crop` makes of the pixels of its source.

    Args:
        pixels: uint8 [1, 3, height, width] of the source, in channels_last order, on the CPU.
        crop: what to make of them.
        out: uint8 [1, 3, size, size], in channels_last order.
    """
    size, resized = out.shape[-1], (crop.height, crop.width)
    if pixels.shape[-2:] != resized:
        # What interpolate(antialias=True) calls; that has no `out`, and would write each image twice.
        exact = resized == (size, size)
        target = out if exact else torch.empty(0, dtype=torch.uint8)
        _resize(pixels, resized, False, None, None, out=target)
        pixels = target
    view = pixels[..., crop.upper : crop.upper + size, crop.left : crop.left + size]
    if crop.mirrored:
        out.copy_(view.flip(-1))
    elif view.data_ptr() != out.data_ptr():
        out.copy_(view)


_resize = torch.ops.aten._upsample_bilinear2d_aa.out


def random_box(width: int, height: int, scale: float, rng: random.Random) -> Box:
    """Draw a crop of `scale` to 1 of the area and 3:4 to 4:3 in shape, all of it inside the picture.

    The same distribution as torchvision's RandomResizedCrop, with its way out after ten tries that do not
    fit: the largest crop in the middle whose shape is allowed.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(TRIES):
        area = width * height * rng.uniform(scale, 1)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h
