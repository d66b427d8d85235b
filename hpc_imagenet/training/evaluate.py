"""Evaluate a published torchvision model on a val split, to verify that images and labels match.

The weights come from torchvision's cache or from a file; nothing is downloaded. Images are transformed by the
preset of the weights, so the accuracy should equal the published one.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from hpc_imagenet.config.names.backbones import BACKBONES
from hpc_imagenet.data.images import pillow
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.training.models import pretrained
from hpc_imagenet.training.models.build import build_model

BATCH_SIZE = 64  # images


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on the val split.

    Attributes:
        weights: name of the model and its weights.
        images: number of val images.
        top1: accuracy, 0 to 1.
        top5: accuracy, 0 to 1.
        published: top-1 and top-5 that torchvision publishes for ImageNet, 0 to 1; None if unknown.
    """

    weights: str
    images: int
    top1: float
    top5: float
    published: tuple[float, float] | None


def evaluate(store: DatasetReader, weights: str, workers: int) -> Evaluation:
    """Return the accuracy of a model on the val split.

    Args:
        store: the dataset.
        weights: NAME, NAME:WEIGHTS (such as resnet50:IMAGENET1K_V1) or NAME=FILE, a file with a state dict.
        workers: number of decoding processes.

    Raises:
        UserError: the model or its weights are unknown, not on disk, or for another number of classes; or an
            image cannot be decoded.
    """
    classes = len(store.manifest.classes)
    title, model, transform, published = _load(weights, classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)
    split = store.open_split("val")
    loader = DataLoader(
        _ValImages(split, transform), BATCH_SIZE, num_workers=workers if len(split) > BATCH_SIZE else 0
    )
    hits = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        for images, labels, problems in loader:
            if problem := next(filter(None, problems), ""):
                raise UserError(f"{store.folder}: {problem}")
            top_classes = model(images.to(device)).topk(min(5, classes)).indices.cpu()
            correct = top_classes == labels[:, None]
            hits += torch.stack([correct[:, 0].sum(), correct.any(1).sum()])
    top1, top5 = (hits / len(split)).tolist()
    return Evaluation(title, len(split), top1, top5, published)


class _ValImages(Dataset[tuple[Tensor, int, str]]):
    """Yields transformed images, their labels, and why an image cannot be read: empty if it can.

    An exception in a process of the loader would become a traceback.
    """

    def __init__(self, split: SplitReader, transform: Callable[[Image.Image], Tensor]) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        data, label = self.split.read(i)
        image, problem = Image.new("RGB", (256, 256)), ""
        try:
            image = pillow.to_rgb(Image.open(io.BytesIO(data)))
        except pillow.ERRORS as error:
            problem = f"image {self.split.name(i)} cannot be read ({pillow.reason(error)})"
        return self.transform(image), label, problem


def _load(weights: str, classes: int) -> tuple[str, nn.Module, Any, tuple[float, float] | None]:
    """Return the title, the model, its image transform and its published top-1 and top-5."""
    head, _, file = weights.partition("=")
    name, _, version = head.partition(":")
    if name not in BACKBONES:
        raise UserError(f"--weights {weights}: unknown model {name}{did_you_mean(name, BACKBONES)}")
    if file:
        return f"{name} ({file})", _from_file(name, expand_home(file), classes), _preset(name), None
    published, _ = pretrained.cached_weights(name, version, f"--weights {weights}")
    categories = len(published.meta["categories"])
    if categories != classes:
        raise UserError(
            f"--weights {weights}: the weights have {categories} classes, but the dataset has {classes}"
        )
    metrics = published.meta["_metrics"].get("ImageNet-1K", {})
    accuracy = (metrics["acc@1"] / 100, metrics["acc@5"] / 100) if metrics else None
    model: nn.Module = models.get_model(name, weights=published)
    return f"{name}:{published.name}", model, published.transforms(), accuracy


def _from_file(name: str, path: Path, classes: int) -> nn.Module:
    option = f"--weights {name}={path}"
    model = build_model(name, classes, stem="standard")
    state, mismatched = pretrained.match_names(model, pretrained.read_weights(path, option))
    if mismatched:
        difference = pretrained.shape_difference(mismatched[0], state, model.state_dict())
        raise UserError(f"{option}: not weights of {name} for {classes} classes ({difference})")
    model.load_state_dict(state)
    return model


def _preset(name: str) -> Any:
    """Return the image transform of the newest published weights."""
    versions = list(models.get_model_weights(name))
    return versions[-1].transforms() if versions else ImageClassification(crop_size=224)
