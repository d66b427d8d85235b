"""Initial weights: published weights in torchvision's cache, a file, or the checkpoint of a run.

Nothing is downloaded, because compute nodes often have no internet access. The error for missing weights
contains the command that downloads them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from hpc_imagenet.config.names.backbones import is_weights_name
from hpc_imagenet.errors import UserError

State = Mapping[str, Tensor]

# The published DenseNet weights use old names for the layers of a block.
_DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


def load_weights(
    model: nn.Module, name: str, weights: str, averaged: bool = True, classifier: Collection[str] = ()
) -> bool:
    """Load initial weights into `model`; a classifier for other classes is not changed.

    Args:
        model: the network as built, on the CPU.
        name: name of the backbone.
        weights: a torchvision name, such as IMAGENET1K_V2, or a file.
        averaged: whether to take the EMA weights of a checkpoint, if it has any.
        classifier: names of the classifier's weights, if the file is known to have them for other classes; a
            different number is found here.

    Returns:
        Whether the classifier's weights were loaded too.

    Raises:
        UserError: the weights do not exist or belong to another network.
    """
    setting = f"model.weights={weights}"
    path = cached_weights(name, weights, setting)[1] if is_weights_name(name, weights) else Path(weights)
    state, mismatches = match_names(model, read_weights(path, setting, averaged))
    expected, classifiers = model.state_dict(), tuple(f"{layer}." for layer in classifier_names(model))
    other = [key for key in mismatches if not key.startswith(classifiers) and key not in classifier]
    if other or (mismatches and any(_shape(state, key) is None for key in mismatches)):
        raise UserError(
            f"{setting}: {shape_difference((other or mismatches)[0], state, expected)} of this {name}: "
            "use weights of this model, the same recipe.size, or model.stem=standard"
        )
    left_out = {*mismatches, *classifier}
    for key in left_out:
        del state[key]
    model.load_state_dict(state, strict=False)
    return not left_out


def match_names(model: nn.Module, weights: State) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Rename weights to the names that `model` uses.

    Auxiliary heads that the model does not have are dropped. Old files use other names for some DenseNet
    layers and lack batch norm's batch counters.

    Returns:
        The renamed weights, and the sorted names that are missing on one side or differ in shape.
    """
    expected = model.state_dict()
    state = OrderedDict((_DENSE.sub(r"\1", key), value) for key, value in weights.items())
    for key in [key for key in state if key not in expected and _is_auxiliary(key)]:
        del state[key]
    for key in expected:
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, expected[key])
    # MNASNet reads the version of its weights from the metadata.
    state._metadata = getattr(weights, "_metadata", expected._metadata)  # type: ignore[attr-defined]
    return state, [key for key in sorted({*expected, *state}) if _shape(expected, key) != _shape(state, key)]


def shape_difference(key: str, weights: State, expected: State) -> str:
    """Describe the difference of one weight's shape between a file and a network."""
    return f"{key} is {_shape_text(weights, key)} in the file and {_shape_text(expected, key)} in the network"


def read_weights(path: Path, setting: str, averaged: bool = True) -> State:
    """Return the weights in a file: a state dict, or a checkpoint of a run.

    Args:
        path: path of the file.
        setting: the user's input, such as `model.weights=FILE`, for the error.
        averaged: whether to take the EMA weights of a checkpoint, if it has any.

    Raises:
        UserError: no such file, the file contains no weights, or safetensors is not installed.
    """
    try:
        state = _read(path)
    except FileNotFoundError:
        raise UserError(f"{setting}: no such file") from None
    except ModuleNotFoundError:
        install = "pip install -c constraints.txt -e '.[export]' in the checkout"
        raise UserError(f"{setting} needs safetensors: {install}") from None
    except Exception as error:  # torch raises many types of errors for invalid files
        raise UserError(f"{setting}: not a file of weights ({_first_line(error)})") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        inner = state["state_dict"]
        order = ("ema_model.", "model.") if averaged else ("model.",)
        prefixes = [p for p in order if any(key.startswith(p) for key in inner)]
        prefix = prefixes[0] if prefixes else ""  # none: of another program
        state = {key.removeprefix(prefix): v for key, v in inner.items() if key.startswith(prefix)}
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{setting}: not a file of weights (not a mapping from names to tensors)")
    return state


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # of the extras timm and export

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def cached_weights(name: str, version: str, setting: str) -> tuple[Any, Path]:
    """Return published weights in torchvision's cache, and their file.

    Args:
        name: name of the backbone.
        version: such as IMAGENET1K_V1; empty: torchvision's default if cached, else any cached version.
        setting: the user's input, such as `model.weights=NAME`, for the error.

    Raises:
        UserError: no weights of that name exist, or they are not on disk.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    published = list(models.get_model_weights(name))
    candidates = [entry for entry in published if version in ("", entry.name)]
    if not candidates:
        raise UserError(
            f"{setting} is unknown for {name}; one of: {', '.join(e.name for e in published) or 'none'}"
        )
    candidates.sort(key=lambda entry: entry != models.get_model_weights(name).DEFAULT)
    for entry in candidates:
        path = folder / entry.url.rsplit("/", 1)[-1]
        if path.is_file():
            return entry, path
    raise UserError(
        f"{setting}: not on disk; download it on a machine with internet access: "
        f"wget -P {folder} {candidates[0].url}"
    )


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifier's layers: timm's, or the last linear or convolution layer."""
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and (known := cfg.get("classifier")):
        return (known,) if isinstance(known, str) else tuple(known)
    layers: list[str] = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    return tuple(layers[-1:])


def freeze_backbone(model: nn.Module) -> None:
    """Freeze all weights except the classifier's."""
    model.requires_grad_(False)
    for name in classifier_names(model):
        model.get_submodule(name).requires_grad_(True)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message after torch's headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0]).rstrip(".") if lines else type(error).__name__


def _is_auxiliary(key: str) -> bool:
    return key.startswith(("aux1.", "aux2.", "AuxLogits."))


def _shape(state: State, key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _shape_text(state: State, key: str) -> str:
    shape = _shape(state, key)
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
