"""Confused classes of the last validation: which wrong class the network predicts for which label."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.training.loading.sampler import PADDING

MAX_CLASSES = 4096  # int32 counts of all pairs: 64 MiB
PER_CLASS = 5  # wrong classes that are written for each label
MAX_ROWS = 5000  # of the file


class ConfusionCounts:
    """Number of val images for each pair of label and predicted class, on this rank.

    No torchmetrics state, since that would be gathered from all ranks at every validation: 4 MB per rank for
    1,000 classes. This is summed once.

    Args:
        classes: number of classes; above `MAX_CLASSES` nothing is counted.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._counts: Tensor | None = None  # [classes * classes], on the device of the predictions

    def reset(self) -> None:
        """Forget the previous validation."""
        self._counts = None

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add a batch of predicted classes and labels, each [batch]; the label `PADDING` is ignored."""
        if self._classes > MAX_CLASSES:
            return
        if self._counts is None:
            self._counts = torch.zeros(self._classes**2, dtype=torch.int32, device=predicted.device)
        valid = (labels != PADDING).to(torch.int32)
        self._counts.index_add_(0, labels.clamp(min=0) * self._classes + predicted, valid)

    def total(self) -> Tensor | None:
        """Return the sum over all ranks, [label, predicted]; every rank calls this. None: not counted."""
        if self._counts is None:
            return None
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        return self._counts.view(self._classes, self._classes).cpu()


def write_confused_classes(path: Path, counts: Tensor) -> None:
    """Write `val_confusion.csv`: label, predicted class and number of images, the most frequent first.

    At most `PER_CLASS` lines per label and `MAX_ROWS` lines in all, so that the file stays small.

    Args:
        path: the file.
        counts: number of images, [label, predicted].
    """
    wrong = counts.clone().fill_diagonal_(0)
    images, predicted = wrong.topk(min(PER_CLASS, wrong.shape[1]), sorted=True)
    rows = [
        (number, label, other)
        for label, (numbers, others) in enumerate(zip(images.tolist(), predicted.tolist(), strict=True))
        for number, other in zip(numbers, others, strict=True)
        if number
    ]
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", "predicted", "images"])
    writer.writerows((label, other, number) for number, label, other in rows[:MAX_ROWS])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
