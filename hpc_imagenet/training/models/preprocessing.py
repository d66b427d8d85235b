"""Preprocessing of the images of a network: normalization, resizing filter, centre crop of validation.

torchvision's networks and those of a user take ImageNet's mean and standard deviation, and the recipe's crop.
timm's bring mean, standard deviation, filter and crop fraction. `model.preprocessing` replaces single values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hpc_imagenet.config.names.backbones import timm_name
from hpc_imagenet.config.recipe import Model
from hpc_imagenet.config.schema import Config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB, 0 to 1


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the input of a network.

    Attributes:
        mean: of red, green and blue, 0 to 1.
        std: standard deviation of red, green and blue, 0 to 1.
        interpolation: antialiased filter of every resize, bilinear or bicubic; in training too.
        resize: px, short side before the centre crop of validation.
        size: px, side of that crop.
        squash: resize both sides to `resize`, so that the crop changes the aspect ratio and cuts off less.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize: int
    size: int
    squash: bool = False

    def __str__(self) -> str:
        """Return one line for the log."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        sides = "both sides" if self.squash else "short side"
        return (
            f"mean {mean}; std {std}; {self.interpolation}; validation: {sides} to {self.resize} px, "
            f"centre crop of {self.size} px"
        )


def preprocessing(config: Config) -> Preprocessing:
    """Return the preprocessing that training and validation use."""
    recipe, values = config.recipe, {**_own_values(config.model), **config.model.preprocessing}
    fraction = values.get("crop_pct")
    return Preprocessing(
        mean=tuple(values.get("mean", MEAN)),
        std=tuple(values.get("std", STD)),
        interpolation=values.get("interpolation", "bilinear"),
        resize=math.floor(recipe.val_size / fraction) if fraction else recipe.val_resize,
        size=recipe.val_size,
        squash=values.get("crop_mode") == "squash",
    )


def _own_values(model: Model) -> dict[str, Any]:
    """Return what a timm network brings; empty for others."""
    if not timm_name(model.name):
        return {}
    from hpc_imagenet.training.models.timm_networks import published  # slow import, of an extra

    cfg = published(model)
    return {key: getattr(cfg, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
