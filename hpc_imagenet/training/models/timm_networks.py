"""Networks of timm: constructor, published weights from the cache, and what timm says about their images.

Nothing is downloaded, because compute nodes often have no internet access. The error for missing weights
contains the command that downloads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_imagenet.config.names.backbones import INSTALL_TIMM, is_weights_name, tagged_name, timm_name
from hpc_imagenet.config.recipe import Model, Recipe, is_small
from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.training.models.build import check_size, shrink_stem
from hpc_imagenet.training.models.pretrained import read_weights

try:
    import timm
    from timm.models import get_pretrained_cfg
except ModuleNotFoundError as missing:
    if missing.name != "timm":
        raise
    raise UserError(INSTALL_TIMM) from None

# Files of a repository of the Hugging Face hub, in timm's order.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def build_timm(model: Model, recipe: Recipe, classes: int, fresh: bool) -> nn.Module:
    """Return a network of timm, with random weights from torch's global generator or published ones.

    Args:
        model: settings of the model.
        recipe: sizes of the images.
        classes: number of outputs of the last layer.
        fresh: whether to load `model.weights`, if that is a name rather than a file.

    Raises:
        UserError: an unknown option, weights that are missing or do not fit, or a size that the network does
            not take.
    """
    cfg = published(model)
    fixed = cfg.fixed_input_size  # a transformer, which has no stem of strided convolutions
    if fixed and model.stem == "small":
        raise UserError(
            f"model.stem=small does not fit {model.name}, a network of patches:"
            " set model.stem=auto and +model.options.patch_size=PX"
        )
    if reads := sorted({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & {*model.options}):
        raise UserError(f"model.options.{reads[0]} reads a file by itself: set model.weights=FILE")
    arguments = {**({"img_size": recipe.size} if fixed else {}), **model.options}
    weights = model.weights if fresh else None
    if weights and is_weights_name(model.name, weights):
        setting = f"model.weights={weights}"
        state = read_weights(cached_weights(cfg, setting), setting)
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(state)}}
    network = _create(model, _full_name(cfg), classes, recipe.size, arguments)
    loaded = {name: value.shape for name, value in network.state_dict().items()}
    small = not fixed and is_small(model.stem, recipe.size)
    if small:
        shrink_stem(network)
    fix = "set model.stem=standard" if small else f"use {cfg.input_size[-1]}, its own size"
    for setting in ("size", "val_size", "start_size"):
        side = getattr(recipe, setting)
        side = recipe.size if side is None else side
        check_size(network, model.name, f"recipe.{setting}", side, fix if side == recipe.size else "")
    if "pretrained" in arguments:
        state = network.state_dict()
        changed = [name for name in state if loaded.get(name) != state[name].shape]
        if changed:
            raise UserError(
                f"model.weights={weights}: model.stem={model.stem} replaces {changed[0]}:"
                " set model.stem=standard"
            )
    return network


def published(model: Model) -> Any:
    """Return timm's description of the weights that a model names: its own, or those of `model.weights`.

    Raises:
        UserError: timm has no such network.
    """
    name = timm_name(tagged_name(model.name, model.weights))
    try:
        cfg = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        setting = f"model.name={model.name} with model.weights={model.weights}"
        raise UserError(f"{setting}: {first_line(error)}") from None
    if cfg is None:
        raise UserError(f"model.name={model.name} is unknown to timm {timm.__version__}")
    return cfg


def cached_weights(cfg: Any, setting: str) -> Path:
    """Return the file of published weights in the cache of the Hugging Face hub or of torch.

    Args:
        cfg: result of `published`.
        setting: the user's input, such as `model.weights=pretrained`, for the error.

    Raises:
        UserError: none are published, or they are not on disk.
    """
    from huggingface_hub import try_to_load_from_cache  # slow import

    name = _full_name(cfg)
    if not cfg.has_weights:
        raise UserError(f"{setting}: timm has no published weights of {name}: take a file")
    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        for file in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES:
            found: Any = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    if cfg.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rsplit("/", 1)[-1]
        if path.is_file():
            return path
    raise UserError(
        f"{setting}: not on disk; download it on a machine with internet access: "
        f"""python -c "import timm; timm.create_model('{name}', pretrained=True)" """.rstrip()
    )


def _full_name(cfg: Any) -> str:
    return f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)


def _create(model: Model, name: str, classes: int, size: int, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, num_classes=classes, **arguments)
    except TypeError as error:
        setting = f"model.options={model.options}"
        raise UserError(f"{setting} does not fit {model.name}: {first_line(error)}") from None
    except (AssertionError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.name={model.name} with recipe.size={size} cannot be built: {first_line(error)}"
        ) from None
    cfg: Any = network.pretrained_cfg
    cfg.pop("state_dict", None)  # else every copy of the network holds the weights twice
    return network
