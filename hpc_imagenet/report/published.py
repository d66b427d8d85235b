"""Published ImageNet accuracies of torchvision's backbones, from `published.csv`.

Sources: `_metrics` and `recipe` of torchvision's weights, without those trained on more images (SWAG); the
epochs in torchvision's references/classification/README.md and issue 3995, empty where neither states them;
the table of configurations in ffcv-imagenet's README. A test compares the file with torchvision.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.runs.job import holds_dataset

FILE = Path(__file__).with_name("published.csv")
VAL_MD5 = "29b22e2961454d5413ddabcf34fc5622"  # of ImageNet's val archive, as in conf/dataset/imagenet.yaml
_SAME_EPOCHS = 0.12  # relative difference: 90 and 100 epochs count as one protocol


@dataclass(frozen=True)
class PublishedAccuracy:
    """One published training of a backbone on ImageNet-1k.

    Attributes:
        protocol: who published it, and the name of the weights if there are several.
        top1: accuracy on val, 0 to 1.
        top5: accuracy on val, 0 to 1.
        parameters: number of weights.
        epochs: length of the training; None: not stated by its authors.
        val_size: px, side of the centre crop of the evaluation.
        citation: URL of the source.
    """

    model: str
    protocol: str
    top1: float
    top5: float
    parameters: int
    epochs: int | None
    val_size: int
    citation: str


@functools.cache
def published_accuracies() -> dict[str, list[PublishedAccuracy]]:
    """Return all published accuracies by model."""
    found: dict[str, list[PublishedAccuracy]] = {}
    with FILE.open(newline="") as file:
        for row in csv.DictReader(file):
            entry = PublishedAccuracy(
                row["model"],
                row["protocol"],
                float(row["top1"]) / 100,
                float(row["top5"]) / 100,
                int(row["parameters"]),
                int(row["epochs"]) if row["epochs"] else None,
                int(row["val_size"]),
                row["citation"],
            )
            found.setdefault(entry.model, []).append(entry)
    return found


def published_for(frozen: dict[str, Any]) -> tuple[PublishedAccuracy, bool] | None:
    """Return the published training that is closest to a run, and whether it has the run's protocol.

    The protocol is the same if the backbone was trained from random weights on ImageNet for about as many
    epochs and evaluated at the same size. A datastore is ImageNet if the config's dataset is, and the
    datastore has its name or content.

    Args:
        frozen: the run's frozen config.

    Returns:
        None if the run is not a training on ImageNet from random weights, or nothing is published.
    """
    model, recipe, dataset = frozen["model"], frozen["recipe"], frozen["dataset"]
    val = (dataset.get("archives") or {}).get("val") or {}
    if model.get("weights") or (dataset["name"] != "imagenet" and val.get("md5") != VAL_MD5):
        return None
    candidates = published_accuracies().get(model["name"], [])
    if not candidates or not holds_dataset(frozen):
        return None

    def distance(entry: PublishedAccuracy) -> tuple[bool, float]:
        epochs = math.inf if entry.epochs is None else abs(math.log(entry.epochs / recipe["epochs"]))
        return entry.val_size != recipe["val_size"], epochs

    closest = min(candidates, key=distance)
    other_size, epochs = distance(closest)
    return closest, not other_size and epochs <= math.log1p(_SAME_EPOCHS)
