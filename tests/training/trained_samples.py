"""Checkpoints as trainings write them, of networks with random weights, without the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tiny_training import tiny_config
from torch import nn

from hpc_imagenet.config.names.own_network import freeze
from hpc_imagenet.config.schema import Config
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.trained import TrainedModel, load_trained

NAMES = ("café", "<b>bold</b>", "a|b", "tab\there", "大きい", "x = y, z")


def config_of(
    name: str,
    size: int = 32,
    val_resize: int | None = None,
    preprocessing: dict[str, Any] | None = None,
    **recipe: Any,
) -> Config:
    """Return a config of a network; all images are `size` px."""
    sizes = {"size": size, "val_size": size, "val_resize": val_resize or size}
    config = tiny_config(**sizes, **recipe)
    config.model = replace(config.model, name=name, preprocessing=preprocessing or {})
    freeze(config.model)
    return config


def write_trained(path: Path, config: Config, names: Sequence[str] = NAMES, ids: Sequence[str] = ()) -> Path:
    """Write a checkpoint with random weights, running statistics of a few batches, and val metrics."""
    torch.manual_seed(1)
    network = build_network(config, len(names), fresh=True)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):  # logits that differ between classes
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.1)
                assert layer.running_var is not None
                layer.running_var.uniform_(0.5, 1.5)
    prefix = "model." if config.recipe.ema is None else "ema_model."
    content = {
        "state_dict": {f"{prefix}{key}": value for key, value in network.state_dict().items()},
        "global_step": 7,
        "identity": {**config.training_identity(), "data": "c0ffee", "code": {"commit": "1234567"}},
        "metrics": {"top1": 0.8125, "top5": 0.96875, "loss": 0.5, "epoch": 2},
        "config": asdict(config),
        "classes": [(ids[label] if ids else f"n{label}", [name]) for label, name in enumerate(names)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def trained_of(folder: Path, name: str, size: int = 32, **recipe: Any) -> TrainedModel:
    """Return a loaded network with random weights."""
    return load_trained(write_trained(folder / "last.ckpt", config_of(name, size, **recipe)))
