"""Time the parts of a training and write its `TimeRecord`, from which prices are computed.

All wall time from the start of the process to the result belongs to one part: startup, epochs (training,
validation, checkpoint) and end, but for the time in which it waited for copies on the nodes. The device is
synchronized after the first batches and after the last one of an epoch only, so that its steps overlap as
usual.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.datastore.manifest import Manifest
from hpc_imagenet.datastore.node_cache.cache import cached_bytes
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import read_record
from hpc_imagenet.runs.store import Run
from hpc_imagenet.runs.time_record import (
    ZERO,
    PassTime,
    Time,
    TimeRecord,
    find_record,
    training_shape,
    write_record,
)

WARMUP = 3  # batches at the beginning of a pass that do not count as its steady rate


@dataclass(frozen=True)
class PassLimit:
    """How much of an epoch a price job trains: at most `batches`, and about `seconds` after the first one.

    `shape` is that of the whole training.
    """

    batches: int
    seconds: float
    shape: dict[str, Any]


class EpochTimes(pl.Callback):
    """Times every epoch of this attempt, and writes the record when one is complete.

    It is the last callback, so that the work of the others belongs to their batch.

    Args:
        path: folder of all runs; None on ranks that do not write.
        record: the record as far as it is known before the training: run, host, device, shape …
        sizes: side of the training images in each epoch, px.
        bottleneck: path of bottleneck.json.
        staged: returns the bytes in the node's cache, and those of the dataset; None without a cache.
        tasks: tasks of this job on this node, whose memory is assumed to be that of this one.
        limit: of a price job; None: whole epochs.
        follows: whether this process has trained before, so that its startup is that of an earlier record.
        waited: s before the training for copies on the nodes; not part of the startup, as a later start finds
            them.
    """

    def __init__(
        self,
        path: Path | None,
        record: dict[str, Any],
        sizes: Sequence[int],
        bottleneck: Path,
        staged: Callable[[], tuple[int, int] | None],
        tasks: int,
        limit: PassLimit | None = None,
        follows: bool = False,
        waited: float = 0.0,
    ) -> None:
        self._runs, self._known, self._sizes = path, record, sizes
        self._bottleneck, self._staged, self._tasks, self._limit = bottleneck, staged, tasks, limit
        self._training: dict[int, list[_Pass]] = {}
        self._validations: list[_Pass] = []
        self._after: list[Time] = []
        self._startup: Time | None = None
        # The time of this process that is no startup of this training; a trial before waited as well.
        self._follows, self._before = follows, _now() if follows else Time(waited, 0.0)
        self._pass: _Pass | None = None  # the one that is being timed
        self._since = ZERO  # end of the last part

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End the startup. The first epoch of an attempt may begin in its middle, without its own start."""
        now = _now()
        self._startup = now - self._before
        self._pass = _Pass(now)
        if self._limit:
            per_step = trainer.accumulate_grad_batches
            _end_epoch_at(trainer, max(1, self._limit.batches // per_step) * per_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End the epoch before."""
        if self._since != ZERO:
            now = _now()
            self._after.append(now - self._since)
            self._write()
            self._pass = _Pass(now)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the end of a batch; at the last one of an epoch its validation begins."""
        if self._pass is None:
            return
        last = batch_idx + 1 == trainer.num_training_batches
        self._pass.end_batch(module.device, last)
        if last:
            self._training.setdefault(self._sizes[trainer.current_epoch], []).append(self._pass)
            self._since = self._pass.end
            self._pass = None
        # Kernels may be compiled in the first batch, so its time does not count.
        elif self._limit and (_now() - self._pass.first_end).wall > self._limit.seconds:
            per_step = trainer.accumulate_grad_batches
            # The next step is the last one, as every callback can see at its beginning.
            _end_epoch_at(trainer, (batch_idx // per_step + 2) * per_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End the last epoch."""
        if self._since != ZERO:
            now = _now()
            self._after.append(now - self._since)
            self._since = now

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a validation where the training ended."""
        self._pass = _Pass(_now() if self._since == ZERO else self._since)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the end of a batch."""
        if self._pass is not None:
            (batches,) = trainer.num_val_batches
            self._pass.end_batch(module.device, batch_idx + 1 == batches)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End a validation."""
        if self._pass is not None and self._pass.batches and trainer.state.fn == "fit":
            self._pass.end = self._since = _now()
            self._validations.append(self._pass)
        self._pass = None

    def finish(self) -> None:
        """Write the record, with the time since the last epoch, when the result is complete."""
        self._write(_now() - self._since)

    def _write(self, end: Time | None = None) -> None:
        # The first epoch alone includes the warm-up.
        passes = [each for epochs in self._training.values() for each in epochs]
        if self._runs is None or self._startup is None or not self._validations or len(passes) < 2:
            return
        found = read_record(self._bottleneck)
        startup, earlier = self._startup, None
        if end is None or self._follows:
            earlier = find_record(self._runs, self._known["shape"])
        if self._follows and earlier:
            startup = earlier.startup
        if end is None and earlier:
            end = earlier.end
        record = TimeRecord(
            **self._known,
            train=_by_size(self._training),
            validation=_summary(self._validations, ()),
            after=_median(self._after),
            startup=startup,
            end=end or ZERO,
            waiting=found.get("waiting"),
            suggestion=str(found.get("suggestion", "")),
            memory=self._tasks * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            staged=self._staged(),
        )
        with contextlib.suppress(OSError, UserError):  # a full disk, or a folder that others made
            write_record(self._runs, record)


def epoch_times(
    config: Config,
    manifest: Manifest,
    run: Run,
    dist_env: DistEnv,
    device: torch.device,
    limit: PassLimit | None,
) -> EpochTimes:
    """Return the callback of a training, or of a price job with `limit`."""
    cluster = cluster_for(config, config.stage.name)

    def staged() -> tuple[int, int] | None:
        if not cluster.scratch:
            return None
        return cached_bytes(cluster.scratch, manifest.shards), sum(shard.bytes for shard in manifest.shards)

    known = {
        "run": run.id,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpus": available_cpus(dist_env),
        "short": limit is not None,
        "shape": limit.shape if limit else training_shape(config, cluster),
    }
    return EpochTimes(
        run.folder.parent if dist_env.is_rank_zero else None,
        known,
        config.recipe.sizes,
        run.folder / "bottleneck.json",
        staged,
        dist_env.local_size,
        limit,
        run.follows,
        run.waited,
    )


class _Pass:
    """The times of one pass over batches: its begin, the end of the warm-up, and its end."""

    def __init__(self, begin: Time) -> None:
        self.begin, self.first_end, self.warm, self.end = begin, begin, begin, begin
        self.batches, self.warm_batches = 0, 0

    def end_batch(self, device: torch.device, last: bool) -> None:
        self.batches += 1
        if self.batches <= WARMUP and not last:
            self._synchronize(device)
            self.warm, self.warm_batches = _now(), self.batches
            if self.batches == 1:
                self.first_end = self.warm
        if last:
            self._synchronize(device)
            self.end = _now()

    @staticmethod
    def _synchronize(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @property
    def batch(self) -> Time:
        """The time of a batch after the warm-up; of a pass of one batch, that batch."""
        steady = self.batches - self.warm_batches
        return (self.end - self.warm) * (1 / steady)

    @property
    def overhead(self) -> Time:
        return self.end - self.begin - self.batch * self.batches


def _by_size(training: dict[int, list[_Pass]]) -> dict[int, PassTime]:
    """Return the time of each size; one that was passed once gets the overhead of the others."""
    repeated = [each.overhead for passes in training.values() for each in passes[1:]]
    return {size: _summary(passes, repeated) for size, passes in training.items()}


def _summary(passes: Sequence[_Pass], repeated: Sequence[Time]) -> PassTime:
    """Return the time of passes of one kind; `repeated`: overheads of others after their first."""
    own = [each.overhead for each in passes[1:]]
    overhead = _median(own or repeated or [passes[0].overhead])
    first = passes[0].overhead - overhead
    first = Time(max(0.0, first.wall), max(0.0, first.cpu))
    # The first pass is slower until caches are filled, so it counts only if it is alone.
    return PassTime(_median([each.batch for each in passes[1:] or passes]), overhead, first)


def _median(times: Sequence[Time]) -> Time:
    if not times:
        return ZERO
    return Time(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))


def _end_epoch_at(trainer: pl.Trainer, batches: int) -> None:
    """Make epochs end after `batches` batches, and validate there."""
    loop: Any = trainer.fit_loop
    loop.max_batches = trainer.val_check_batch = min(batches, trainer.num_training_batches)


_AGE = time.time() - psutil.Process().create_time() - time.monotonic()


def _now() -> Time:
    """Return the time since this process was started, and the CPU time that it has used."""
    return Time(time.monotonic() + _AGE, time.process_time())
