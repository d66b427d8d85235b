"""Train four small networks on 2 CPUs, with a loader each and with one loader for all of them.

    python benchmarks/share_loader.py [--images 1024] [--epochs 8] [--repeats 3] [--folder DIR]

The images have ImageNet's size (500 x 375 px, about 105 kB) and are cropped to 64 px; the networks are so
small that the loader decides, as on a fast GPU. With a loader each, the trainings run one after another, each
on both CPUs; with one loader, all at once. Both run twice, for 1 and for more epochs, so that the difference
leaves out the start of Python and torch:

- images x models/s: of all trainings together; needs an idle machine, and is left out if the load changed so
  much that the longer trainings took less time.
- CPU ms: user and system time of all processes for an image and a model, which other load hardly changes.
  From it the images x models/s that two CPUs can do at most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from loader_data import make_images

from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split
from hpc_imagenet.io.tar_header import END, member_header

CPUS, MODELS = 2, 4
NETWORKS = """
from torch import nn

def build(num_classes, width):
    return nn.Sequential(
        nn.Conv2d(3, width, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )

def w6(num_classes): return build(num_classes, 6)
def w8(num_classes): return build(num_classes, 8)
def w10(num_classes): return build(num_classes, 10)
def w12(num_classes): return build(num_classes, 12)
"""
SETTINGS = (
    *("datastore.name=bench", "model=bench_nets:w6,bench_nets:w8,bench_nets:w10,bench_nets:w12"),
    *("recipe=demo", "recipe.global_batch=128", "recipe.size=64", "recipe.val_size=64"),
    *("recipe.val_resize=72", "recipe.crop_scale=0.25", "cluster=foreground", "cluster.gpus_per_node=0"),
    *("tracker=null", f"loader.workers={CPUS}"),
)
WAYS = {"a loader each": "train.share_loader=false", "one loader": "train.share_loader=true"}


def make(folder: Path, images: int) -> None:
    """Write the version `folder/v1` of a datastore."""
    folder = folder / "v1"
    folder.mkdir(parents=True)
    pool, shards, splits = make_images(64), [], {}
    for shard, (name, count) in enumerate((("train", images), ("val", 64))):
        entries = np.zeros(count, ENTRY)
        with (folder / f"{name}.tar").open("wb") as tar:
            for number in range(count):
                data = pool[number % len(pool)]
                tar.write(member_header(f"{name}_{number}.JPEG", len(data)))
                entries[number] = (tar.tell(), len(data), number % 10, shard)
                tar.write(data + bytes(-len(data) % 512))
            tar.write(END)
        write_index(folder / f"{name}.npy", entries)
        paths = [folder / f"{name}{suffix}" for suffix in (".tar", ".npy")]
        files = [File(path.name, path.stat().st_size, "md5:") for path in paths]
        shards.append(files[0])
        splits[name] = Split(files[1], count)
    classes = tuple(ClassNames(f"n{number:08d}", (str(number),)) for number in range(10))
    Manifest("bench", "0", "", classes, tuple(shards), splits).save(folder)


def train(folder: Path, way: str, epochs: int) -> tuple[float, float]:
    """Train all networks, and return the wall-clock and CPU seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as workspace:
        command = [
            sys.executable,
            "-m",
            "hpc_imagenet",
            "-m",
            *SETTINGS,
            WAYS[way],
            f"recipe.epochs={epochs}",
        ]
        command += [f"workspace={workspace}", f"datastore.url={folder / 'stores'}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        before, began = _cpu_seconds(), time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        seconds, cpu = time.perf_counter() - began, _cpu_seconds() - before
        outcomes = list(Path(workspace).glob("runs/*/attempts/1/outcome.json"))
        results = [json.loads(path.read_text())["state"] for path in outcomes]
        if done.returncode or results != ["finished"] * MODELS:
            raise SystemExit(f"{done.stdout}\n{done.stderr}")
        logs = "".join(path.read_text() for path in Path(workspace).glob("runs/*/attempts/1/*_log.out"))
        if way == "one loader" and len(re.findall("own loader|shares its loader", logs)) != MODELS:
            raise SystemExit(f"not all batches were shared:\n{logs}")
    return seconds, cpu


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print images x models/s and CPU ms of both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    count = MODELS * options.images * (options.epochs - 1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder / "stores" / "bench", options.images)
        (folder / "bench_nets.py").write_text(NETWORKS)
        for _ in range(options.repeats):
            for way in WAYS:
                short, long = train(folder, way, 1), train(folder, way, options.epochs)
                found[way].append((count / (long[0] - short[0]), 1e3 * (long[1] - short[1]) / count))
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {CPUS} CPU cores, load {load:.1f} at the end")
    print(f"{MODELS} networks, {options.images} images of 500 x 375 px, medians of {options.repeats}\n")
    print(f"{'':16}{'images x models/s':>18}{'CPU ms':>9}{'at most/s':>11}")
    medians = {way: [statistics.median(column) for column in zip(*found[way], strict=True)] for way in WAYS}
    for way, (rate, cpu) in medians.items():
        print(f"{way:16}{_shown(rate, ',.0f'):>18}{cpu:>9.3f}{1e3 * CPUS / cpu:>11,.0f}")
    (rate, cpu), (shared_rate, shared_cpu) = medians.values()
    ratio = shared_rate / rate if min(rate, shared_rate) > 0 else 0.0
    print(f"{'ratio':16}{_shown(ratio, '.2f'):>18}{'':9}{cpu / shared_cpu:>11.2f}")


def _shown(value: float, form: str) -> str:
    return format(value, form) if value > 0 else "-"


if __name__ == "__main__":
    main()
