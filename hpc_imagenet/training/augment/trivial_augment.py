"""TrivialAugment (wide) of a whole batch on its device: one operation of random strength per image.

Müller and Hutter 2021 (arXiv:2103.10158), with the operations and strengths of torchvision's
TrivialAugmentWide. That one processes single images and synchronises with the device for each; here all
images with the same operation are processed together. Geometric operations are bilinear with black borders,
as in torchvision's recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

BINS = 31  # number of strengths
GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *GEOMETRY, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize")

_GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B
_LIMITS = {"ShearX": 0.99, "ShearY": 0.99, "TranslateX": 32.0, "TranslateY": 32.0, "Rotate": 135.0}

Floats = npt.NDArray[np.float64]


def trivial_augment(images: Tensor, rows: Floats) -> Tensor:
    """Apply a random operation to each image and return uint8 images [batch, 3, side, side].

    Args:
        images: uint8, [batch, 3, side, side].
        rows: random numbers from 0 to 1, [batch, 3]: operation, strength, sign.
    """
    operation = (rows[:, 0] * len(OPERATIONS)).astype(int)
    strength = np.floor(rows[:, 1] * BINS) / (BINS - 1)  # 0 to 1
    return apply_operation(images, operation, np.where(rows[:, 2] <= 0.5, -strength, strength))


def apply_operation(images: Tensor, operation: npt.NDArray[np.int_], strength: Floats) -> Tensor:
    """Apply `OPERATIONS[operation]` of `strength` to each image.

    Args:
        images: uint8, [batch, 3, side, side].
        operation: indexes into `OPERATIONS`, [batch].
        strength: -1 to 1, [batch]; operations without a direction ignore the sign.
    """
    result = images.clone()
    geometry = [OPERATIONS.index(name) for name in GEOMETRY]
    groups: list[tuple[npt.NDArray[np.bool_], Callable[[Tensor, npt.NDArray[np.bool_]], Tensor]]] = [
        (
            np.isin(operation, geometry),
            lambda batch, rows: _transform(batch, operation[rows], strength[rows]),
        ),
    ]
    for number, name in enumerate(OPERATIONS):
        if name in _PIXELS:
            pixels = _PIXELS[name]
            groups.append((operation == number, lambda batch, rows, p=pixels: p(batch, strength[rows])))  # type: ignore[misc]
    for rows, apply in groups:
        if rows.any():
            indexes = to_device(np.flatnonzero(rows), images.device)
            result[indexes] = apply(images[indexes], rows)
    return result


def _transform(images: Tensor, operation: npt.NDArray[np.int_], strength: Floats) -> Tensor:
    """Shear about the upper left corner, translate, or rotate about the centre."""
    side = images.shape[-1]
    names = np.array(OPERATIONS)[operation]
    amount = strength * np.array([_LIMITS[name] for name in names])
    # Maps output points to input points, in coordinates from -1 to 1 with the centre at 0.
    source = np.tile(np.eye(2, 3), (len(names), 1, 1))
    for name, axis in (("ShearX", 0), ("ShearY", 1)):
        rows = names == name
        source[rows, axis, 1 - axis] = source[rows, axis, 2] = amount[rows]
    for name, axis in (("TranslateX", 0), ("TranslateY", 1)):
        rows = names == name
        source[rows, axis, 2] = -np.trunc(amount[rows]) * 2 / side
    rows = names == "Rotate"
    angle = amount[rows] * math.pi / 180
    source[rows, :, :2] = np.stack(
        [np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], 1
    )
    theta = to_device(source.astype(np.float32), images.device)
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def _blend(images: Tensor, degraded: Tensor, strength: Floats) -> Tensor:
    """Interpolate between degraded images and the originals, or extrapolate beyond the originals."""
    factor = to_device((1 + 0.99 * strength).astype(np.float32), images.device)[:, None, None, None]
    return (degraded + factor * (images.float() - degraded)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.float().unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).floor()[:, None]


def _blurred(images: Tensor) -> Tensor:
    """Blur with a 3x3 filter of weights 1, and 5 in the centre; border pixels are not changed."""
    exact = images.float()
    blurred = exact.clone()
    with torch.autocast(images.device.type, enabled=False):
        mean = (9 * F.avg_pool2d(exact, 3, stride=1) + 4 * exact[..., 1:-1, 1:-1]) / 13
    blurred[..., 1:-1, 1:-1] = mean.round()
    return blurred


def _posterize(images: Tensor, strength: Floats) -> Tensor:
    """Keep the highest 8 to 2 bits."""
    bits = 8 - np.rint(np.abs(strength) * 6).astype(np.int64)
    mask = to_device((255 << (8 - bits) & 255).astype(np.uint8), images.device)
    return images & mask[:, None, None, None]


def _solarize(images: Tensor, strength: Floats) -> Tensor:
    """Invert pixels at or above the threshold."""
    threshold = to_device((255 * (1 - np.abs(strength))).astype(np.float32), images.device)
    return torch.where(images >= threshold[:, None, None, None], 255 - images, images)


_PIXELS: dict[str, Callable[[Tensor, Floats], Tensor]] = {
    "Brightness": lambda images, strength: _blend(images, images.new_zeros((), dtype=torch.float), strength),
    "Color": lambda images, strength: _blend(images, _grey(images), strength),
    "Contrast": lambda images, strength: _blend(
        images, _grey(images).mean((1, 2, 3), keepdim=True), strength
    ),
    "Sharpness": lambda images, strength: _blend(images, _blurred(images), strength),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": lambda images, strength: V.autocontrast(images),
    "Equalize": lambda images, strength: V.equalize(images),
}


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy `values` to the device without synchronising with it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
