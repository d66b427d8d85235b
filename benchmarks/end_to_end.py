"""Is a training as fast as the slower of its loader and its device? Each alone, and both together.

    python benchmarks/end_to_end.py [--windows 3] [--steps 50] [--model NAME] [--batch 64] [--size 96]

The images are those of loader.py, as they were downloaded and tiled; the loader alone brings them to the
device, the device alone trains on one batch that lies there, and together it is the whole of `training.fit`.
On a CPU one core is the device and the others decode, so that they share no more than memory and caches. On a
GPU all cores decode, and the GPU itself as well (`loader.decode=gpu`). Ways take turns. The last column is
together / min(loader, device).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stage does

import numpy as np
import torch
from loader_data import POOL, pictures, write_store
from train_step import CLASSES, Task, machine, ours

from hpc_imagenet.archives import picture
from hpc_imagenet.archives.treat import Treatment
from hpc_imagenet.config import Config
from hpc_imagenet.datastore.manifest import Category
from hpc_imagenet.datastore.store import Split, Store
from hpc_imagenet.training import loaders
from hpc_imagenet.training.sampler import Share
from hpc_imagenet.world import World

WARM = 10  # steps before a window begins: what was made while the first ones were slow is used up


class Repeated:
    """A datastore of few images with an index that names them again and again."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self._store = folder, Store(folder)
        classes = tuple(Category(f"n{i:08d}", (str(i),)) for i in range(CLASSES))
        self.manifest = replace(self._store.manifest, classes=classes)
        self._index = np.resize(self._store.split("train").index, images)

    def split(self, name: str) -> Split:
        """Return the same for either."""
        return Split(self._store, self._index)


def loader(task: Task, config: Config, store: Repeated) -> float:
    """Return the s a step of the loader alone."""
    train = store.split("train")
    made = loaders.Loaders(config, train, train, Share(task.batch), World(), task.device)
    made.trainer = SimpleNamespace(global_step=0)  # type: ignore[assignment]
    batches = iter(made.train_dataloader())
    for _ in range(WARM):
        next(batches)
    task.wait()
    begin = time.perf_counter()
    for _ in range(task.steps):
        next(batches)
    task.wait()
    return (time.perf_counter() - begin) / task.steps


def measure(task: Task, folder: Path, windows: int, decode: str, workers: int) -> None:
    """Print one line of images/s."""
    store, config = Repeated(folder, (WARM + task.steps) * task.batch), task.config()
    config.loader.decode, config.loader.workers = decode, workers
    ways: dict[str, Any] = {
        "loader": lambda: loader(task, config, store),
        "device": lambda: ours(task, warm=WARM),
        "together": lambda: ours(task, config, store, WARM),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(windows):
        for way, window in ways.items():
            rates[way].append(task.batch / window())
    medians = {way: statistics.median(each) for way, each in rates.items()}
    figures = " ".join(
        f"{medians[way]:9.1f} ({min(rates[way]):.1f} to {max(rates[way]):.1f})" for way in ways
    )
    share = medians["together"] / min(medians["loader"], medians["device"])
    print(f"{task.name}, {folder.name}, decoded on {decode:4} {figures} {share:8.3f}", flush=True)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=3, help="of each way (3)")
    parser.add_argument("--steps", type=int, default=50, help="of a window (50)")
    parser.add_argument(
        "--model", nargs="*", default=["resnet18", "resnet50"] if on_gpu else ["squeezenet1_1"]
    )
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 64, help="images of a step")
    parser.add_argument("--size", type=int, default=224 if on_gpu else 96, help="px")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if not on_gpu and len(cpus) < 2:
        raise SystemExit("one CPU core: nothing can be done side by side")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    decoding = frozenset() if on_gpu else frozenset(cpus[1:])
    print(machine())
    if not on_gpu:
        os.sched_setaffinity(0, cpus[:1])
    print(f"images/s, median (min to max) of {options.windows}: loader, device, together, share")
    with (
        tempfile.TemporaryDirectory(prefix="hpc-imagenet-end-") as name,
        mock.patch.object(loaders, "own_cpus", return_value=decoding),
    ):
        pool = pictures(POOL)
        for kind in ("archive", "tiled"):
            treat, folder = Treatment(tile=kind == "tiled"), Path(name) / kind
            made = [treat(data, picture.examine(data))[0] for data in pool]
            write_store(folder, [(data, i % 10) for i, data in enumerate(made)])
            for model in options.model:
                task = Task(model, options.batch, options.size, device, options.steps)
                for decode in ("cpu", "gpu") if on_gpu else ("cpu",):
                    measure(task, folder, options.windows, decode, max(1, len(cpus) - 1))


if __name__ == "__main__":
    main()
