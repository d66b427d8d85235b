"""The running average of the weights (EMA), which is what a validation judges where the recipe says so.

It is a second copy of the network within the module, so that checkpoints, devices and resuming need nothing
further. Batch norm's statistics are averaged like the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class EMACallback(pl.Callback):
    """Brings `module.average` up to date behind each step that counts.

    Args:
        decay: share of the old average that stays, at each update.
        every: steps between two updates; before the first one the average is a plain copy.
        warmup: steps in which the average is a plain copy, as in torchvision's recipes: weights that are
            still far off would stay in it for long.
    """

    def __init__(self, decay: float, every: int, warmup: float) -> None:
        self.decay, self.every, self.warmup = decay, every, warmup

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, if this batch ended such a step."""
        step = trainer.global_step
        early = step < self.every  # else a validation before the first update would judge what was drawn
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and (early or step % self.every == 0):
            update_ema(module.average, module.model, 0.0 if early or step <= self.warmup else self.decay)


def ema_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that is not trained."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `average` towards `model` by a share of 1 - `decay`; counters are copied."""
    mine, theirs = _tensors(average), _tensors(model)
    flowing = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in flowing], [b for _, b in flowing], 1 - decay)
    for a, b in zip(mine, theirs, strict=True):
        if not a.is_floating_point():
            a.copy_(b)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
