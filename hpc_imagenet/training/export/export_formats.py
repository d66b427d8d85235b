"""The formats of an export, and what is checked before torch is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.access import expand_home


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        file: name of the file with the weights.
        packages: packages that write it, of the extra `export`.
        program: whether the file has the layers as well as the weights.
        meaning: one line for the help.
    """

    file: str
    packages: tuple[str, ...]
    program: bool
    meaning: str


FORMATS = {
    "state_dict": ExportFormat("model.pt", (), False, "weights by name, for torch.load"),
    "safetensors": ExportFormat("model.safetensors", ("safetensors",), False, "weights by name"),
    "onnx": ExportFormat("model.onnx", ("onnx", "onnxscript"), True, "for onnxruntime and many others"),
    "torch_export": ExportFormat("model.pt2", (), True, "for torch.export.load"),
    "hf": ExportFormat("model.safetensors", ("safetensors",), False, "a folder for the Hugging Face hub"),
}
DEFAULT = "state_dict"


def find_format(name: str) -> ExportFormat:
    """Return a format by its name.

    Raises:
        UserError: the name is unknown, or a package is missing.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name} is unknown{did_you_mean(name, FORMATS)}")
    missing = [package for package in FORMATS[name].packages if not importlib.util.find_spec(package)]
    if missing:
        raise UserError(
            f"--format {name} needs {' and '.join(missing)}: "
            "pip install -c constraints.txt -e '.[export]' in the checkout"
        )
    return FORMATS[name]


def check_target(out: Path) -> Path:
    """Return the absolute path of `out`, a new or an empty folder.

    Raises:
        UserError: it is a file or has files, or its parent does not exist.
    """
    out = expand_home(out).absolute()
    if out.is_dir() and not any(out.iterdir()):
        return out
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists: type a new folder, so that no file is overwritten")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder: create it first")
    return out
