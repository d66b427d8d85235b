"""Build a user's own network from the source that was frozen at submission (`model.source`).

The files are imported from the config, not from disk, on every rank alike. They take precedence over files of
the same name, which may have been edited since.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import linecache
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hpc_imagenet.config.names.own_network import file_hash, split_name
from hpc_imagenet.config.recipe import Model, Recipe
from hpc_imagenet.errors import UserError, first_line

_PREFIX = "model.source/"  # of file names in tracebacks


def build_own(model: Model, recipe: Recipe, classes: int) -> nn.Module:
    """Return the network that a user's factory makes, after a forward pass of the recipe's sizes.

    Args:
        model: settings of the model; `source` holds its files.
        recipe: sizes of the images.
        classes: number of outputs of the last layer, the argument `num_classes` of the factory.

    Raises:
        UserError: the factory or the forward pass fails, or returns another shape than [batch, classes].
    """
    setting = f"model.name={model.name}"
    if model.stem == "small":
        raise UserError(f"model.stem=small is for networks of torchvision and timm, not for {model.name}")
    module, factory = split_name(model.name)
    try:
        network = getattr(_import(model, module), factory)(num_classes=classes, **model.options)
    except UserError:
        raise
    except Exception as error:
        raise _failed(error, f"{setting} cannot be built") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{setting} returns {type(network).__name__} instead of a torch.nn.Module")
    for name in ("size", "val_size", "start_size"):
        if side := getattr(recipe, name):
            _check_output(network, classes, side, f"{setting} with recipe.{name}={side}")
    return network


def _import(model: Model, module: str) -> ModuleType:
    """Import the module of a network, from its frozen source or, if that is empty, as installed."""
    _FrozenFinder.activate(model.source)
    imported = importlib.import_module(module)
    if not model.source and model.source_hash is not None:
        file = Path(imported.__file__ or "")
        if not file.is_file() or file_hash(file) != model.source_hash:
            raise UserError(
                f"model.name={model.name}: {file} has changed since this run was submitted: submit it again"
            )
    return imported


def _check_output(network: nn.Module, classes: int, side: int, setting: str) -> None:
    """Raise unless evaluation maps two images of `side` px to [2, classes]."""
    training = network.training
    try:
        with torch.no_grad():
            output: Any = network.eval()(torch.zeros(2, 3, side, side))
    except Exception as error:
        if torch.cuda.is_available():  # it may run on a GPU only: the first step shows that
            return
        raise _failed(error, f"{setting}: the forward pass fails") from None
    finally:
        network.train(training)
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise UserError(f"{setting}: in evaluation the network returns {kind} instead of a tensor")
    if output.shape != (2, classes):
        raise UserError(
            f"{setting}: for 2 images the network returns {list(output.shape)} instead of [2, {classes}],"
            " a logit for each of num_classes"
        )


def _failed(error: Exception, what: str) -> UserError:
    """Print the traceback of a user's code, and return its last line as an error, with the place."""
    traceback.print_exc()
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(_PREFIX)]
    place = f" ({frames[-1].filename.removeprefix(_PREFIX)} line {frames[-1].lineno})" if frames else ""
    return UserError(f"{what}: {type(error).__name__}: {first_line(error)}{place}")


class _FrozenFinder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):  # type: ignore[misc]
    """Imports modules from texts.

    Args:
        files: text by path, such as my/package.py; a folder without __init__.py is a namespace package.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)

    @classmethod
    def activate(cls, files: Mapping[str, str]) -> None:
        """Import from `files` from now on, and no longer from those of an earlier call."""
        active = [finder for finder in sys.meta_path if isinstance(finder, cls)]
        if [finder.files for finder in active] == [dict(files)]:
            return
        for finder in active:
            sys.meta_path.remove(finder)
        finder = cls(files)
        for name, module in list(sys.modules.items()):
            loader = getattr(module, "__loader__", None)
            if isinstance(loader, cls) or finder.find_spec(name):  # of an earlier call, or from disk
                del sys.modules[name]
        for file in [file for file in linecache.cache if file.startswith(_PREFIX)]:
            del linecache.cache[file]  # lines for tracebacks
        if files:
            sys.meta_path.insert(0, finder)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a frozen module; None for other modules."""
        stem = fullname.replace(".", "/")
        for file, is_package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
            if file in self.files:
                found = importlib.machinery.ModuleSpec(
                    fullname, self, origin=_PREFIX + file, is_package=is_package
                )
                found.has_location = True  # sets __file__
                return found
        if any(file.startswith(f"{stem}/") for file in self.files):
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        return None

    def get_filename(self, fullname: str) -> str:
        """Return the path of a module, as in tracebacks."""
        spec = self.find_spec(fullname)
        if spec is None or spec.origin is None:
            raise ImportError(f"no frozen source of {fullname}", name=fullname)
        return spec.origin

    def get_data(self, path: str | bytes) -> bytes:
        """Return the text of a file."""
        try:
            return self.files[str(path).removeprefix(_PREFIX)].encode()
        except KeyError:  # a cached compiled file, which importlib looks for first
            raise OSError(f"no frozen source {path!r}") from None
