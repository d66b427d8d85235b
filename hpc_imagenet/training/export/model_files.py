"""The files of an export: weights or program of the network, config.json and load.py."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import MNASNet

from hpc_imagenet.config.names.backbones import timm_name
from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.io.printable import escape_name
from hpc_imagenet.training.export import loader_script
from hpc_imagenet.training.export.export_formats import FORMATS
from hpc_imagenet.training.export.plain_network import SOURCE, PlainNetwork, plain_network
from hpc_imagenet.training.models.preprocessing import Preprocessing
from hpc_imagenet.training.trained import TrainedModel

CONFIG = "config.json"
_INLINE = 1.9e9  # bytes of weights: a file of protobuf may have 2 GiB
_TOLERANCE = 1e-3  # relative to the largest logit


def write_files(trained: TrainedModel, name: str, folder: Path) -> PlainNetwork | None:
    """Write all files of an export apart from the model card into `folder`, and load them back.

    Args:
        trained: the network.
        name: name of the format.
        folder: an empty folder.

    Returns:
        The code of the network; None if the file has its program.

    Raises:
        UserError: the format cannot represent this network.
    """
    path, plain = folder / FORMATS[name].file, None
    if FORMATS[name].program:
        script = _write_program(trained, name, path)
    else:
        plain = _plain_network(trained, name)
        script = _write_weights(trained, plain, path)
        for file, text in plain.files.items():
            source = folder / SOURCE / file
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(text, encoding="utf-8")
    (folder / loader_script.NAME).write_text(script, encoding="utf-8")
    text = json.dumps(_config(trained, plain), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    if name != "onnx":  # onnxruntime is not installed where networks are trained
        _check(trained, folder, name)
    return plain


def example_images(preprocessing: Preprocessing, count: int = 2) -> Tensor:
    """Return noise as input of a network, float32 [count, 3, size, size]; the same at each call."""
    side, generator = preprocessing.size, torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator)


def _plain_network(trained: TrainedModel, name: str) -> PlainNetwork:
    try:
        return plain_network(trained.config, trained.network, len(trained.classes))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _unfit(trained, name, error) from None


def _write_weights(trained: TrainedModel, plain: PlainNetwork, path: Path) -> str:
    """Write the weights, and return the script that loads them."""
    state, arguments = trained.network.state_dict(), (plain, trained.preprocessing, len(trained.classes))
    if path.suffix == ".pt":
        torch.save(state, path)
        load = [f"state = torch.load(FOLDER / {path.name!r}, weights_only=True)"]
        return loader_script.torch_script(*arguments, load, ())
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # save_file writes a file that only its owner may read
    # The format has no two names of one tensor.
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path, {"format": "pt"})
    path.chmod(mode)
    read, imports = f"load_file(FOLDER / {path.name!r})", ["from safetensors.torch import load_file"]
    load = [f"state = {read}"]
    if isinstance(trained.network, MNASNet):  # requires the metadata of a state dict, which the file lacks
        imports.append("from collections import OrderedDict")
        load = [f"state = OrderedDict({read})", "state._metadata = model.state_dict()._metadata"]
    return loader_script.torch_script(*arguments, load, tuple(imports))


def _write_program(trained: TrainedModel, name: str, path: Path) -> str:
    """Write a program of any number of images, and return the script that loads it."""
    images = example_images(trained.preprocessing)
    try:
        with _quiet():
            batch = {0: torch.export.Dim("batch", min=1)}
            program = torch.export.export(trained.network, (images,), dynamic_shapes=(batch,))
            if name == "torch_export":
                torch.export.save(program, path)
            else:
                large = sum(value.nbytes for value in program.state_dict.values()) > _INLINE
                model = torch.onnx.export(
                    program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
                )
                assert model is not None
                model.save(path, external_data=large)
    except OSError:
        raise
    except Exception as error:  # the exporters raise errors of many types for what they do not support
        raise _unfit(trained, name, error) from None
    return loader_script.program_script(trained.preprocessing, len(trained.classes), path.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings, which are about torch's own code."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _config(trained: TrainedModel, plain: PlainNetwork | None) -> dict[str, Any]:
    """Return the content of config.json, in timm's form, which the Hugging Face hub knows."""
    preprocessing, classes = trained.preprocessing, len(trained.classes)
    name = trained.config.model.name
    name = timm_name(name).partition(".")[0] or name
    if plain and plain.changes:  # libraries that build it by this name would load the weights into another
        name = f"{name}, changed as in {loader_script.NAME}"
    fraction = preprocessing.size / preprocessing.resize
    while math.floor(preprocessing.size / fraction) < preprocessing.resize:  # timm rounds down
        fraction = math.nextafter(fraction, 0)
    return {
        "architecture": name,
        "num_classes": classes,
        "label_names": [escape_name(", ".join(entry.names)) for entry in trained.classes],
        "label_ids": [entry.wnid for entry in trained.classes],
        "model_args": plain.options if plain else trained.config.model.options,
        "pretrained_cfg": {
            "input_size": [3, preprocessing.size, preprocessing.size],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "crop_pct": fraction,
            "crop_mode": "squash" if preprocessing.squash else "center",
            "num_classes": classes,
        },
    }


def _check(trained: TrainedModel, folder: Path, name: str) -> None:
    """Run load.py's network and compare its logits with those of the trained one.

    Raises:
        UserError: they differ, or the network cannot be loaded.
    """
    images = example_images(trained.preprocessing)
    path = folder / loader_script.NAME
    script: dict[str, Any] = {"__name__": "load", "__file__": str(path)}
    import_path = list(sys.path)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            exec(compile(path.read_text(encoding="utf-8"), path, "exec"), script)
            loaded: nn.Module = script["load_model"]()
        with torch.inference_mode():
            expected, found = trained.network(images), loaded(images)
        difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    except Exception as error:  # whatever its library raises
        raise _unfit(trained, name, error) from None
    finally:
        sys.path[:] = import_path
    if not difference <= _TOLERANCE:
        raise _unfit(trained, name, ValueError(f"its outputs differ by {difference:.1g}"))


def _unfit(trained: TrainedModel, name: str, error: Exception) -> UserError:
    others = ["onnx", "torch_export"] if not FORMATS[name].program else ["state_dict", "safetensors"]
    instead = " or ".join(other for other in others if other != name)
    return UserError(
        f"--format {name} cannot represent this {trained.config.model.name} ({first_line(error)[:200]}): "
        f"take --format {instead}"
    )
