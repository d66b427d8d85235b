"""Python code that builds a network with plain torchvision, plain timm or a user's module.

A small stem or blurred convolutions change single layers of the published network. The code names those
layers: they are found by comparing the network, layer by layer, with the one that the library builds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision import models

from hpc_imagenet.config.names.backbones import implied_options, is_own, timm_name
from hpc_imagenet.config.recipe import is_small
from hpc_imagenet.config.schema import Config
from hpc_imagenet.training.models import blurpool, build

SOURCE = "source"
_IN_TRAINING = ("training", "momentum")  # attributes without a meaning in evaluation


@dataclass(frozen=True)
class PlainNetwork:
    """Code that builds a network with random weights.

    Attributes:
        library: package that has the network: torchvision, timm, or the user's.
        imports: lines at the top of a file, besides torch.
        files: text of the user's files that have the network, by path in the folder `SOURCE` of the export.
        call: expression of the network that the library builds.
        definitions: functions and classes that `changes` use; often empty.
        changes: statements that change layers of `model`; often empty.
        options: arguments of the library's constructor, apart from the number of classes.
    """

    library: str
    imports: tuple[str, ...]
    files: dict[str, str]
    call: str
    definitions: str
    changes: tuple[str, ...]
    options: dict[str, Any]

    @property
    def in_timm(self) -> bool:
        """Whether timm builds the same network by its name."""
        return self.library == "timm" and not self.changes


def plain_network(config: Config, network: nn.Module, classes: int) -> PlainNetwork:
    """Return code that builds a network like `network`, which was built for `config`."""
    name, options = config.model.name, dict(config.model.options)
    if is_own(name):
        module, _, factory = name.partition(":")
        call = f"importlib.import_module({module!r}).{factory}(num_classes={classes}{_arguments(options)})"
        library, source = module.partition(".")[0], config.model.source
        return PlainNetwork(library, ("import importlib",), source, call, "", (), options)
    if timm := timm_name(name):
        from timm import create_model  # slow imports, of an extra

        from hpc_imagenet.training.models.timm_networks import published

        if published(config.model).fixed_input_size:
            options = {"img_size": config.recipe.size, **options}
        library, function = "timm", f"timm.create_model({timm!r}"
        create: Callable[..., nn.Module] = create_model
    else:
        library, options = "torchvision", _torchvision_options(config)
        function, create = f"torchvision.models.get_model({name!r}", models.get_model
    call = f"{function}, num_classes={classes}{_arguments(options)})"
    with torch.random.fork_rng(devices=[]):
        original = create(timm or name, num_classes=classes, **options)
    imports, definitions = [f"import {library}"], ""
    changes = list(_changes(original, network))
    if any(isinstance(layer, blurpool.BlurConv2d) for layer in network.modules()):
        imports += ["from torch import Tensor, nn", "from torch.nn import functional as F"]
        sources = [inspect.getsource(code) for code in (blurpool.BlurConv2d, blurpool.blur_before_halving)]
        definitions = "\n\n".join([f"MIN_CHANNELS = {blurpool.MIN_CHANNELS}\n", *sources])
        changes.append("blur_before_halving(model)")
    return PlainNetwork(library, tuple(imports), {}, call, definitions, tuple(changes), options)


def _arguments(options: dict[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in options.items())


def _torchvision_options(config: Config) -> dict[str, Any]:
    """Return the arguments with which `networks.build_network` calls torchvision's constructor."""
    model, size = config.model, config.recipe.size
    own = build.constructor_arguments(model.name, is_small(model.stem, size), size)
    return {**own, **implied_options(model.name, model.weights), **model.options}


def _changes(original: nn.Module, network: nn.Module, path: str = "") -> Iterator[str]:
    """Yield a statement for each layer that was replaced, and for each changed number in the others."""
    kind = nn.Conv2d if isinstance(network, blurpool.BlurConv2d) else type(network)
    if kind is not type(original) or _shapes(original) != _shapes(network):
        # Only torch's own layers replace others.
        yield f"model.set_submodule({path!r}, torch.nn.{kind.__name__}({network.extra_repr()}))"
        return
    layer = f"model.get_submodule({path!r})" if path else "model"
    for key, value in vars(network).items():
        plain = isinstance(value, bool | int | float | str | tuple) and not key.startswith("_")
        if plain and key not in _IN_TRAINING and value != getattr(original, key, None):
            yield f"{layer}.{key} = {value!r}"
    for name, child in network.named_children():
        yield from _changes(original.get_submodule(name), child, f"{path}.{name}" if path else name)


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in layer.named_parameters(recurse=False)}
