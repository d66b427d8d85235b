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
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per channel, of which training takes the upper 8
        image = Image.fromarray((np.asarray(image).astype(int) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
$resize
    over = image.width - $size, image.height - $size  # where negative, a black border
    left, upper = (round(pixels / 2) if pixels > 0 else int(pixels / 2) for pixels in over)
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
    network, failed = load_model(), False
    for name in sys.argv[1:]:
        try:
            with Image.open(name) as image:
                images = preprocess(image)
        except Exception as error:  # a damaged file may raise anything
            print(f"{name}: unreadable: {error}", file=sys.stderr)
            failed = True
            continue
        probabilities = predict(network, images)[0]
        best = np.argsort(-probabilities)[:5]
        print(name + ": " + ", ".join(f"{CLASSES[label]} {probabilities[label]:.1%}" for label in best))
    if failed:
        sys.exit(1)
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
_NETWORK = "the network, from preprocessed images to logits"


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
        returns=_NETWORK,
        load=load,
        predict=_TORCH,
    )


def program_script(preprocessing: Preprocessing, classes: int, file: str) -> str:
    """Return the script for a program of torch.export, or for an ONNX model."""
    library, read, returns, predict = (
        ("onnxruntime", "onnxruntime.InferenceSession({})", "the session of onnxruntime", _ONNX)
        if file.endswith(".onnx")
        else ("torch", "torch.export.load({}).module()", _NETWORK, _TORCH)
    )
    return _script(
        preprocessing,
        classes,
        packages=[library],
        imports=(f"import {library}",),
        definitions="",
        returns=returns,
        load=["return " + read.format(f"FOLDER / {file!r}")],
        predict=predict,
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
