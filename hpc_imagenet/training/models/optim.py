"""What a recipe says about the optimizer: which weights decay, and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from hpc_imagenet.config.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with momentum or AdamW over all parameters of `model`, at the peak learning rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Norms and biases are the vectors among the parameters.
    spared = [p for p in parameters if p.ndim < 2 and not recipe.norm_decay]
    chosen = {id(p) for p in spared}
    groups = [
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel for all tensors. Not False: a run that goes on on a GPU would keep it, and loop over them.
    fused = all(p.is_cuda for p in parameters) or None
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=fused)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=fused)


def lr_factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Return the learning rate of a step as a share of its peak: straight up, then down to zero.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup: steps of the rise, which begins at one step's rise, not at 0.
        schedule: cosine (half a wave) or linear, of the way down.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_norm_momentum(model: nn.Module, momentum: float | None) -> None:
    """Let every batch norm of `model` take that share (0 to 1) of each step into its running statistics."""
    if momentum is None:
        return
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = momentum
