"""Optimizer, weight decay and learning rate schedule of a recipe."""

from __future__ import annotations

import math

import torch
from torch import nn

from hpc_imagenet.config.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with momentum or AdamW over all parameters of `model`, at the peak learning rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Norm weights and biases are the one-dimensional parameters.
    without_decay = [p for p in parameters if p.ndim < 2 and not recipe.norm_decay]
    ids = {id(p) for p in without_decay}
    groups = [
        {"params": [p for p in parameters if id(p) not in ids], "weight_decay": recipe.weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One fused kernel on GPUs. None rather than False: a checkpoint stores the value, and a run resumed on a
    # GPU would keep False and loop over the tensors.
    fused = all(p.is_cuda for p in parameters) or None
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=fused)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=fused)


def lr_factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Return the learning rate of a step as a factor of the peak: linear warmup, then decay to zero.

    Args:
        step: number of the step, from 0.
        steps: number of steps of the training.
        warmup: number of warmup steps; the first step has a rate above 0.
        schedule: decay after the warmup, cosine or linear.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_norm_momentum(model: nn.Module, momentum: float | None) -> None:
    """Set the momentum (0 to 1) of the running statistics in every batch norm layer; None: no change."""
    if momentum is None:
        return
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = momentum
