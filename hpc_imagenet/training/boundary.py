"""What is decided between two steps, by all ranks alike: save, stop, or give up on a loss that is no number.

Every rank has its own clock, its own signals and its own loss. One tiny reduction a step makes them agree, on
the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from hpc_imagenet.errors import Interrupted, UserError
from hpc_imagenet.training.checkpoint import LAST
from hpc_imagenet.training.preemption import Asked

LOOK_EVERY = 50  # steps between two looks at a loss on a GPU: each makes the CPU wait for it


class Boundary(pl.Callback):
    """Saves `last.ckpt` at every epoch's end, every so many minutes and when asked to stop.

    Args:
        folder: of the checkpoints.
        asked: whether this rank was asked to stop.
        every: s between two checkpoints within an epoch.
    """

    def __init__(self, folder: Path, asked: Asked, every: float) -> None:
        self._path, self._asked, self._every = folder / LAST, asked, every
        self._group: Any = None
        self._saved = time.monotonic()
        self._validating = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to count the minutes."""
        self._saved = time.monotonic()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide, if this batch ended a step."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches:
            return
        # The epoch's last step is followed by validation; Lightning takes up that state only from there.
        last = done == trainer.num_training_batches
        look = module.device.type == "cpu" or last or trainer.global_step % LOOK_EVERY == 0
        asked, due, bad = self._agree(bool(self._asked), self._due(), look and _bad(outputs))
        if (asked or due) and not look and not last:
            (bad,) = self._agree(_bad(outputs))
        if bad:
            rate = f"recipe.learning_rate={module.recipe.learning_rate:g}"
            where = f"the loss at step {trainer.global_step} (epoch {trainer.current_epoch + 1}) is no number"
            raise UserError(f"{rate}: {where}: lower it, or raise recipe.warmup_epochs")
        if not last:
            self._act(trainer, asked, due)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Forget that an earlier attempt began this validation; it would be noted as begun twice."""
        if trainer.state.fn == "fit":
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Decide within an epoch's validation; it begins again when the run is taken up."""
        if trainer.state.fn != "fit":
            return
        self._validating = True
        try:
            asked, due = self._agree(bool(self._asked), self._due())
            self._act(trainer, asked, due)
        finally:
            self._validating = False

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save, and stop if asked to and something is left to do."""
        (asked,) = self._agree(bool(self._asked))
        more = trainer.current_epoch + 1 < (trainer.max_epochs or 0)
        self._act(trainer, asked and more, True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what a later attempt must know."""
        checkpoint["accumulate"] = trainer.accumulate_grad_batches
        if self._validating:
            # Note it as one that was cut off in its first step: Lightning then runs it all again.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
            progress["total"], progress["current"] = {**nothing, "ready": 1, "started": 1}, nothing
            progress["is_last_batch"] = False

    def _due(self) -> bool:
        return time.monotonic() - self._saved > self._every

    def _agree(self, *mine: bool) -> list[bool]:
        """Return for each question whether any rank says yes."""
        if self._group is None:
            return list(mine)
        votes = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return [bool(vote) for vote in votes.tolist()]

    def _act(self, trainer: pl.Trainer, asked: bool, due: bool) -> None:
        if asked or due:
            trainer.save_checkpoint(self._path)
            self._saved = time.monotonic()
        if asked:
            by = self._asked.signal.name if self._asked.signal else "a signal to another rank"
            raise Interrupted(f"stopped by {by} after step {trainer.global_step}, which is saved")


def _bad(outputs: Any) -> bool:
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    return not bool(torch.isfinite(loss))
