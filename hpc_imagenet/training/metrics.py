"""Validation metrics and the CSV files of a training run.

metrics.csv      one line per log interval or validation, one file for all attempts: Lightning's own CSV
                 logger starts a new file (or deletes the old one) whenever a run resumes
val_classes.csv  one line per class, of the last validation
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import Metric

from hpc_imagenet.datastore.manifest import ClassNames
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.training.loading.sampler import PADDING

COLUMNS = (
    *("step", "epoch"),  # number of completed steps; epoch from 0
    *("train_loss", "learning_rate", "images_per_second"),  # loss of rank 0's last device batch of that step
    *("val_top1", "val_top5", "val_loss"),  # accuracies, 0 to 1; mean cross-entropy
    "data_wait",  # share of the epoch, 0 to 1, in which the training loop of rank 0 waited for a batch
)


class ClassificationMetrics(Metric):
    """Exact top-1, top-5 and mean loss over all ranks, with counts per class."""

    full_state_update = False
    counts: Tensor
    loss: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, best: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add a batch.

        Args:
            best: classes of the highest logits, the highest first, [batch, up to 5].
            labels: [batch]; `PADDING` is ignored.
            losses: cross-entropy, [batch].
        """
        valid = labels != PADDING
        correct = best == labels[:, None]
        hits = torch.stack([valid, correct[:, 0] & valid, correct.any(1) & valid]).long()
        self.counts.index_add_(1, labels.clamp(min=0), hits)
        self.loss += losses.where(valid, 0).double().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return top1 and top5 (0 to 1), the mean loss, and counts of images, top-1, top-5: [3, classes]."""
        images, top1, top5 = self.counts.sum(1).double()
        return {
            "top1": top1 / images,
            "top5": top5 / images,
            "loss": self.loss / images,
            "counts": self.counts,
        }


def write_class_accuracies(path: Path, classes: Sequence[ClassNames], counts: Tensor) -> None:
    """Write `val_classes.csv`: id, names, number of images and accuracies (0 to 1) of each class."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", "id", "names", "images", "top1", "top5"])
    for label, (category, (images, *hits)) in enumerate(zip(classes, counts.T.tolist(), strict=True)):
        accuracies = [f"{hit / images:.4f}" if images else "" for hit in hits]
        writer.writerow([label, category.wnid, ", ".join(category.names), images, *accuracies])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


class CsvLogger(Logger):
    """Lightning logger that appends to `<folder>/metrics.csv`.

    Args:
        folder: folder of the run.
        step: steps in the checkpoint that this attempt resumes from; lines of later steps are removed.
        check_lease: called before each write; raises `Superseded` if this job has lost the run's lease.
    """

    def __init__(self, folder: Path, step: int, check_lease: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._check_lease = check_lease
        self._step = step
        self._ready = False
        self._validated = -1  # step of the last validation line

    @property
    def name(self) -> str:
        """Unused by this logger."""
        return ""

    @property
    def version(self) -> str:
        """Unused by this logger."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the frozen config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        self._check_lease()
        if not self._ready:
            self._drop_lost_lines()
        values = {name: metrics[name] for name in COLUMNS if name in metrics}
        values["step"] = steps_done = (step or 0) + 1  # Lightning counts from 0
        if "val_loss" in values:
            if steps_done == self._validated:  # logged by an earlier attempt, which then stopped
                return
            self._validated = steps_done
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(values)

    def _drop_lost_lines(self) -> None:
        """Remove incomplete lines, and lines of steps after the checkpoint."""
        lines = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                lines = [line for line in csv.DictReader(file) if _is_valid(line, self._step)]
        self._validated = max((int(line["step"]) for line in lines if line["val_loss"]), default=-1)
        with atomic_write(self.path) as raw:
            text = [",".join(COLUMNS), *(",".join(line.get(name, "") for name in COLUMNS) for line in lines)]
            raw.write(("\r\n".join(text) + "\r\n").encode())
        self._ready = True


def _is_valid(line: dict[str, Any], step: int) -> bool:
    # A killed process may leave an incomplete line, whose last values are None. A file of an older version of
    # this package has fewer columns.
    return None not in line.values() and str(line["step"]).isdigit() and int(line["step"]) <= step
