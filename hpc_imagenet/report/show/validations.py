"""Validations of a training, and how an evaluation differs from them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_imagenet.config.names.backbones import has_crop_fraction
from hpc_imagenet.config.recipe import VAL_SETTINGS
from hpc_imagenet.runs.attempt import is_number
from hpc_imagenet.runs.metrics_file import validation_rows


def validations(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last validation in a metrics.csv, and the best one, which is the first with its top-1.

    Returns:
        `last` and `best`, each with step, epoch, top1, top5 and loss; empty if there is no validation.
    """
    rows = validation_rows(path)
    return {"last": rows[-1], "best": max(rows, key=lambda row: row["top1"])} if rows else {}


def validation_settings(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return val_size, val_resize (px) and val_flip of a frozen config; None where it does not have them.

    val_resize is None also where a crop fraction replaces it.
    """
    recipe, model = frozen.get("recipe"), frozen.get("model")
    found = {name: recipe.get(name) if isinstance(recipe, dict) else None for name in VAL_SETTINGS}
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # damaged values
        if model and has_crop_fraction(model["name"], model.get("preprocessing") or {}):
            found["val_resize"] = None
    return {
        name: value if is_number(value) or isinstance(value, bool) else None for name, value in found.items()
    }


def validation_difference(settings: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Return how an evaluation differs from the validation of its training: `288 of 320 px, mirrored`.

    Args:
        settings: val_size, val_resize and val_flip of the evaluation.
        training: those of its training; empty if they are unknown: then the size is named in any case.
    """
    size, resize, flip = (settings[name] for name in VAL_SETTINGS)
    parts = []
    if None not in (size, resize) and training.get("val_resize", resize) != resize:
        parts.append(f"{size} of {resize} px")
    elif size is not None and training.get("val_size") != size:
        parts.append(f"{size} px")
    if bool(flip) != bool(training.get("val_flip")):
        parts.append("mirrored" if flip else "not mirrored")
    return ", ".join(parts)
