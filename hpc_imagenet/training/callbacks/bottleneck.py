"""Measure once whether training is input-bound or compute-bound, and write bottleneck.json.

The device's own speed comes from the time between the arrival of a batch and the end of its step, on the
device's clock; the loader's from what its threads need for an image, whether anybody waits for it or not. The
device waits for data where it has nothing to do between two steps, and the training no batch to give it.
Where the device stands idle, one override is named that would mend it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from hpc_imagenet.config.schema import Config
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.training.loading.batch_loader import BatchBuilder

WARM = 5  # steps that do not count: memory is found, kernels are chosen, threads start
INPUT_BOUND = 0.1  # share of the time without a batch from where on it is worth a word
MOST = 2000  # steps that are looked at

Moment = float | torch.cuda.Event


class BottleneckMonitor(pl.Callback):
    """Watches rank 0's steps, and tells.

    Args:
        config: of the run, for the override.
        path: of bottleneck.json.
        cpus: that this task may use.
        workers: threads that decode; 0: the training's own does.
        batches: what they make.
        world: of which the main rank tells; speeds are told for all of it.
    """

    def __init__(
        self, config: Config, path: Path, cpus: int, workers: int, batches: BatchBuilder, dist_env: DistEnv
    ) -> None:
        self._config, self._path, self._cpus, self._workers = config, path, cpus, workers
        self._batches, self._ranks, self._tell = batches, dist_env.size, dist_env.is_rank_zero
        # When a step waits, has its batch, is done; s that its batch was awaited; images.
        self._steps: list[tuple[Moment, Moment, Moment, float, int]] = []
        self._from: Moment | None = None  # when the wait for the next batch began; None: not to be counted
        self._begun: Moment | None = None
        self._began, self._seen = 0.0, 0
        self._before, self._awaited = batches.spent, batches.awaited
        self.word = ""  # a few words for the table of jobs

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do not count what lies between two epochs."""
        self._from = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that a batch is there."""
        if not self._tell or self.word:
            return
        self._begun = _now(module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that its step is done; tell, when it is time."""
        if not self._tell or self.word:
            return
        done = _now(module.device)
        awaited, self._awaited = self._batches.awaited - self._awaited, self._batches.awaited
        if self._seen >= WARM and self._from is not None and self._begun is not None:
            self._steps.append((self._from, self._begun, done, awaited, len(batch[1])))
        self._from = done
        self._seen += 1
        if self._seen == WARM:
            self._began, self._before = time.monotonic(), self._batches.spent
        late = time.monotonic() - self._began >= self._config.train.bottleneck_after_seconds
        if (late and len(self._steps) > WARM) or len(self._steps) >= MOST:
            self._judge(module.device)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Tell at the latest now, if there was anything to see."""
        if self._tell and not self.word and self._steps:
            self._judge(module.device)

    def _judge(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        waiting = working = 0.0
        for waits, begins, ends, awaited, _ in self._steps:
            idle = _between(waits, begins)
            waiting += min(idle, awaited)
            working += _between(begins, ends) + idle - min(idle, awaited)
        images = sum(count for *_, count in self._steps)
        share = waiting / (waiting + working)
        device_rate = images / working
        loader_rate = self._made()
        starved = share >= INPUT_BOUND
        self.word = f"waits for data {share:.0%} of the time" if starved else "compute-bound"
        told = {
            "bottleneck": "input_bound" if starved else "compute_bound",
            "waiting": round(share, 4),  # share of the time between steps in which there was no batch
            "cores": self._cpus,  # of one task
            "workers": self._workers,
            "images_per_second": round(self._ranks * images / (waiting + working), 1),
            "loader_images_per_second": loader_rate and round(self._ranks * loader_rate, 1),
            "device_images_per_second": round(self._ranks * device_rate, 1),
            "steps": len(self._steps),
            "refused": len(self._batches.refused),  # images that the device could not decode, so CPUs do
            "suggestion": "",
        }
        if starved:
            on_gpu = device.type == "cuda"
            told["suggestion"] = suggestion(
                self._config, self._cpus, self._workers, loader_rate, device_rate, on_gpu
            )
        write_json(self._path, told)
        if starved:
            print(f"{self.word}; {told['suggestion']} would fix it ({self._path.name})", flush=True)
        self._steps = []

    def _made(self) -> float | None:
        """Return the images/s of all threads together; None if nothing was made, or not by threads alone."""
        if self._config.loader.decode == "gpu":
            return None
        (before, earlier), (images, seconds) = self._before, self._batches.spent
        return max(1, self._workers) * (images - before) / (seconds - earlier) if images > before else None


def suggestion(
    config: Config, cpus: int, workers: int, loader: float | None, device: float, on_gpu: bool
) -> str:
    """Return the one override that would bring the loader to the device's speed.

    The last two resorts are another run each, since the pictures are not quite the same then: first smaller
    images, and GPU decoding where the images are small already.

    Args:
        config: of the run.
        cpus: that a task has.
        workers: threads that decode.
        loader: images/s of those together; None: not known.
        device: images/s that the device could take.
        on_gpu: whether it is a GPU, which can decode as well.
    """
    less = "process.layout=shards process.resize=short:256"  # less to decode
    if config.loader.decode == "gpu":
        return less
    each = loader / max(1, workers) if loader else device / (2 * max(1, workers))
    needed = math.ceil(1.1 * device / each)
    if workers < needed < cpus:
        return f"loader.workers={needed}"
    if workers < cpus - 1:
        return f"loader.workers={cpus - 1}"
    if config.cluster.executor == "slurm" and cpus < needed + 1 <= 8 * cpus:
        return f"cluster.cpus_per_task={needed + 1}"
    return "loader.decode=gpu" if on_gpu and config.process.resize else less


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: Moment, end: Moment) -> float:
    """Return the seconds between two moments."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(end, float)
    return end - begin
