"""Blur before every convolution that halves, so that what shifts by a pixel gives nearly the same features.

Zhang 2019 (arXiv:1904.11486), in the form of ffcv-imagenet: a 3x3 binomial filter in front of the strided
convolution. The first layer, with its three channels, stays as it is. Names of weights stay too, so published
weights fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 16  # channels


class BlurConv2d(nn.Conv2d):
    """A convolution of stride 2 or more that sees its input blurred."""

    blur: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Map [batch, in, side, side] to [batch, out, side / stride, side / stride]."""
        channels = images.shape[1]
        return super().forward(
            F.conv2d(images, self.blur.expand(channels, 1, 3, 3), padding=1, groups=channels)
        )


def blur_before_halving(model: nn.Module) -> int:
    """Put the filter before the convolutions of `model` that halve, and return their number."""
    found = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Conv2d and max(layer.stride) > 1 and layer.in_channels >= LEAST
    ]
    line = torch.tensor([1.0, 2.0, 1.0])
    for layer in found:
        layer.__class__ = BlurConv2d  # the same layer, with its weights and their names
        layer.register_buffer("blur", torch.outer(line, line)[None, None] / 16, persistent=False)
    return len(found)
