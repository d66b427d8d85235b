"""Measure once whether training is input-bound or compute-bound, and write bottleneck.json.

The device rate comes from the time between the arrival of a batch and the end of its step, on the device's
clock; the loader rate from the thread time per image. The device waits for data while it is idle between two
steps and the training loop waits for the next batch. If it waits for too long, one override is suggested.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.training.loading.batch_loader import BatchBuilder

WARMUP = 5  # steps not measured: memory is allocated, kernels are chosen, threads start
INPUT_BOUND = 0.1  # share of time spent waiting for data from which a training counts as input-bound
MAX_STEPS = 2000  # measured steps

Moment = float | torch.cuda.Event


class BottleneckMonitor(pl.Callback):
    """Times the steps of rank 0 and writes bottleneck.json once.

    Args:
        config: config of the run.
        path: path of bottleneck.json.
        cpus: number of CPUs of this task.
        workers: number of decoding threads; 0: the training thread decodes.
        batches: builder of the train batches.
        dist_env: rank and size of this task; rates are reported for all ranks.

    Attributes:
        summary: short description for the table of jobs; empty until measured.
    """

    def __init__(
        self, config: Config, path: Path, cpus: int, workers: int, batches: BatchBuilder, dist_env: DistEnv
    ) -> None:
        self._config, self._path, self._cpus, self._workers = config, path, cpus, workers
        self._batches, self._ranks, self._enabled = batches, dist_env.size, dist_env.is_rank_zero
        # Of each step: end of the previous one, arrival of the batch, end; s waited for the batch; images.
        self._steps: list[tuple[Moment, Moment, Moment, float, int]] = []
        self._previous_end: Moment | None = None  # None: do not measure the next step
        self._arrival: Moment | None = None
        self._measuring_since, self._seen = 0.0, 0
        self._work_before, self._waited = batches.work, batches.waited
        self.summary = ""

    @property
    def waited(self) -> float:
        """Seconds that the training loop of this rank has waited for batches so far."""
        return self._batches.waited

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Exclude the time between two epochs."""
        self._previous_end = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the arrival of a batch."""
        if not self._enabled or self.summary:
            return
        self._arrival = _now(module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the end of the step; write the report when enough time has passed."""
        if not self._enabled or self.summary:
            return
        end = _now(module.device)
        waited, self._waited = self._batches.waited - self._waited, self._batches.waited
        if self._seen >= WARMUP and self._previous_end is not None and self._arrival is not None:
            self._steps.append((self._previous_end, self._arrival, end, waited, len(batch[1])))
        self._previous_end = end
        self._seen += 1
        if self._seen == WARMUP:
            self._measuring_since, self._work_before = time.monotonic(), self._batches.work
        due = time.monotonic() - self._measuring_since >= self._config.train.bottleneck_after_seconds
        if (due and len(self._steps) > WARMUP) or len(self._steps) >= MAX_STEPS:
            self._report(module.device)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the report if the training was too short to write it earlier."""
        if self._enabled and not self.summary and self._steps:
            self._report(module.device)

    def _report(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        waiting = working = 0.0
        for previous_end, arrival, end, waited, _ in self._steps:
            idle = _seconds_between(previous_end, arrival)
            waiting += min(idle, waited)
            working += _seconds_between(arrival, end) + idle - min(idle, waited)
        images = sum(count for *_, count in self._steps)
        share = waiting / (waiting + working)
        device_rate = images / working
        loader_rate = self._loader_rate()
        input_bound = share >= INPUT_BOUND
        self.summary = f"waits for data {share:.0%} of the time" if input_bound else "compute-bound"
        report = {
            "bottleneck": "input_bound" if input_bound else "compute_bound",
            "waiting": round(share, 4),  # share of the time without a batch
            "cores": self._cpus,  # of one task
            "workers": self._workers,
            "images_per_second": round(self._ranks * images / (waiting + working), 1),
            "loader_images_per_second": loader_rate and round(self._ranks * loader_rate, 1),
            "device_images_per_second": round(self._ranks * device_rate, 1),
            "steps": len(self._steps),
            "refused": len(self._batches.refused),  # images that the device could not decode
            "suggestion": "",
        }
        if input_bound:
            on_gpu = device.type == "cuda"
            report["suggestion"] = suggestion(
                self._config, self._cpus, self._workers, loader_rate, device_rate, on_gpu
            )
        write_json(self._path, report)
        if input_bound:
            fix = f"; {report['suggestion']} would fix it" if report["suggestion"] else ""
            print(f"{self.summary}{fix} ({self._path.name})", flush=True)
        self._steps = []

    def _loader_rate(self) -> float | None:
        """Return the images/s of all threads; None if nothing was decoded, or the GPU decodes."""
        if self._config.loader.decode == "gpu":
            return None
        (images_before, seconds_before), (images, seconds) = self._work_before, self._batches.work
        if images == images_before:
            return None
        return max(1, self._workers) * (images - images_before) / (seconds - seconds_before)


def suggestion(
    config: Config, cpus: int, workers: int, loader: float | None, device: float, on_gpu: bool
) -> str:
    """Return the override that would make the loader as fast as the device; empty: none is known.

    Workers come first. The last resorts change the pixels and therefore the run: smaller images, or GPU
    decoding if the images are small already.

    Args:
        config: config of the run.
        cpus: number of CPUs of a task.
        workers: number of decoding threads.
        loader: loader rate of a task, images/s; None: unknown.
        device: device rate of a task, images/s.
        on_gpu: whether the device is a GPU, which can decode.
    """
    smaller_images = "" if config.process.resize else "process.layout=shards process.resize=short:256"
    if config.loader.decode == "gpu":
        return smaller_images
    worker_rate = loader / max(1, workers) if loader else device / (2 * max(1, workers))
    needed = math.ceil(1.1 * device / worker_rate)
    if workers < needed < cpus:
        return f"loader.workers={needed}"
    if workers < cpus - 1:
        return f"loader.workers={cpus - 1}"
    if config.cluster.executor == "slurm" and cpus < needed + 1 <= 8 * cpus:
        return f"cluster.cpus_per_task={needed + 1}"
    return "loader.decode=gpu" if on_gpu and config.process.resize else smaller_images


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds_between(begin: Moment, end: Moment) -> float:
    """Return the time between two moments, s."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(end, float)
    return end - begin
