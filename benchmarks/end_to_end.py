"""Measure loader and device, each alone and both together, in images/s.

    python benchmarks/end_to_end.py [--windows 9] [--steps 10] [--model NAME] [--batch 64] [--size 96]

The images are those of loader.py, original and tiled. The loader alone copies them to the device, the
device alone trains on one resident batch in a plain loop, and together is the whole of `training.fit`. On a
CPU one core is the device and the others decode, so that they share only memory and caches; images of a
third of the size follow, where the loader is the slower part. On a GPU all cores decode, and the GPU itself
as well (`loader.decode=gpu`). The three run in one process and alternate, so that a busy moment of the
machine affects all of them. The last column is together / min(loader, device).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stage does

import numpy as np
import torch
from loader_data import POOL, as_processed, make_images, write_store
from train_step import CLASSES, Task, in_turns, machine, plain

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.manifest import ClassNames
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.training.loading import datamodule
from hpc_imagenet.training.loading.sampler import BatchShare

WARM = 6  # steps before a window, which use up batches prepared during another's turn


class Repeated:
    """A datastore of few images with an index that repeats them."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self._store = folder, DatasetReader(folder)
        classes = tuple(ClassNames(f"n{i:08d}", (str(i),)) for i in range(CLASSES))
        self.manifest = replace(self._store.manifest, classes=classes)
        self._index = np.resize(self._store.open_split("train").index, images)

    def open_split(self, name: str) -> SplitReader:
        """Return the same split for every name."""
        return SplitReader(self._store, self._index)


def loader(task: Task, config: Config, store: Repeated) -> Iterator[float]:
    """Yield s per step of each window of the loader alone."""
    train = store.open_split("train")
    made = datamodule.ImageDataModule(config, train, train, BatchShare(task.batch), DistEnv(), task.device)
    made.trainer = SimpleNamespace(global_step=0)  # type: ignore[assignment]
    begin = 0.0
    for step, _ in enumerate(made.train_dataloader()):
        place = (step + 1) % (task.warm + task.steps)
        if place == task.warm:
            task.wait()
            begin = time.perf_counter()
        elif place == 0:
            task.wait()
            yield (time.perf_counter() - begin) / task.steps


def measure(task: Task, folder: Path, windows: int, decode: str, workers: int) -> dict[str, list[float]]:
    """Return images/s of each window: loader alone, device alone, and both together."""
    steps = (1 + windows) * (task.warm + task.steps)
    store, config = Repeated(folder, steps * task.batch), task.config()
    config.loader.decode, config.loader.workers = decode, workers
    others = {
        "loader": loader(task, config, store).__next__,
        "device": plain(task, 1 + windows).__next__,
    }
    seconds = in_turns(task, windows, others, config, store)
    return {way: [task.batch / each for each in seconds[way]] for way in ("loader", "device", "ours")}


def show(name: str, rates: dict[str, list[float]]) -> None:
    """Print one line of images/s."""
    medians = {way: statistics.median(each) for way, each in rates.items()}
    figures = " ".join(
        f"{medians[way]:9.1f} ({min(each):.1f} to {max(each):.1f})" for way, each in rates.items()
    )
    share = medians["ours"] / min(medians["loader"], medians["device"])
    print(f"{name:46} {figures} {share:8.3f}", flush=True)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=9, help="of each way (9)")
    parser.add_argument("--steps", type=int, default=10, help="of a window (10)")
    parser.add_argument(
        "--model", nargs="*", default=["resnet18", "resnet50"] if on_gpu else ["squeezenet1_1"]
    )
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 64, help="images of a step")
    parser.add_argument("--size", type=int, default=224 if on_gpu else 96, help="px")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if not on_gpu and len(cpus) < 2:
        raise SystemExit("one CPU core: loader and device cannot run in parallel")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    decoding = frozenset() if on_gpu else frozenset(cpus[1:])
    print(machine())
    if not on_gpu:
        os.sched_setaffinity(0, cpus[:1])
    print(f"images/s, median (min to max) of {options.windows}: loader, device, together; share")
    with (
        tempfile.TemporaryDirectory(prefix="hpc-imagenet-end-") as name,
        mock.patch.object(datamodule, "pinned_cpus", return_value=decoding),
    ):
        pool = make_images(POOL)
        for kind in ("archive", "tiled"):
            folder, (made, note) = Path(name) / kind, as_processed(pool, kind)
            if note:
                print(f"{kind}{note}")
            write_store(folder, [(data, i % 10) for i, data in enumerate(made)])
            sizes = [options.size] if on_gpu else [options.size, max(32, options.size // 3)]
            for model, size in itertools.product(options.model, sizes):
                task = Task(model, options.batch, size, device, options.steps, warm=WARM)
                for decode in ("cpu", "gpu") if on_gpu else ("cpu",):
                    rates = measure(task, folder, options.windows, decode, max(1, len(cpus) - 1))
                    show(f"{model}, {size} px, {kind}, decoded on {decode}", rates)


if __name__ == "__main__":
    main()
