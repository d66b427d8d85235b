"""Names of networks: torchvision's, timm's (`timm/NAME`), and a user's own (`my.package:factory`).

A submission checks them without torch. timm's names are in timm_names.txt, which
`python -m hpc_imagenet.training.models.timm_names` writes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.access import expand_home

BACKBONES = (
    "alexnet",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_16gf",
    "regnet_x_1_6gf",
    "regnet_x_32gf",
    "regnet_x_3_2gf",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_x_8gf",
    "regnet_y_128gf",
    "regnet_y_16gf",
    "regnet_y_1_6gf",
    "regnet_y_32gf",
    "regnet_y_3_2gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "regnet_y_8gf",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_b",
    "swin_s",
    "swin_t",
    "swin_v2_b",
    "swin_v2_s",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet101_2",
    "wide_resnet50_2",
)

TIMM = "timm/"  # before timm's names, of networks and of optimizers
PRETRAINED = "pretrained"  # as model.weights: the weights that timm takes for a name
INSTALL_TIMM = "timm is not installed: pip install -c constraints.txt -e '.[timm]' in the checkout"
_PREPROCESSING: dict[str, tuple[str, ...]] = {  # keys and, where they are words, their values
    **{"mean": (), "std": (), "crop_pct": ()},
    **{"interpolation": ("bilinear", "bicubic"), "crop_mode": ("center", "squash")},
}
# Arguments of networks whose published weights were trained with another normalisation of the images.
IMPLIED_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True},
    "inception_v3": {"transform_input": True},
}
_NAMES = Path(__file__).with_name("timm_names.txt")


@dataclass(frozen=True)
class TimmNames:
    """timm's names in one version of it.

    Attributes:
        version: version of timm.
        optimizers: names of its optimizers.
        networks: tags of the published weights by name of the network; timm's own choice is the first.
    """

    version: str
    optimizers: tuple[str, ...]
    networks: dict[str, tuple[str, ...]]

    def text(self) -> str:
        """Return the content of timm_names.txt."""
        lines = [" ".join((name, *tags)) for name, tags in self.networks.items()]
        return "\n".join((self.version, " ".join(self.optimizers), *lines, ""))


@functools.cache
def timm_names() -> TimmNames:
    """Return the names in timm_names.txt, whether timm is installed or not."""
    version, optimizers, *networks = _NAMES.read_text().splitlines()
    split = (line.split() for line in networks)
    return TimmNames(version, tuple(optimizers.split()), {name: tuple(tags) for name, *tags in split})


def timm_name(name: str) -> str:
    """Return timm's own name of a `timm/NAME`; empty for other names."""
    return name.removeprefix(TIMM) if name.startswith(TIMM) else ""


def is_own(name: str) -> bool:
    """Whether this names a user's own network, `my.package:factory`."""
    return ":" in name


def is_weights_name(network: str, weights: str) -> bool:
    """Whether `model.weights` is the name of published weights of a network, rather than a file."""
    if is_own(network):
        return False
    return re.fullmatch("[a-z0-9_]+" if timm_name(network) else "[A-Z][A-Z0-9_]*", weights) is not None


def implied_options(network: str, weights: str | None) -> dict[str, Any]:
    """Return the constructor arguments of a network that its published `weights` require."""
    return IMPLIED_OPTIONS.get(network, {}) if weights and is_weights_name(network, weights) else {}


def tagged_name(network: str, weights: str | None) -> str:
    """Return the name of a network, of timm with the tag of its published `weights` if they name one."""
    if weights and weights != PRETRAINED and timm_name(network) and is_weights_name(network, weights):
        return f"{network.partition('.')[0]}.{weights}"
    return network


def check_name(setting: str, name: str) -> None:
    """Raise unless `name` can be the name of a network; whether an own network exists is checked elsewhere.

    Args:
        setting: the user's input before `=`, such as `model.name`, for the error.
        name: name of the network.

    Raises:
        UserError: an unknown name, with near ones, or timm is not installed.
    """
    if timm := timm_name(name):
        installed = check_timm(f"{setting}={name}")
        if not _is_known_to_timm(timm) and installed == timm_names().version:
            raise UserError(f"{setting}={name} is unknown{did_you_mean(name, _timm_choices(timm))}")
    elif not is_own(name) and name not in BACKBONES:
        raise UserError(f"{setting}={name} is unknown{suggest(name)}")


def check_weights(network: str, weights: str) -> None:
    """Raise unless `weights` are an existing file, or can be the name of published weights of a network.

    Raises:
        UserError: no such file, or no such name.
    """
    setting = f"model.weights={weights}"
    if not is_weights_name(network, weights):
        if Path(weights).is_file():
            return
        others = "" if is_own(network) else f", and no name such as {example(network).partition(',')[0]}"
        raise UserError(f"{setting}: no such file{others}")
    name, _, tag = timm_name(network).partition(".")
    tags = timm_names().networks.get(name, ())
    if not name or (weights == PRETRAINED and tag) or check_timm(setting) != timm_names().version:
        return
    if not tags:
        raise UserError(f"{setting}: timm has no published weights of {network}: take a file")
    if tag and weights != tag:
        raise UserError(f"{setting}: {network} has the weights {tag}: set model.weights={PRETRAINED}")
    if weights not in (PRETRAINED, *tags):
        raise UserError(f"{setting} is unknown for {network}{did_you_mean(weights, tags)}")


def check_preprocessing(values: Mapping[str, Any]) -> None:
    """Check `model.preprocessing`.

    Raises:
        UserError: names the value and what it can be.
    """
    for key, value in values.items():
        setting = f"model.preprocessing.{key}={value}"
        if key not in _PREPROCESSING:
            raise UserError(f"{setting} is unknown{did_you_mean(key, _PREPROCESSING)}")
        if choices := _PREPROCESSING[key]:
            if value not in choices:
                raise UserError(f"{setting} is unknown{did_you_mean(str(value), choices)}")
        elif key == "crop_pct":
            if not (_is_number(value) and 0 < value <= 1):
                raise UserError(f"{setting} is not a fraction above 0, and at most 1")
        elif not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            raise UserError(f"{setting} is not three numbers, of red, green and blue, such as [0.5,0.5,0.5]")
        elif key == "std" and min(value) <= 0:
            raise UserError(f"{setting} must be more than 0")


def has_crop_fraction(network: str, preprocessing: Mapping[str, Any]) -> bool:
    """Whether a crop fraction decides the resizing before validation, in place of recipe.val_resize.

    Args:
        network: name of the network; all of timm's bring one.
        preprocessing: `model.preprocessing`.
    """
    return bool(timm_name(network) or preprocessing.get("crop_pct"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def example(network: str) -> str:
    """Return what `model.weights` can be for a network, for an error."""
    if is_own(network):
        return "FILE"
    return f"{PRETRAINED if timm_name(network) else 'IMAGENET1K_V1'}, or a file"


def check_timm(value: str) -> str:
    """Return the version of the installed timm; `value` is the user's input, for the error.

    Raises:
        UserError: timm is not installed.
    """
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{value}: {INSTALL_TIMM}") from None


def suggest(name: str, choices: tuple[str, ...] = BACKBONES) -> str:
    """Return `; did you mean: …` with near names among `choices` and timm's networks."""
    if name.strip("/") == TIMM.strip("/"):
        return f"; write {TIMM}NAME, such as {TIMM}resnet50"
    if name in timm_names().networks:
        return f"; timm has it: {TIMM}{name}"
    if own := _own_form(name):
        return f"; for a network of your own write {own}"
    return did_you_mean(name, (*choices, *(f"{TIMM}{network}" for network in timm_names().networks)))


def _own_form(name: str) -> str:
    """Return the form that a path of a Python file, or the name of one in this folder, should have."""
    path, _, factory = name.partition(":")
    file = expand_home(path)
    if file.suffix != ".py":
        return f"{name}:FACTORY" if name.isidentifier() and Path(f"{name}.py").is_file() else ""
    where = "" if file.absolute().parent == Path.cwd() else f", in the folder {file.absolute().parent}"
    return f"{file.stem}:{factory or 'FACTORY'}{where}"


def _is_known_to_timm(name: str) -> bool:
    network, dot, tag = name.partition(".")
    tags = timm_names().networks.get(network)
    return tags is not None and (not dot or tag in tags)


def _timm_choices(name: str) -> list[str]:
    """Return the names that a misspelt one may have meant: with tags only if its network is known."""
    network = name.partition(".")[0]
    if tags := timm_names().networks.get(network):
        return [f"{TIMM}{network}.{tag}" for tag in tags]
    return [f"{TIMM}{known}" for known in timm_names().networks]
