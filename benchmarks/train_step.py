"""Measure a training step beside a plain PyTorch loop, and the cost of saving and resuming.

    python benchmarks/train_step.py [--processes 7] [--windows 6] [--timm-benchmark PATH/benchmark.py]

Ours is the whole of `training.fit`: Lightning, metrics, checkpoints, bottleneck monitor and run folder.
Only its loader is replaced, by one batch that is on the device already; the plain loop uses the same batch.
Both run in one process and alternate, a few steps each, so that a busy moment of the machine affects both.
The addresses of tensors make either a few per cent faster for the lifetime of a process, so on a CPU both
are measured in several processes, and / plain is the median of their ratios. A second row computes so
little that the loops themselves are measured. On a GPU four backbones follow, eager and compiled, beside
timm's benchmark script if its path is given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stage does

import numpy as np
import psutil
import torch
from limited import LIMIT, TIMED_OUT, run_limited
from torch import Tensor
from torch.nn import functional as F

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import Preempted
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training import fit as training
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.models import build
from hpc_imagenet.training.models.optim import build_optimizer, lr_factor
from hpc_imagenet.training.models.preprocessing import MEAN, STD

CLASSES = 1000
BACKBONES = ("resnet18", "resnet50", "convnext_tiny", "vit_b_16")
TIMM = {"vit_b_16": "vit_base_patch16_224"}  # torchvision's names → timm's names
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A training step to measure."""

    name: str  # of the backbone
    batch: int  # images
    size: int  # px
    device: torch.device
    steps: int  # of a window
    compiled: bool = False
    warm: int = 2  # steps before a window, since the other loop has filled the caches

    def config(self) -> Config:
        """Return a run's config, of one epoch."""
        # The learning rate does not change the cost of a step, but some networks diverge at a higher one.
        steps = {"epochs": 1, "global_batch": self.batch, "warmup_epochs": 0, "learning_rate": 1e-4}
        sizes = {"size": self.size, "val_size": self.size, "val_resize": self.size}
        words = [f"recipe.{key}={value}" for key, value in {**steps, **sizes}.items()]
        gpus = int(self.device.type == "cuda")
        place = ["cluster=foreground", f"cluster.gpus_per_node={gpus}", "loader.workers=0", "dataset=digits"]
        named = [f"model={self.name}", f"model.compile={self.compiled}", "model.stem=standard"]
        return compose([*place, *named, "recipe=standard90", *words])[0]

    def data(self) -> Batch:
        """Return the batch, on the device."""
        torch.manual_seed(0)
        images = torch.randint(0, 256, (self.batch, 3, self.size, self.size), dtype=torch.uint8)
        images = images.to(self.device, memory_format=torch.channels_last)
        return images, torch.randint(0, CLASSES, (self.batch,)).to(self.device)

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Resident:
    """A loader that repeats one batch."""

    def __init__(self, batch: Batch, length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.length)


class Images:
    """The parts of a datastore that a training reads when its loader is replaced."""

    def __init__(self, count: int) -> None:
        self.store, self.folder = self, Path("memory")
        names = [SimpleNamespace(wnid=f"n{i:08d}", names=(str(i),)) for i in range(CLASSES)]
        self.manifest = SimpleNamespace(classes=names, content="memory")
        self.index = {"label": np.zeros(count, np.int64)}
        self._count = count

    def __len__(self) -> int:
        return self._count

    def open_split(self, name: str) -> Images:
        """Return itself, for every name."""
        return self


def fit(
    task: Task,
    config: Config,
    steps: int,
    run: Run,
    hook: Callable[[ProgressReporter, Any], None],
    store: Any = None,
) -> dict[str, Any]:
    """Train `steps` steps by ours; `hook` is called after each. With a `store`: with our loader."""
    batch, original = task.data(), ProgressReporter.on_train_batch_end

    def noting(self: ProgressReporter, trainer: Any, *rest: Any) -> None:
        original(self, trainer, *rest)
        hook(self, trainer)

    def loader(self: training.ImageDataModule) -> Any:
        return Resident(batch, steps) if store is None else loads(self)

    def judged(self: training.ImageDataModule) -> Resident:
        return Resident(batch, 1)

    loads = training.ImageDataModule.train_dataloader
    with (
        mock.patch.object(ProgressReporter, "on_train_batch_end", noting),
        mock.patch.object(training.ImageDataModule, "train_dataloader", loader),
        mock.patch.object(training.ImageDataModule, "val_dataloader", judged),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        return training.fit(config, store or Images(steps * task.batch), run, DistEnv())  # type: ignore[arg-type]


@contextlib.contextmanager
def new_run() -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-step-") as folder:
        yield Run(Path(folder))


Window = Callable[[], float]  # runs a window: `warm` steps, then returns s per step of those that follow


def plain(task: Task, windows: int) -> Iterator[float]:
    """Yield s per step of each window of a loop of a dozen lines."""
    recipe, each = task.config().recipe, task.warm + task.steps
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = build.build_model(task.name, CLASSES, stem="standard", size=task.size)
    network = network.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if task.compiled:
        network.compile(dynamic=False)
    mean, std = (255 * torch.tensor(value, device=task.device).view(3, 1, 1) for value in (MEAN, STD))
    chosen = build_optimizer(network, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: lr_factor(step, windows * each, 0))
    on_gpu, begin = task.device.type == "cuda", 0.0
    for step, (images, labels) in enumerate(Resident(task.data(), windows * each)):
        if step % each == task.warm:
            task.wait()
            begin = time.perf_counter()
        with torch.autocast(task.device.type, torch.bfloat16, enabled=on_gpu):
            loss = F.cross_entropy(network((images - mean) / std).float(), labels)  # in float32, as ours
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        schedule.step()
        if (step + 1) % each == 0:
            task.wait()
            yield (time.perf_counter() - begin) / task.steps


def in_turns(
    task: Task, windows: int, others: dict[str, Window], config: Config | None = None, store: Any = None
) -> dict[str, list[float]]:
    """Return s per step of every window of ours, and of the others, each of which runs after one of ours.

    The first window of each, in which memory is allocated and code is compiled, does not count.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ("ours", *others)}
    each, begin = task.warm + task.steps, 0.0

    def hook(_: ProgressReporter, trainer: Any) -> None:
        nonlocal begin
        if trainer.global_step % each == task.warm:
            task.wait()
            begin = time.perf_counter()
        elif trainer.global_step % each == 0:
            task.wait()
            seconds["ours"].append((time.perf_counter() - begin) / task.steps)
            for way, window in others.items():
                seconds[way].append(window())

    with new_run() as run:
        fit(task, config or task.config(), (1 + windows) * each, run, hook, store)
    return {way: times[1:] for way, times in seconds.items()}


def both(task: Task, windows: int) -> dict[str, list[float]]:
    """Return s per step of every window of ours and of the plain loop."""
    return in_turns(task, windows, {"plain PyTorch": plain(task, 1 + windows).__next__})


def row(task: Task, windows: int, processes: int, script: Path | None = None) -> None:
    """Print a line per loop; the last figure is its time divided by that of the plain loop."""
    rounds = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            rounds.append(fresh.submit(both, task, windows).result())
    if script:
        rounds = [{**one, "timm's benchmark.py": [timm_rate(script, task)]} for one in rounds]
    kind = ("compiled" if task.compiled else "eager") if task.device.type == "cuda" else "CPU"
    name = f"{task.name}, {task.batch} x {task.size} px, {kind}"
    for way in rounds[0]:
        times = [value for one in rounds for value in one[way]]
        middle = statistics.median(times)
        ratio = statistics.median(
            statistics.median(one[way]) / statistics.median(one["plain PyTorch"]) for one in rounds
        )
        figures = " ".join(f"{value * 1000:9.1f}" for value in (middle, min(times), max(times)))
        print(f"{name:36} {way:20} {figures} {task.batch / middle:10.1f} {ratio:8.3f}", flush=True)


def saving(task: Task, repeats: int) -> None:
    """Print the cost of a checkpoint, and of resuming from it compared with a fresh start."""
    saves, fresh, again, megabytes = [], [], [], 0.0
    for _ in range(repeats):
        with new_run() as run:
            begun: list[float] = []
            fit_begins = time.perf_counter()

            def hook(_: ProgressReporter, trainer: Any, begun: list[float] = begun) -> None:
                begun.append(time.perf_counter())
                if len(begun) == 2:
                    os.kill(os.getpid(), signal.SIGUSR2)

            with contextlib.suppress(Preempted):
                fit(task, task.config(), 4, run, hook)
            saves.append(time.perf_counter() - begun[1])
            fresh.append(begun[0] - fit_begins)
            megabytes = (run.folder / "checkpoints" / "last.ckpt").stat().st_size / 1e6
            begun.clear()
            begun.append(0.0)  # so that the hook does not stop it again
            begun.append(0.0)
            fit_begins = time.perf_counter()
            fit(task, task.config(), 4, run, hook)
            again.append(begun[2] - fit_begins)
    save, first, on = (statistics.median(times) for times in (saves, fresh, again))
    print(
        f"{task.name}: saved ({megabytes:.0f} MB) and stopped in {save:.2f} s; until the end of a first step"
    )
    print(f"  {first:.2f} s from nothing, {on:.2f} s from the checkpoint")
    print(
        f"  save + resume: {save + max(0.0, on - first):.2f} s beyond the process start (median of {repeats})"
    )


def timm_rate(script: Path, task: Task) -> float:
    """Return s per step of timm's benchmark script.

    Raises:
        RuntimeError: the script failed; its last line.
    """
    words = [
        "--bench",
        "train",
        "--model",
        TIMM.get(task.name, task.name),
        "-b",
        str(task.batch),
        "--img-size",
        str(task.size),
    ]
    words += ["--amp", "--amp-dtype", "bfloat16", "--channels-last", "--opt", "momentum"]
    words += ["--num-warm-iter", "5", "--num-bench-iter", "20", "--no-retry", "--device", task.device.type]
    words += ["--torchcompile"] if task.compiled else []
    try:
        done = run_limited([sys.executable, script, *words], LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{script}: {TIMED_OUT}") from None
    _, mark, text = done.stdout.partition("--result")
    if done.returncode or not mark:
        raise RuntimeError(f"{script}: {(done.stderr.strip().splitlines() or ['no result'])[-1]}")
    try:
        result, _ = json.JSONDecoder().raw_decode(text.strip())  # ignores what is printed after it
        return task.batch / float(result["train_samples_per_sec"])
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"{script}: no train_samples_per_sec in {' '.join(text.split())[:200]}") from None


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {cores} CPU cores, {memory:.0f} GiB, {gpu}, load {load:.1f} at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=7, help="of each row on the CPU (7)")
    parser.add_argument("--windows", type=int, default=6, help="of each way in a process (6)")
    parser.add_argument("--steps", type=int, default=4, help="of a window (4)")
    parser.add_argument("--batch", type=int, default=16, help="images of a step on the CPU (16)")
    parser.add_argument("--size", type=int, default=128, help="px of the images on the CPU (128)")
    parser.add_argument("--gpu-batch", type=int, default=256, help="images of a step on a GPU (256)")
    parser.add_argument("--timm-benchmark", type=Path, help="timm's benchmark.py, as a peer on a GPU")
    options = parser.parse_args()
    versions = (torch.__version__, __import__("pytorch_lightning").__version__)
    print(machine())
    print(f"Python {platform.python_version()}, torch {versions[0]}, pytorch-lightning {versions[1]}")
    columns = " ".join(f"{name:>9}" for name in ("median", "min", "max"))
    print(
        f"{'ms a step':36} {'':20} {columns} {'images/s':>10} {'/ plain':>8}"
        f"   ({options.processes} processes, {options.windows} windows each)"
    )
    cpu, steps, batch = torch.device("cpu"), options.steps, options.gpu_batch
    if not torch.cuda.is_available():
        row(Task("resnet18", options.batch, options.size, cpu, steps), options.windows, options.processes)
        row(Task("squeezenet1_1", 1, 32, cpu, 5 * steps), options.windows, options.processes)
        print(f"{', '.join(BACKBONES)}, {batch} x 224 px, eager and compiled: no GPU")
    for name in BACKBONES if torch.cuda.is_available() else ():
        for compiled in (False, True):
            task = Task(name, batch, 224, torch.device("cuda", 0), 5 * steps, compiled)
            row(task, options.windows, 1, options.timm_benchmark)
    saving(Task("resnet50", 4, 64, cpu, 1), 3)


if __name__ == "__main__":
    main()
