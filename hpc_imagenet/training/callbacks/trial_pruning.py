"""Report the validations of a trial to its search, and stop where the search decides so."""

from __future__ import annotations

import pytorch_lightning as pl

from hpc_imagenet.runs.store import Judge


class TrialPruning(pl.Callback):
    """Passes each validation to `judge`, which decides on rank 0 for all ranks whether the training goes on.

    Lightning ends the training after the epoch, when its checkpoint has been saved.

    Attributes:
        stopped: epochs trained, if the training was stopped; else None.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.stopped: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Report the validation of this epoch."""
        if "val_top1" not in trainer.callback_metrics:
            return
        epochs, stop = trainer.current_epoch + 1, False
        if trainer.is_global_zero:
            stop = self._judge(epochs, float(trainer.callback_metrics["val_top1"]))
        if trainer.strategy.broadcast(stop):
            self.stopped = epochs
            trainer.should_stop = True
