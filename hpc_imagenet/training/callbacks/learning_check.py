"""Check after the warm-up whether a training learns: its validation accuracy is above that of chance.

A network whose activations have died still trains at full speed and ends without an error. Its top-1 accuracy
then equals the share of the largest class, which a constant answer reaches as well.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from hpc_imagenet.config.recipe import Recipe

_SIGMAS = 3  # standard deviations above chance that count as learned
_FIRST_QUARTER = 0.25  # of the epochs, in which a running training is not judged
_FITTED = 0.8  # of the loss of an untrained network: below it the training images have been learned


class LearningCheck(pl.Callback):
    """Compares the accuracy of each validation after the warm-up with chance.

    Attributes:
        summary: short description for the table of jobs; empty while the training learns.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.summary = ""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Judge the validation of this epoch. It comes before the progress is reported."""
        metrics, epochs = trainer.callback_metrics, trainer.current_epoch + 1
        if "val_top1" not in metrics or epochs < _FIRST_QUARTER * self._recipe.epochs:
            return
        counts = module.val_metrics.compute()["counts"]  # cached: the validation has computed it
        warm = epochs > self._recipe.warmup_epochs
        self.summary = "at chance" if warm and is_chance(float(metrics["val_top1"]), counts) else ""

    def result(self, metrics: dict[str, Any], counts: Tensor) -> dict[str, Any]:
        """Return `learned` and, if it is false, `advice`; empty if all epochs were warm-up.

        Args:
            metrics: val_top1 (0 to 1), val_loss and, unless an earlier attempt trained, train_loss.
            counts: images, top-1 and top-5 hits per class: [3, classes].
        """
        recipe, classes = self._recipe, counts.shape[1]
        if recipe.epochs <= recipe.warmup_epochs:
            return {}
        top1, loss = float(metrics["val_top1"]), float(metrics["val_loss"])
        if not is_chance(top1, counts):
            return {"learned": True}
        untrained = math.log(classes)
        facts = (
            f"top-1 {100 * top1:.1f} % is chance: val loss {loss:.3f} (untrained {untrained:.3f}), "
            f"recipe.learning_rate={recipe.learning_rate:g}"
        )
        if "train_loss" in metrics and float(metrics["train_loss"]) < _FITTED * untrained:
            fix = "the train loss fell, so check that the labels of val belong to its images"
        else:
            fix = f"try recipe.learning_rate={recipe.learning_rate / 10:g}"
        return {"learned": False, "advice": f"{facts}: {fix}"}


def is_chance(top1: float, counts: Tensor) -> bool:
    """Whether an accuracy is within three standard deviations of always answering the largest class.

    Args:
        top1: accuracy, 0 to 1.
        counts: the first row is the number of images of each class.
    """
    images = int(counts[0].sum())
    largest = float(counts[0].max()) / images
    return top1 <= largest + _SIGMAS * math.sqrt(largest * (1 - largest) / images)
