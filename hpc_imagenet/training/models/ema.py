"""Exponential moving average (EMA) of the weights, evaluated instead of the weights if the recipe sets `ema`.

The average is a second network inside the Lightning module, so that checkpoints, moves to a device and
resuming include it. Batch norm statistics are averaged like the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class EMACallback(pl.Callback):
    """Update the EMA weights `module.ema_model` after every `every` optimizer steps.

    Args:
        decay: weight of the old average in an update, 0 to 1.
        every: steps between two updates; before the first one the average is a copy of the weights.
        warmup: steps during which the average is a copy of the weights, as in torchvision's recipes;
            otherwise the poor early weights would remain in the average for long.
    """

    def __init__(self, decay: float, every: int, warmup: float) -> None:
        self.decay, self.every, self.warmup = decay, every, warmup

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if this batch completed a step that is due."""
        step = trainer.global_step
        early = step < self.every  # else an early validation would evaluate the random initial weights
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and (early or step % self.every == 0):
            update_ema(module.ema_model, module.model, 0.0 if early or step <= self.warmup else self.decay)


def ema_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without gradients."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set `average` to `decay` * average + (1 - `decay`) * model; integer buffers are copied."""
    pairs = list(zip(_tensors(average), _tensors(model), strict=True))
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
