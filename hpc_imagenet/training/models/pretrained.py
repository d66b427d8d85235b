"""Weights to begin with: a published set that torchvision's cache holds, a file, or a run's own checkpoint.

Nothing is downloaded: nodes seldom have a way out. What is missing is told with the command that fetches it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from hpc_imagenet.config.recipe import is_weights_name
from hpc_imagenet.errors import UserError

State = Mapping[str, Tensor]

# Networks whose published weights were trained on images that were normalised otherwise.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True},
    "inception_v3": {"transform_input": True},
}
# The published DenseNets are of a time when the layers of a block had other names.
_DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


def constructor_options(name: str, weights: str | None) -> dict[str, Any]:
    """Return what a backbone's constructor must be told besides if it begins with `weights`."""
    return _OPTIONS.get(name, {}) if weights and is_weights_name(weights) else {}


def load_weights(model: nn.Module, name: str, weights: str) -> bool:
    """Give `model` its first weights; a classifier for other classes than theirs is left as it was drawn.

    Args:
        model: as built, on the CPU.
        name: of the backbone.
        weights: a name of torchvision's, such as IMAGENET1K_V2, or a file.

    Returns:
        Whether the classifier fits as well.

    Raises:
        UserError: not there, or of another network.
    """
    said = f"model.weights={weights}"
    found = read_weights(
        Path(weights) if not is_weights_name(weights) else cached_weights(name, weights, said)[1], said
    )
    state, wrong = match_names(model, found)
    wanted, last = model.state_dict(), classifier_name(model)
    other = [key for key in wrong if not key.startswith(f"{last}.")]
    if other or (wrong and any(_shape(state, key) is None for key in wrong)):
        raise UserError(
            f"{said}: {shape_difference((other or wrong)[0], state, wanted)} in {name} as it is asked for: "
            "take its own weights, the same recipe.size, or model.stem=standard"
        )
    for key in wrong:
        del state[key]
    model.load_state_dict(state, strict=False)
    return not wrong


def match_names(model: nn.Module, found: State) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Return weights by the names that `model` has for them, and the names whose shapes are not the same.

    A head that only helped training is left out where the model has none. Files of another time have other
    names for some layers of DenseNets, and do not count batches.
    """
    wanted = model.state_dict()
    state = OrderedDict((_DENSE.sub(r"\1", key), value) for key, value in found.items())
    for key in [key for key in state if key not in wanted and _auxiliary(key)]:
        del state[key]
    for key in wanted:
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, wanted[key])
    # Some networks look there how old the weights are.
    state._metadata = getattr(found, "_metadata", wanted._metadata)  # type: ignore[attr-defined]
    return state, [key for key in sorted({*wanted, *state}) if _shape(wanted, key) != _shape(state, key)]


def shape_difference(key: str, there: State, here: State) -> str:
    """Say what shapes a weight has in a file and in a network."""
    return f"{key} is {_told(there, key)} there and {_told(here, key)}"


def read_weights(path: Path, said: str) -> State:
    """Return the weights in a file: a state dict, or a checkpoint of a run (its average, if it kept one).

    Args:
        path: of the file.
        said: what the user wrote, for the error.

    Raises:
        UserError: no such file, or no weights in it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{said}: no such file") from None
    except Exception as error:  # torch meets nonsense with errors of many kinds
        raise UserError(f"{said}: not a file of weights ({_first_line(error)})") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        inner = state["state_dict"]
        kept = "average." if any(key.startswith("average.") for key in inner) else "model."
        state = {key.removeprefix(kept): v for key, v in inner.items() if key.startswith(kept)}
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{said}: not a file of weights (it holds no tensors by name)")
    return state


def cached_weights(name: str, version: str, said: str) -> tuple[Any, Path]:
    """Return the published weights that lie in torchvision's cache, and their file.

    Args:
        name: of the backbone.
        version: such as IMAGENET1K_V1; empty: the newest that is there.
        said: what the user wrote, for the error.

    Raises:
        UserError: there are none of that name, or they are not on disk.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    every = list(models.get_model_weights(name))
    asked = [one for one in every if version in ("", one.name)]
    if not asked:
        raise UserError(
            f"{said} is unknown to {name}; one of: {', '.join(one.name for one in every) or 'none'}"
        )
    asked.sort(key=lambda one: one != models.get_model_weights(name).DEFAULT)
    for one in asked:
        path = folder / one.url.rsplit("/", 1)[-1]
        if path.is_file():
            return one, path
    raise UserError(
        f"{said}: not on disk, and nothing is downloaded here: where there is internet, "
        f"wget -P {folder} {asked[0].url}"
    )


def classifier_name(model: nn.Module) -> str:
    """Return the name of the layer that tells the classes apart: the last one with weights."""
    layers: list[str] = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    return layers[-1]


def freeze_backbone(model: nn.Module) -> None:
    """Let nothing but the classifier train."""
    model.requires_grad_(False)
    model.get_submodule(classifier_name(model)).requires_grad_(True)


def _first_line(error: Exception) -> str:
    """Return what an error says, without torch's headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0]).rstrip(".") if lines else type(error).__name__


def _auxiliary(key: str) -> bool:
    return key.startswith(("aux1.", "aux2.", "AuxLogits."))


def _shape(state: State, key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _told(state: State, key: str) -> str:
    shape = _shape(state, key)
    return "missing" if shape is None else "x".join(map(str, shape)) or "one number"
