"""Progress of a training: the run's progress file, one log line per epoch, and images/s."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytorch_lightning as pl

from hpc_imagenet.runs.store import Progress
from hpc_imagenet.training.callbacks.bottleneck import BottleneckMonitor
from hpc_imagenet.training.callbacks.learning_check import LearningCheck


class ProgressReporter(pl.Callback):
    """Measures the images/s of every epoch and the time, over all attempts, and reports progress.

    Args:
        began: `time.monotonic()` when this process began with the training.
        batch: images per step over all ranks.
        progress: progress of the run; None on ranks that do not report.
        bottleneck: monitor whose summary is part of the status.
        learning: check whose summary is part of the status; Lightning calls it before this callback.
    """

    def __init__(
        self,
        began: float,
        batch: int,
        progress: Progress | None,
        bottleneck: BottleneckMonitor,
        learning: LearningCheck,
    ) -> None:
        self._began = began
        self._earlier: float | None = 0.0  # s of earlier starts, up to the checkpoint
        self._batch, self._progress, self._bottleneck = batch, progress, bottleneck
        self._learning = learning
        self._rates: list[float] = []  # images/s of each epoch
        self._begin = 0.0  # time at which the epoch began, s
        self._first_step = 0  # of the epoch, in this attempt
        self._waited = 0.0  # s that the training had waited for batches when the epoch began
        self._top1: float | None = None  # of the last validation
        self._best: float | None = None  # of all validations

    @property
    def images_per_second(self) -> float | None:
        """Median over epochs without the first one, which includes the warm-up, if there are others."""
        rates = self._rates[1:] or self._rates
        return statistics.median(rates) if rates else None

    @property
    def seconds(self) -> float | None:
        """Time of the training so far, with that of earlier starts up to the checkpoint; None if unknown."""
        return None if self._earlier is None else self._earlier + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"rates": self._rates, "top1": self._top1, "best": self._best, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rates, the accuracy and the time of earlier attempts."""
        self._rates, self._top1 = list(state_dict["rates"]), state_dict["top1"]
        # A checkpoint of an older version has neither; the time remains unknown from then on.
        self._best, self._earlier = state_dict.get("best", self._top1), state_dict.get("seconds")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start timing the first epoch of this attempt, which may begin in its middle."""
        self._begin_epoch(trainer)
        self._report(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start timing an epoch."""
        self._begin_epoch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report progress; at the last batch record the epoch's images/s, before validation begins."""
        self._report(trainer)
        if batch_idx + 1 == trainer.num_training_batches:
            float(outputs["loss"])  # wait for the GPU, which runs asynchronously
            images = (trainer.global_step - self._first_step) * self._batch
            seconds = time.monotonic() - self._begin
            self._rates.append(images / seconds)
            module.log("images_per_second", self._rates[-1])
            module.log("data_wait", min(1.0, (self._bottleneck.waited - self._waited) / seconds))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Print the log line of the epoch."""
        values = trainer.callback_metrics
        if "val_top1" in values:
            self._top1 = float(values["val_top1"])
            self._best = self._top1 if self._best is None else max(self._best, self._top1)
        if self._progress is not None:
            parts = [self._status(trainer)]
            if "train_loss" in values and "val_loss" in values:
                parts.append(f"loss {values['train_loss']:.3f}, val loss {values['val_loss']:.3f}")
            if self._rates:
                parts.append(f"{self._rates[-1]:.0f} images/s")
            print(", ".join(parts), flush=True)

    def _begin_epoch(self, trainer: pl.Trainer) -> None:
        self._begin, self._first_step = time.monotonic(), trainer.global_step
        self._waited = self._bottleneck.waited

    def _status(self, trainer: pl.Trainer) -> str:
        epochs = trainer.max_epochs or 0
        status = f"epoch {min(trainer.current_epoch + 1, epochs)}/{epochs}"
        if self._top1 is not None:
            status += f", top-1 {100 * self._top1:.1f} %"
        return ", ".join(filter(None, [status, self._learning.summary, self._bottleneck.summary]))

    def _report(self, trainer: pl.Trainer) -> None:
        if self._progress is not None:
            steps = trainer.num_training_batches // trainer.accumulate_grad_batches
            total = (trainer.max_epochs or 0) * int(steps) * self._batch
            done, status = trainer.global_step * self._batch, self._status(trainer)
            self._progress(done, total, "images", status, self._best)
