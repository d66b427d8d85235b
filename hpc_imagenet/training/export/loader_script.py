"""The script load.py of an export: loads the network, and classifies images with it, without this package."""

from __future__ import annotations

from string import Template

from hpc_imagenet.training.export.plain_network import SOURCE, PlainNetwork
from hpc_imagenet.training.models.preprocessing import Preprocessing

NAME = "load.py"

_SCRIPT = Template('''\
"""Classify images: python load.py IMAGE ...

It needs $needs. As a module: `load_model()`, `preprocess(image)` and `CLASSES`.
"""

import json
import sys
from pathlib import Path

$imports

FOLDER = Path(__file__).resolve().parent
CLASSES = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["label_names"]
MEAN, STD = $mean, $std  # of red, green and blue, 0 to 1
$definitions

def preprocess(image):
    """Return the network's input, float32 [1, 3, $size, $size], of an image of Pillow."""
    image = ImageOps.exif_transpose(image).convert("RGB")
$resize
    left, upper = round((image.width - $size) / 2), round((image.height - $size) / 2)
    pixels = np.asarray(image.crop((left, upper, left + $size, upper + $size)), np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)[None], np.float32)


def load_model():
    """Return $returns."""
$load


def predict(model, images):
    """Return probabilities, [batch, $classes], of preprocessed images, [batch, 3, $size, $size]."""
$predict
    logits = logits - logits.max(1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


if __name__ == "__main__":
    network = load_model()
    for name in sys.argv[1:]:
        probabilities = predict(network, preprocess(Image.open(name)))[0]
        best = np.argsort(-probabilities)[:5]
        print(name + ": " + ", ".join(f"{CLASSES[label]} {probabilities[label]:.1%}" for label in best))
''')

_SHORT_SIDE = """\
    width, height = image.size
    short = min(width, height)
    sides = int($resize * width / short), int($resize * height / short)
    image = image.resize(sides, Image.Resampling.$filter)"""
_BOTH_SIDES = "    image = image.resize(($resize, $resize), Image.Resampling.$filter)"
_TORCH = """\
    with torch.inference_mode():
        logits = model(torch.from_numpy(images)).float().numpy()"""
_ONNX = '    (logits,) = model.run(["logits"], {"images": images})'


def torch_script(
    plain: PlainNetwork, preprocessing: Preprocessing, classes: int, read: list[str], imports: tuple[str, ...]
) -> str:
    """Return the script for a file of weights.

    Args:
        plain: code of the network.
        preprocessing: preprocessing of its images.
        classes: number of classes.
        read: statements that set `state`, the state dict; `FOLDER` is the folder of the script.
        imports: further lines at its top.
    """
    load = [
        *([f"sys.path.insert(0, str(FOLDER / {SOURCE!r}))"] if plain.files else []),
        f"model = {plain.call}",
        *plain.changes,
        *read,
        "model.load_state_dict(state)",
        "return model.eval()",
    ]
    packages = {"torch"} | ({"safetensors"} if imports else set())
    packages |= set() if plain.files else {plain.library}
    return _script(
        preprocessing,
        classes,
        packages=sorted(packages),
        imports=("import torch", *imports, *plain.imports),
        definitions=plain.definitions,
        returns="the network, from preprocessed images to logits",
        load=load,
        predict=_TORCH,
    )


def program_script(preprocessing: Preprocessing, classes: int, file: str) -> str:
    """Return the script for a program of torch.export."""
    return _script(
        preprocessing,
        classes,
        packages=["torch"],
        imports=("import torch",),
        definitions="",
        returns="the network, from preprocessed images to logits",
        load=[f"return torch.export.load(FOLDER / {file!r}).module()"],
        predict=_TORCH,
    )


def onnx_script(preprocessing: Preprocessing, classes: int, file: str) -> str:
    """Return the script for an ONNX model."""
    return _script(
        preprocessing,
        classes,
        packages=["onnxruntime"],
        imports=("import onnxruntime",),
        definitions="",
        returns="the session of onnxruntime",
        load=[f"return onnxruntime.InferenceSession(FOLDER / {file!r})"],
        predict=_ONNX,
    )


def _script(
    preprocessing: Preprocessing,
    classes: int,
    *,
    packages: list[str],
    imports: tuple[str, ...],
    definitions: str,
    returns: str,
    load: list[str],
    predict: str,
) -> str:
    values = {"resize": preprocessing.resize, "filter": preprocessing.interpolation.upper()}
    template = Template(_BOTH_SIDES if preprocessing.squash else _SHORT_SIDE)
    return _SCRIPT.substitute(
        needs=", ".join(["numpy", "pillow", *packages]),
        imports="\n".join(
            sorted({"import numpy as np", "from PIL import Image, ImageOps", *imports}, key=_order)
        ),
        mean=preprocessing.mean,
        std=preprocessing.std,
        definitions=f"{definitions.rstrip()}\n" if definitions else "",
        size=preprocessing.size,
        resize=template.substitute(values),
        returns=returns,
        load="\n".join(f"    {line}" for line in load),
        classes=classes,
        predict=predict,
    )


def _order(line: str) -> tuple[bool, str]:
    """Return the place of a line among the imports."""
    return line.startswith("from"), line.lower()
