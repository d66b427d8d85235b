"""BlurPool: blur the input of strided convolutions, for features that are less sensitive to shifts.

Zhang 2019 (arXiv:1904.11486), as in ffcv-imagenet: a 3x3 binomial filter before the strided convolution. The
first layer, with three input channels, is left unchanged. The names of the weights do not change, so
published weights can be loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_CHANNELS = 16  # input channels


class BlurConv2d(nn.Conv2d):
    """A strided convolution of the blurred input."""

    blur: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Map [batch, in, side, side] to [batch, out, side / stride, side / stride]."""
        channels = images.shape[1]
        return super().forward(
            F.conv2d(images, self.blur.expand(channels, 1, 3, 3), padding=1, groups=channels)
        )


def blur_before_halving(model: nn.Module) -> int:
    """Add the blur filter to all strided convolutions of `model`, and return their number."""
    strided = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Conv2d and max(layer.stride) > 1 and layer.in_channels >= MIN_CHANNELS
    ]
    row = torch.tensor([1.0, 2.0, 1.0])
    for layer in strided:
        layer.__class__ = BlurConv2d  # keeps the layer's weights and their names
        layer.register_buffer("blur", torch.outer(row, row)[None, None] / 16, persistent=False)
    return len(strided)
