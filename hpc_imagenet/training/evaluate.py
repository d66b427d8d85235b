"""Score a published torchvision model on a val split: do these images and labels mean what they should?

The weights are those that torchvision keeps in its cache, or a file; nothing is downloaded here. Pictures are
prepared as the weights' own preset says, so that the published accuracy is what should come out.
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

from hpc_imagenet.config.backbones import BACKBONES
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.training.models import pretrained
from hpc_imagenet.training.models.build import build_model

BATCH = 64  # images


@dataclass(frozen=True)
class Evaluation:
    """Shares of 1 of the `images` of val; `published` those that torchvision states for ImageNet, if any."""

    weights: str
    images: int
    top1: float
    top5: float
    published: tuple[float, float] | None


def evaluate(store: DatasetReader, wanted: str, workers: int) -> Evaluation:
    """Return how well a model does on the val split.

    Args:
        store: the dataset.
        wanted: NAME, NAME:WEIGHTS (such as resnet50:IMAGENET1K_V1) or NAME=FILE, a file with its state.
        workers: processes that decode.

    Raises:
        UserError: unknown, not on disk, or for another number of classes.
    """
    classes = len(store.manifest.classes)
    title, model, prepare, published = _load(wanted, classes)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(place)
    split = store.open_split("val")
    loader = DataLoader(_ValImages(split, prepare), BATCH, num_workers=workers if len(split) > BATCH else 0)
    hits = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        for pictures, labels in loader:
            ranked = model(pictures.to(place)).topk(min(5, classes)).indices.cpu()
            right = ranked == labels[:, None]
            hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    top1, top5 = (hits / len(split)).tolist()
    return Evaluation(title, len(split), top1, top5, published)


class _ValImages(Dataset[tuple[Tensor, int]]):
    def __init__(self, split: SplitReader, prepare: Callable[[Image.Image], Tensor]) -> None:
        self.split, self.prepare = split, prepare

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        data, label = self.split.read(i)
        return self.prepare(Image.open(io.BytesIO(data)).convert("RGB")), label


def _load(wanted: str, classes: int) -> tuple[str, nn.Module, Any, tuple[float, float] | None]:
    head, _, file = wanted.partition("=")
    name, _, version = head.partition(":")
    if name not in BACKBONES:
        raise UserError(f"--weights {wanted}: {name} is unknown{did_you_mean(name, BACKBONES)}")
    if file:
        return f"{name} ({file})", _from_file(name, Path(file).expanduser(), classes), _preset(name), None
    published, _ = pretrained.cached_weights(name, version, f"--weights {wanted}")
    known = len(published.meta["categories"])
    if known != classes:
        raise UserError(
            f"--weights {wanted}: its weights know {known} classes, but the dataset has {classes}"
        )
    metrics = published.meta["_metrics"].get("ImageNet-1K", {})
    told = (metrics["acc@1"] / 100, metrics["acc@5"] / 100) if metrics else None
    model: nn.Module = models.get_model(name, weights=published)
    return f"{name}:{published.name}", model, published.transforms(), told


def _from_file(name: str, path: Path, classes: int) -> nn.Module:
    said = f"--weights {name}={path}"
    model = build_model(name, classes, stem="standard")
    state, wrong = pretrained.match_names(model, pretrained.read_weights(path, said))
    if wrong:
        why = pretrained.shape_difference(wrong[0], state, model.state_dict())
        raise UserError(f"{said}: is not {name} for {classes} classes ({why} here)")
    model.load_state_dict(state)
    return model


def _preset(name: str) -> Any:
    """Return how the newest published weights want their pictures."""
    published = list(models.get_model_weights(name))
    return published[-1].transforms() if published else ImageClassification(crop_size=224)
