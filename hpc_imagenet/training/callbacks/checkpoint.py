"""Decisions between steps, agreed on by all ranks: save a checkpoint, stop, or abort on a non-finite loss.

Clocks, signals and losses differ between ranks, so one small all-reduce per step makes them agree. It runs on
the CPU and therefore does not wait for the GPU.
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
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.errors import EXIT_REQUEUE, PeerLost, Preempted, UserError, first_line
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.runs.bad_batch import BAD_BATCH_FILE, write_bad_batch
from hpc_imagenet.runs.checkpoints import LAST
from hpc_imagenet.training.callbacks.checkpoint_file import KeptCheckpoints, write_checkpoint
from hpc_imagenet.training.distributed import COLLECTIVE_TIMEOUT, is_host_memory, out_of_memory

LOSS_CHECK_INTERVAL = 50  # steps between two checks of the loss on a GPU: each synchronizes with it
NEVER = 2**31 - 1  # step number meaning that all losses were finite
EXIT_TIMEOUT = 60.0  # s that a failed task may take to exit if there are other tasks


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints with `write_checkpoint`.

    Args:
        check_lease: called just before the file is renamed; raises `Superseded` if this job has lost the
            run's lease.
    """

    def __init__(self, check_lease: Callable[[], object]) -> None:
        super().__init__()
        self._check_lease = check_lease

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path` atomically, and keep the old file as `previous.ckpt`."""
        write_checkpoint(checkpoint, Path(path), self._check_lease)


class CheckpointCallback(pl.Callback):
    """Saves `last.ckpt` at the end of every epoch, at regular intervals, and before stopping on a signal.

    Args:
        folder: folder of the checkpoints.
        stop_signal: stop signal of this rank.
        interval: time between two checkpoints within an epoch, s.
        content: further keys of the files: `identity` (settings that a later attempt must share; see
            `checkpoint_file.identity_differences`), config and classes.
        kept: checkpoints that are kept beside the last one.
        images: returns name and position in the train split of each image of a step, over all ranks.
        is_rank_zero: whether this rank writes into the run folder.

    Attributes:
        out_of_memory: whether the training failed because of too little memory.
    """

    def __init__(
        self,
        folder: Path,
        stop_signal: StopSignal,
        interval: float,
        content: dict[str, Any],
        kept: KeptCheckpoints,
        images: Callable[[int], list[tuple[str, int]]],
        is_rank_zero: bool,
    ) -> None:
        self._path, self._stop_signal, self._interval = folder / LAST, stop_signal, interval
        self._content, self._kept = content, kept
        self._images, self._is_rank_zero = images, is_rank_zero
        self._group: Any = None
        self._resumed = 0  # step of the checkpoint that this rank has read
        self._bad_step: Tensor | None = None  # first step with a non-finite loss, on the device
        self._last_save = time.monotonic()
        self._validating = False
        self._metrics: dict[str, float] = {}  # of the epoch that has just been validated
        self.out_of_memory = False

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Create the process group for the decisions, and compare the checkpoints that the ranks have read.

        Each rank reads by itself, and falls back to an older checkpoint by itself.

        Raises:
            PeerLost: they resume from different steps, which a new start of the job may fix.
        """
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        least, most = self._all_reduce_max(-self._resumed, self._resumed)
        if -least != most:
            raise PeerLost(f"the tasks have read different checkpoints, of steps {-least} to {most}")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the checkpoint interval."""
        self._last_save = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, stop or abort, if this batch completed a step."""
        batches_done = batch_idx + 1
        self._record_loss(outputs, trainer.global_step + (batches_done % trainer.accumulate_grad_batches > 0))
        if batches_done % trainer.accumulate_grad_batches:
            return
        # After the last step of an epoch, Lightning can resume only from a checkpoint saved in or after the
        # validation that follows.
        last = batches_done == trainer.num_training_batches
        check = module.device.type == "cpu" or last or trainer.global_step % LOSS_CHECK_INTERVAL == 0
        stop, due, bad = self._all_reduce_max(
            self._stop_signal, self._due(), self._first_bad_step() if check else 0
        )
        if (stop or due) and not check:
            (bad,) = self._all_reduce_max(self._first_bad_step())
        if bad:
            self._abort(module.recipe, NEVER - bad, trainer.current_epoch)
        if not last:
            self._save_or_stop(trainer, bool(stop), bool(due))

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reset the counters of a validation that an earlier attempt began, since it is repeated."""
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
        """Save or stop within the validation of an epoch; a resumed run repeats the whole validation."""
        if trainer.state.fn != "fit":
            return
        self._validating = True
        try:
            stop, due = self._all_reduce_max(self._stop_signal, self._due())
            self._save_or_stop(trainer, bool(stop), bool(due))
        finally:
            self._validating = False

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Make sure that this task exits.

        If a rank dies, a collective hangs the other GPUs, and Lightning's teardown hangs on the GPU; so this
        task exits after a timeout.
        """
        # Tested here, because Lightning's teardown moves the network to the CPU and so frees GPU memory.
        self.out_of_memory = out_of_memory(exception, module.device)
        if trainer.world_size > 1 and not isinstance(exception, Preempted):
            cause = first_line(exception)
            if self.out_of_memory:  # the messages of NCCL and cuDNN have several lines, or other words
                of_device = module.device.type == "cuda" and not is_host_memory(exception)
                cause = f"{'CUDA out of memory' if of_device else 'out of host memory'}: {cause}"
            timer = threading.Timer(EXIT_TIMEOUT, _exit, (cause,))
            timer.daemon = True
            timer.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save; keep the checkpoint if it is the best; stop on a signal, unless this was the last epoch."""
        (stop,) = self._all_reduce_max(self._stop_signal)
        more = trainer.current_epoch + 1 < (trainer.max_epochs or 0)
        values = {name: float(trainer.callback_metrics[f"val_{name}"]) for name in ("top1", "top5", "loss")}
        self._metrics = {**values, "epoch": trainer.current_epoch + 1}
        try:
            self._save_or_stop(trainer, bool(stop) and more, True)
        finally:
            self._metrics = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add `accumulate`, content and metrics, and mark an unfinished validation as not begun."""
        checkpoint |= {"accumulate": trainer.accumulate_grad_batches, **self._content}
        checkpoint["metrics"] = self._metrics
        if self._validating:
            # Recorded as interrupted in its first batch, so that Lightning repeats the whole validation.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            zero = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
            progress["total"], progress["current"] = {**zero, "ready": 1, "started": 1}, zero
            progress["is_last_batch"] = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step, and rescale the batch counters to the current `train.accumulate`.

        Checkpoints fall between steps, so the division is exact.
        """
        self._resumed = int(checkpoint["global_step"])
        old, new = checkpoint["accumulate"], trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            # 1 if saved in a hook, which runs before Lightning counts the batch as completed.
            lag = counts["processed"] - counts["completed"]
            counts |= {name: counts[name] // old * new for name in ("ready", "started", "processed")}
            counts["completed"] = counts["processed"] - lag

    def _due(self) -> bool:
        return time.monotonic() - self._last_save > self._interval

    def _all_reduce_max(self, *values: object) -> list[int]:
        """Return the maximum over all ranks of each value, an integer or a truth value."""
        numbers = [value if type(value) is int else int(bool(value)) for value in values]
        if self._group is None:
            return numbers
        reduced = torch.tensor(numbers, dtype=torch.int32)
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self._group)
        return [int(number) for number in reduced.tolist()]

    def _record_loss(self, outputs: Any, step: int) -> None:
        """Update the first bad step on the device, without a synchronization."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if self._bad_step is None:
            self._bad_step = torch.full((), NEVER, device=loss.device)
        self._bad_step = torch.where(
            torch.isfinite(loss.detach()), self._bad_step, self._bad_step.clamp(max=step)
        )

    def _first_bad_step(self) -> int:
        """Return 0 if every loss was finite, else a number: larger the earlier the first NaN or inf came.

        Synchronizes with the device.
        """
        return 0 if self._bad_step is None else NEVER - int(self._bad_step)

    def _abort(self, recipe: Recipe, step: int, epoch: int) -> None:
        """Write `bad_batch.txt` and raise `UserError`."""
        images, folder = self._images(step - 1), self._path.parents[1]
        names = [name for name, _ in images]
        if self._is_rank_zero:
            write_bad_batch(folder, images)
        some = ", ".join(names[:2]) + (
            f" and {len(names) - 2} more in {folder / BAD_BATCH_FILE}" if len(names) > 2 else ""
        )
        kept = "the last checkpoint is kept; " if self._path.exists() else ""
        raise UserError(
            f"recipe.learning_rate={recipe.learning_rate:g}: the loss at step {step} (epoch {epoch + 1}) is "
            f"not finite: lower the rate, or raise recipe.warmup_epochs; {kept}images of this step: {some}"
        )

    def _save_or_stop(self, trainer: pl.Trainer, stop: bool, due: bool) -> None:
        if stop or due:
            trainer.save_checkpoint(self._path)
            if self._is_rank_zero:
                self._kept.keep(self._path, self._metrics)
            self._last_save = time.monotonic()
        if stop:
            own = self._stop_signal.signal
            source = own.name if own else "a signal to another rank"
            raise Preempted(f"stopped by {source} after step {trainer.global_step}, which is saved")


def _exit(cause: str) -> None:
    """Exit this process at once, even if other threads hang; `cause` is the first line of the error."""
    print(
        f"this task did not exit within {EXIT_TIMEOUT:g} s of an error, so it is terminated ({cause})",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(EXIT_REQUEUE)
