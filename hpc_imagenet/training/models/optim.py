"""Optimizer, weight decay and learning rate schedule of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hpc_imagenet.config.names.backbones import timm_name
from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.errors import UserError, first_line

_SHAPED = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # states that have the shape of their weight


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over all trained parameters of `model`, at the peak learning rate.

    Raises:
        UserError: it does not take the options, or one of them is invalid.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Norm weights and biases are the one-dimensional parameters.
    without_decay = [p for p in parameters if p.ndim < 2 and not recipe.norm_decay]
    ids = {id(p) for p in without_decay}
    groups = [
        {"params": [p for p in parameters if id(p) not in ids], "weight_decay": recipe.weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in recipe.optimizer_options.items()}
    try:
        return _create(recipe, groups, options)
    except (TypeError, ValueError, RuntimeError) as error:
        chosen = f"recipe.optimizer={recipe.optimizer} with recipe.optimizer_options={options}"
        raise UserError(f"{chosen}: {first_line(error)}") from None


def _create(recipe: Recipe, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    name, rate = recipe.optimizer, recipe.learning_rate
    # With dampening the first step of SGD is not the one that `_start_momentum` prepares.
    if options.get("fused") and options.get("dampening"):
        raise ValueError("fused does not go with dampening: leave one of them out")
    if timm := timm_name(name):
        from timm.optim import create_optimizer_v2  # slow import, of an extra

        created = create_optimizer_v2(groups, timm, lr=rate, momentum=recipe.momentum, **options)
    else:
        if name in ("sgd", "adamw"):  # one fused kernel on GPUs
            on_gpus = all(p.is_cuda for group in groups for p in group["params"])
            options = {"fused": (on_gpus and not options.get("dampening")) or None, **options}
        if name == "sgd":
            options = {"momentum": recipe.momentum, **options}
        kinds = {each.lower(): kind for each, kind in vars(torch.optim).items() if each[0].isupper()}
        created = kinds[name](groups, lr=rate, **options)
    optimizer = cast(torch.optim.Optimizer, created)
    if options.get("fused"):
        optimizer.register_load_state_dict_pre_hook(_keep_fused)
        optimizer.register_load_state_dict_post_hook(_start_momentum)
        _start_momentum(optimizer)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state to be loaded, for the fused kernel.

    One that was saved on a CPU selects another kernel, which fails with 16-mixed.
    """
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Start the momentum of a fused SGD at zero, from which its first step is the same: 0.9 * 0 + gradient.

    torch allocates it in the first step, and the kernel writes it unless gradients overflow, as with 16-mixed
    they often do then. The next step would read memory that was never written. A state that has been loaded
    has no momentum for weights that had no gradient, and none at all if it is of a run without momentum.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer_state(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load the optimizer's state in a checkpoint, such as its momentum; rates and decay are not changed.

    Raises:
        UserError: the checkpoint is of another optimizer or network.
    """
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["optimizer_states"][0]
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    problem = ""
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
        problem = "other weights are trained"
    for number, state in saved["state"].items():
        for name, value in state.items():
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) and value.ndim else None
            if not problem and name in _SHAPED and shape != tuple(parameters[number].shape):
                problem = (
                    f"{name} of weight {number} is {shape}, and the weight {tuple(parameters[number].shape)}"
                )
    if problem:
        raise UserError(
            f"recipe.keep_optimizer=true: the optimizer's state in {path} does not fit this training "
            f"({problem}): set recipe.keep_optimizer=false"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


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
