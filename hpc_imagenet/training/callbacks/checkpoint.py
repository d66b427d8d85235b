"""What is decided between two steps, by all ranks alike: save, stop, or give up on a loss that is no number.

Every rank has its own clock, its own signals and its own loss. One tiny reduction a step makes them agree, on
the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.errors import EXIT_REQUEUE, Preempted, UserError, first_line
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.training.callbacks.checkpoint_file import LAST
from hpc_imagenet.training.distributed import PATIENCE, out_of_memory

LOOK_EVERY = 50  # steps between two looks at a loss on a GPU: each makes the CPU wait for it
NEVER = 2**31 - 1
FAREWELL = 60.0  # s that a task which has failed among others may take to end


class CheckpointCallback(pl.Callback):
    """Saves `last.ckpt` at every epoch's end, every so many minutes and when asked to stop.

    Args:
        folder: of the checkpoints.
        asked: whether this rank was asked to stop.
        every: s between two checkpoints within an epoch.
        identity: what a later attempt must find the same, as plain values; see `checkpoint.differing`.
        names: of the images of a step, in all ranks.
        writes: whether this rank writes into the run's folder.

    Attributes:
        out_of_memory: whether the training has failed for want of memory.
    """

    def __init__(
        self,
        folder: Path,
        asked: StopSignal,
        every: float,
        identity: dict[str, Any],
        names: Callable[[int], list[str]],
        writes: bool,
    ) -> None:
        self._path, self._asked, self._every = folder / LAST, asked, every
        self._identity, self._names, self._writes = identity, names, writes
        self._group: Any = None
        self._bad: Tensor | None = None  # the first step whose loss is no number, on the device
        self._saved = time.monotonic()
        self._validating = False
        self.out_of_memory = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to count the minutes."""
        self._saved = time.monotonic()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide, if this batch ended a step."""
        done = batch_idx + 1
        self._record_losses(outputs, trainer.global_step + (done % trainer.accumulate_grad_batches > 0))
        if done % trainer.accumulate_grad_batches:
            return
        # The epoch's last step is followed by validation; Lightning takes up that state only from there.
        last = done == trainer.num_training_batches
        look = module.device.type == "cpu" or last or trainer.global_step % LOOK_EVERY == 0
        asked, due, bad = self._all_reduce_max(
            self._asked, self._due(), self._first_bad_step() if look else 0
        )
        if (asked or due) and not look:
            (bad,) = self._all_reduce_max(self._first_bad_step())
        if bad:
            self._give_up(module.recipe, NEVER - bad, trainer.current_epoch)
        if not last:
            self._save_or_stop(trainer, bool(asked), bool(due))

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
            asked, due = self._all_reduce_max(self._asked, self._due())
            self._save_or_stop(trainer, bool(asked), bool(due))
        finally:
            self._validating = False

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """See to it that this task ends, and the job with it.

        A GPU that was given a collective waits for a rank that is gone, and whoever waits for the GPU, as
        Lightning does while it clears up, with it.
        """
        # Now, since Lightning's teardown moves the network to the CPU, and the GPU looks empty behind it.
        self.out_of_memory = out_of_memory(exception, module.device)
        if trainer.world_size > 1 and not isinstance(exception, Preempted):
            ending = threading.Timer(FAREWELL, _leave, (exception,))
            ending.daemon = True
            ending.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save, and stop if asked to and something is left to do."""
        (asked,) = self._all_reduce_max(self._asked)
        more = trainer.current_epoch + 1 < (trainer.max_epochs or 0)
        self._save_or_stop(trainer, bool(asked) and more, True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what a later attempt must know."""
        checkpoint["accumulate"] = trainer.accumulate_grad_batches
        checkpoint["identity"] = self._identity
        if self._validating:
            # Note it as one that was cut off in its first step: Lightning then runs it all again.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
            progress["total"], progress["current"] = {**nothing, "ready": 1, "started": 1}, nothing
            progress["is_last_batch"] = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count in parts of a step as there are now. It is saved between steps, so they come out whole."""
        was, now = checkpoint["accumulate"], trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            late = counts["processed"] - counts["completed"]  # 1 within a hook: it counts the last behind it
            counts |= {name: counts[name] // was * now for name in ("ready", "started", "processed")}
            counts["completed"] = counts["processed"] - late

    def _due(self) -> bool:
        return time.monotonic() - self._saved > self._every

    def _all_reduce_max(self, *mine: object) -> list[int]:
        """Return for each question the largest answer of any rank; an answer is an integer, or yes or no."""
        answers = [answer if type(answer) is int else int(bool(answer)) for answer in mine]
        if self._group is None:
            return answers
        votes = torch.tensor(answers, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return [int(vote) for vote in votes.tolist()]

    def _record_losses(self, outputs: Any, step: int) -> None:
        """Keep the first bad step on the device, so that nobody waits for a loss."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if self._bad is None:
            self._bad = torch.full((), NEVER, device=loss.device)
        self._bad = torch.where(torch.isfinite(loss.detach()), self._bad, self._bad.clamp(max=step))

    def _first_bad_step(self) -> int:
        """Return 0, or more the earlier a loss was no number. Waits for the device."""
        return 0 if self._bad is None else NEVER - int(self._bad)

    def _give_up(self, recipe: Recipe, step: int, epoch: int) -> None:
        names = self._names(step - 1)
        path = self._path.parents[1] / "bad_batch.txt"
        if self._writes:
            with atomic_write(path) as file:
                file.write(("\n".join(names) + "\n").encode())
        some = ", ".join(names[:2]) + (f" and {len(names) - 2} more in {path}" if len(names) > 2 else "")
        kept = "the checkpoint from before stands; " if self._path.exists() else ""
        raise UserError(
            f"recipe.learning_rate={recipe.learning_rate:g}: the loss at step {step} (epoch {epoch + 1}) is "
            f"no number: lower it, or raise recipe.warmup_epochs; {kept}the step's images: {some}"
        )

    def _save_or_stop(self, trainer: pl.Trainer, asked: bool, due: bool) -> None:
        if asked or due:
            trainer.save_checkpoint(self._path)
            self._saved = time.monotonic()
        if asked:
            by = self._asked.signal.name if self._asked.signal else "a signal to another rank"
            raise Preempted(f"stopped by {by} after step {trainer.global_step}, which is saved")


def _leave(exception: BaseException) -> None:
    """End this process, whatever it waits for."""
    print(f"this task does not come to its end, so it is ended ({first_line(exception)})", file=sys.stderr)
    sys.stderr.flush()
    os._exit(EXIT_REQUEUE)
