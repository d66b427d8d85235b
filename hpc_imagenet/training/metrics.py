"""What is counted in a validation, and the two tables that tell it.

metrics.csv      one line a look at the training, the same file over all attempts at a run: Lightning's own
                 CSV logger begins a new file (or deletes the old one) whenever a run goes on
val_classes.csv  one line a class, of the last validation
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
    *("step", "epoch"),  # steps done; epoch from 0
    *("train_loss", "learning_rate", "images_per_second"),  # the loss of rank 0's last part of that step
    *("val_top1", "val_top5", "val_loss"),  # shares of 1; mean cross-entropy
)


class ClassificationMetrics(Metric):
    """Images, hits among the first and the first five, and loss, class by class; exact over all ranks."""

    full_state_update = False
    counts: Tensor
    loss: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Count a batch.

        Args:
            logits: [batch, classes].
            labels: [batch]; what is `PADDING` does not count.
            losses: [batch].
        """
        known = labels != PADDING
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits = torch.stack([known, ranked[:, 0] & known, ranked.any(1) & known]).long()
        self.counts.index_add_(1, labels.clamp(min=0), hits)
        self.loss += losses.where(known, 0).double().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return top1 and top5 (shares of 1), the mean loss and counts [3: images, top-1, top-5; classes]."""
        images, top1, top5 = self.counts.sum(1).double()
        return {
            "top1": top1 / images,
            "top5": top5 / images,
            "loss": self.loss / images,
            "counts": self.counts,
        }


def write_class_accuracies(path: Path, classes: Sequence[ClassNames], counts: Tensor) -> None:
    """Write `val_classes.csv`: id, names and images of each class, and the shares of 1 that were right."""
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["label", "id", "names", "images", "top1", "top5"])
    for label, (category, (images, *hits)) in enumerate(zip(classes, counts.T.tolist(), strict=True)):
        shares = [f"{hit / images:.4f}" if images else "" for hit in hits]
        lines.writerow([label, category.wnid, ", ".join(category.names), images, *shares])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


class CsvLogger(Logger):
    """Appends to `<folder>/metrics.csv`.

    Args:
        folder: of the run.
        step: steps done when this attempt begins; lines about later ones are of lost work and go.
        before: called before each line; raises where this job may not write any more.
    """

    def __init__(self, folder: Path, step: int, before: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._before = before
        self._step = step
        self._ready = False
        self._validated = -1  # step of the last line about val

    @property
    def name(self) -> str:
        """Not used: the run's folder is the name."""
        return ""

    @property
    def version(self) -> str:
        """Not used: there is one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the frozen config lies beside."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        self._before()
        if not self._ready:
            self._prepare()
        values = {name: metrics[name] for name in COLUMNS if name in metrics}
        values["step"] = done = (step or 0) + 1  # Lightning counts from 0
        if "val_loss" in values:
            if done == self._validated:  # an earlier attempt was cut off just behind it
                return
            self._validated = done
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(values)

    def _prepare(self) -> None:
        lines = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                lines = [line for line in csv.DictReader(file) if _whole(line, self._step)]
        self._validated = max((int(line["step"]) for line in lines if line["val_loss"]), default=-1)
        with atomic_write(self.path) as raw:
            text = [",".join(COLUMNS), *(",".join(line[name] for name in COLUMNS) for line in lines)]
            raw.write(("\r\n".join(text) + "\r\n").encode())
        self._ready = True


def _whole(line: dict[str, Any], step: int) -> bool:
    # A process that is killed may leave half a line.
    values = [line.get(name) for name in COLUMNS]
    return None not in values and str(line["step"]).isdigit() and int(line["step"]) <= step
