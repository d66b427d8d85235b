"""Crop policies (random resized crop, center crop), and crop and resize in 8 bits.

A policy computes the crop before the image is decoded, so that only this part needs decoding. Random policies
take a random generator as an argument, so an image gets the same crop in any thread and on any rank. Resizing
uses torch's antialiased filters; the bilinear one is on average 0.02 grey levels from Pillow's:
`python benchmarks/loader.py`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # px: left, upper, right, lower

ASPECT = (3 / 4, 4 / 3)  # range of width / height of a random crop, Szegedy et al. 2015
MAX_DRAWS = 10


class CropBox(NamedTuple):
    """How to make a square from an image.

    The pixels within `source` are resized to `width` x `height` px; the square with the upper left corner
    `left`, `upper` (px, negative if the result is smaller) is cut out of the result, and mirrored if
    `mirrored`. `interpolation` is the filter of the resize, bilinear or bicubic.
    """

    source: Box
    width: int
    height: int
    left: int = 0
    upper: int = 0
    mirrored: bool = False
    interpolation: str = "bilinear"


class CropPolicy(Protocol):
    """Chooses the crop of an image from its size."""

    @property
    def size(self) -> int:
        """Side of the result, px."""

    def __call__(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Return the crop of an image of `width` x `height` px."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random crop, resized to a square.

    Attributes:
        size: side of the result, px.
        scale: smallest share of the area that is kept.
        flip: probability of mirroring.
        interpolation: filter of the resize, bilinear or bicubic.
    """

    size: int
    scale: float
    flip: float
    interpolation: str = "bilinear"

    def __call__(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Return the crop of an image of `width` x `height` px."""
        box = random_box(width, height, self.scale, rng)
        mirrored = rng.random() < self.flip
        return CropBox(box, self.size, self.size, mirrored=mirrored, interpolation=self.interpolation)


@dataclass(frozen=True)
class CenterCrop:
    """The central square of `size` px, after the short side has been resized to `resize` px.

    With `squash` both sides are resized to `resize` px. What is smaller than the square gets a black border.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    squash: bool = False

    def __call__(self, width: int, height: int, rng: random.Random) -> CropBox:
        """Return the crop of an image of `width` x `height` px."""
        # The long side is truncated and the crop offset rounded as in torchvision, to reproduce the published
        # accuracies of its weights.
        if self.squash:
            wide = high = self.resize
        elif width <= height:
            wide, high = self.resize, int(self.resize * height / width)
        else:
            wide, high = int(self.resize * width / height), self.resize
        left, upper = _half(wide - self.size), _half(high - self.size)
        if (wide, high) == (width, height) and min(left, upper) >= 0:  # so only the crop needs decoding
            return CropBox((left, upper, left + self.size, upper + self.size), self.size, self.size)
        return CropBox((0, 0, width, height), wide, high, left, upper, interpolation=self.interpolation)


def _half(pixels: int) -> int:
    """Return half of what is cut off, rounded, or of a border (negative), truncated, as in torchvision."""
    return round(pixels / 2) if pixels > 0 else int(pixels / 2)


def apply_crop(pixels: Tensor, crop: CropBox, out: Tensor) -> None:
    """Resize, cut and mirror the decoded source of a crop.

    Args:
        pixels: pixels of `crop.source`: uint8 [1, 3, height, width], channels_last, on the CPU.
        crop: crop of the image.
        out: destination: uint8 [1, 3, size, size], channels_last.
    """
    size, resized = out.shape[-1], (crop.height, crop.width)
    if pixels.shape[-2:] != resized:
        # The operator behind F.interpolate(antialias=True), which has no `out` and would need another copy.
        in_place = resized == (size, size) and not crop.mirrored
        target = out if in_place else torch.empty(0, dtype=torch.uint8)
        _RESIZE[crop.interpolation](pixels, resized, False, None, None, out=target)
        if in_place:  # every further operation on a tensor holds the GIL for microseconds
            return
        pixels = target
    cut_square(pixels, crop, out)


def cut_square(pixels: Tensor, crop: CropBox, out: Tensor) -> None:
    """Cut and mirror the square of a crop; black where the image does not reach.

    Args:
        pixels: resized pixels: [1, 3, height, width].
        crop: crop of the image.
        out: destination: uint8 [1, 3, size, size].
    """
    size, left, upper = out.shape[-1], crop.left, crop.upper
    square = pixels[..., max(0, upper) : upper + size, max(0, left) : left + size]
    height, width = square.shape[-2:]
    if min(height, width) < size:
        out.zero_()
        top, side = max(0, -upper), max(0, -left)
        out = out[..., top : top + height, side : side + width]
    out.copy_(square.flip(-1) if crop.mirrored else square)


_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def random_box(width: int, height: int, scale: float, rng: random.Random) -> Box:
    """Draw a crop inside the image with `scale` to 1 of its area and an aspect ratio of 3:4 to 4:3.

    The distribution is that of torchvision's RandomResizedCrop, including its fallback after ten crops that
    do not fit: the largest centered crop with an allowed aspect ratio.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(MAX_DRAWS):
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
