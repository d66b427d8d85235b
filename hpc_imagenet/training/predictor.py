"""Classify images with a trained network, as its validation would."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from hpc_imagenet.data.images import pillow
from hpc_imagenet.data.images.image_header import ORIENTATION
from hpc_imagenet.data.layouts.folder_tree import IMAGE_ENDINGS
from hpc_imagenet.datastore.manifest import ClassNames
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.training.loading.crop import CenterCrop, apply_crop
from hpc_imagenet.training.loading.decode import EncodedImage, Pixels
from hpc_imagenet.training.trained import TrainedModel

BATCH = 16  # images
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Guess:
    """A class and its probability, 0 to 1."""

    label: int
    category: ClassNames
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a network sees in an image.

    Attributes:
        image: the file, or the position of an image that is not a file.
        guesses: the most probable classes, best first; empty if the image cannot be read.
        problem: why it cannot be read; empty if it can.
    """

    image: Path | int
    guesses: tuple[Guess, ...]
    problem: str = ""


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain values: image, problem, and classes with label, id, name, probability."""
    classes = [
        {
            "label": guess.label,
            "id": guess.category.wnid,
            "name": ", ".join(guess.category.names),
            "probability": guess.probability,
        }
        for guess in prediction.guesses
    ]
    image = str(prediction.image) if isinstance(prediction.image, Path) else prediction.image
    return {"image": image, "problem": prediction.problem, "classes": classes}


def find_image_files(names: Sequence[str | Path]) -> list[Path]:
    """Return image files: those named, and in folders, at any depth, what ends like an image.

    Raises:
        UserError: there is no such file, or no image in a folder.
    """
    found: list[Path] = []
    for name in names:
        path = expand_home(name)
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{path}: no such image or folder")
            found.append(path)
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.name.lower().endswith(IMAGE_ENDINGS) and file.is_file()
        ]
        if not (inside := [file for file in inside if not file.name.startswith(".")]):
            raise UserError(f"{path} has no images")
        found += inside
    return found


def predict_images(
    trained: TrainedModel, images: Iterable[Path | Pixels], top: int, device: torch.device = _CPU
) -> Iterator[Prediction]:
    """Yield a prediction per image, in order, computed in float32.

    EXIF orientation is applied; a training on `dataset=images` does that when archives are made.

    Args:
        trained: the network, which moves to `device`.
        images: image files, or pixels: uint8 [height, width, 3], RGB.
        top: number of classes per image.
        device: where the network runs.
    """
    network = trained.network.to(device)
    batch: list[tuple[Path | int, Tensor | str]] = []

    def classify() -> Iterator[Prediction]:
        inputs = [read for _, read in batch if isinstance(read, Tensor)]
        probabilities = iter(_probabilities(trained, torch.cat(inputs).to(device)) if inputs else ())
        for image, read in batch:
            if isinstance(read, str):
                yield Prediction(image, (), read)
                continue
            values, labels = next(probabilities).topk(min(top, len(trained.classes)))
            pairs = zip(labels.tolist(), values.tolist(), strict=True)
            guesses = tuple(Guess(label, trained.classes[label], value) for label, value in pairs)
            yield Prediction(image, guesses)
        batch.clear()

    network.eval()
    for position, image in enumerate(images):
        batch.append((image if isinstance(image, Path) else position, _read(trained, image)))
        if len(batch) == BATCH:
            yield from classify()
    yield from classify()


def _probabilities(trained: TrainedModel, images: Tensor) -> Tensor:
    """Return the probabilities [images, classes] of uint8 images [images, 3, size, size], on the CPU."""
    mean, std = (
        255 * torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (trained.preprocessing.mean, trained.preprocessing.std)
    )
    with torch.inference_mode():
        normalized = (images - mean) / std
        logits: Tensor = trained.network(normalized).float()
        if trained.config.recipe.val_flip:
            logits = (logits + trained.network(normalized.flip(-1)).float()) / 2
        return logits.softmax(1).cpu()


def _read(trained: TrainedModel, image: Path | Pixels) -> Tensor | str:
    """Return the centre crop of an image, uint8 [1, 3, size, size], or why it cannot be read."""
    settings = trained.preprocessing
    policy = CenterCrop(settings.size, settings.resize, settings.interpolation, settings.squash)
    try:
        data = b"" if isinstance(image, np.ndarray) else image.read_bytes()
        array = image if isinstance(image, np.ndarray) else _upright_pixels(data)
        if array is not None:
            height, width, _ = array.shape
            crop = policy(width, height, random.Random())
            left, upper, right, lower = crop.source
            pixels = array[upper:lower, left:right]
        else:
            encoded = EncodedImage(data)
            crop = policy(encoded.width, encoded.height, random.Random())
            pixels = encoded.pixels(crop.source)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    out = torch.empty(1, settings.size, settings.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    apply_crop(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None], crop, out)
    return out


def _upright_pixels(data: bytes) -> Pixels | None:
    """Return the pixels of an image that EXIF turns, [height, width, 3]; None for all others."""
    try:
        with pillow.open_image(io.BytesIO(data)) as image:
            if image.getexif().get(ORIENTATION, 1) == 1:
                return None
            return np.array(pillow.to_rgb(ImageOps.exif_transpose(image)))
    except pillow.ERRORS:
        return None  # EncodedImage says what is wrong
