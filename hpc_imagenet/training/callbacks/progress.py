"""How the training is going, for people: progress in the record, a line an epoch in the log, images/s."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytorch_lightning as pl

from hpc_imagenet.runs.store import Progress
from hpc_imagenet.training.callbacks.bottleneck import BottleneckMonitor


class ProgressReporter(pl.Callback):
    """Keeps the pace of every epoch, over attempts; rank 0 tells.

    Args:
        batch: images a step over all ranks.
        tell: the record's progress; None on ranks that keep quiet.
        verdict: what the training waits for.
    """

    def __init__(self, batch: int, tell: Progress | None, verdict: BottleneckMonitor) -> None:
        self._batch, self._tell, self._verdict = batch, tell, verdict
        self._rates: list[float] = []  # images/s, one an epoch
        self._begin = 0.0
        self._first = 0
        self._top1: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """Median over epochs; the first one warms up and counts only where there is no other."""
        rates = self._rates[1:] or self._rates
        return statistics.median(rates) if rates else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a later attempt takes over."""
        return {"rates": self._rates, "top1": self._top1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what earlier attempts have seen."""
        self._rates, self._top1 = list(state_dict["rates"]), state_dict["top1"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin the first epoch of this attempt, which may be the rest of one."""
        self._begin, self._first = time.monotonic(), trainer.global_step
        self._progress(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin an epoch."""
        self._begin, self._first = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the record; at the last batch note the epoch's pace, before validation begins."""
        self._progress(trainer)
        if batch_idx + 1 == trainer.num_training_batches:
            float(outputs["loss"])  # wait for the GPU: until now the CPU only queued work for it
            images = (trainer.global_step - self._first) * self._batch
            self._rates.append(images / (time.monotonic() - self._begin))
            module.log("images_per_second", self._rates[-1])

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the epoch's line."""
        values = trainer.callback_metrics
        if "val_top1" in values:
            self._top1 = float(values["val_top1"])
        if self._tell is not None:
            told = [self._note(trainer)]
            if "train_loss" in values and "val_loss" in values:
                told.append(f"loss {values['train_loss']:.3f}, on val {values['val_loss']:.3f}")
            if self._rates:
                told.append(f"{self._rates[-1]:.0f} images/s")
            print(", ".join(told), flush=True)

    def _note(self, trainer: pl.Trainer) -> str:
        epochs = trainer.max_epochs or 0
        note = f"epoch {min(trainer.current_epoch + 1, epochs)}/{epochs}"
        if self._top1 is not None:
            note += f", top-1 {100 * self._top1:.1f} %"
        return f"{note}, {self._verdict.word}" if self._verdict.word else note

    def _progress(self, trainer: pl.Trainer) -> None:
        if self._tell is not None:
            steps = trainer.num_training_batches // trainer.accumulate_grad_batches
            total = (trainer.max_epochs or 0) * int(steps) * self._batch
            self._tell(trainer.global_step * self._batch, total, "images", self._note(trainer))
