"""A network with a layer that its forward pass does not use, as a spare head."""

from __future__ import annotations

from torch import Tensor, nn


class UnusedWeights(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).relu().mean((2, 3)))
        return logits


def net(num_classes: int) -> UnusedWeights:
    return UnusedWeights(num_classes)
