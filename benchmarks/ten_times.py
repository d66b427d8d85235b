"""Measure at ten times ImageNet what grows with images and classes: 14,197,122 images of 21,841 classes.

    python benchmarks/ten_times.py [--images 14197122] [--classes 21841] [--scan 2600000] [--folder DIR]

The index of a split is made of random entries, so that no image is needed. Each item runs in a process of its
own; its memory is the peak beyond what Python and the imports take. The scan of archives runs on hollow ones
(headers and ends of images in a sparse file) at a part of the count, twice, since they need 6 kB per image:
the difference shows what an image costs. Temporary files are deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from process import watched
from process_ways import OURS
from shaped import link_archives, make_hollow

from hpc_imagenet.datastore.index import ENTRY, write_index

REPEATS = 3
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=14_197_122)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--scan", type=int, default=2_600_000, help="images of the larger hollow archives")
    parser.add_argument("--folder", type=Path, help="where temporary files are written (20 GB)")
    parser.add_argument("--item", help=argparse.SUPPRESS)  # measure one, in this process
    options = parser.parse_args()
    if options.item:
        print(json.dumps(measure(ITEMS[options.item], options)))
        return
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, load {os.getloadavg()[0]:.1f}")
    print(f"{options.images:,} images, {options.classes:,} classes; medians of {REPEATS}\n")
    print(f"{'':44} {'s':>8} {'MB':>8}  bytes")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        prepare(options)
        for name in ITEMS:
            print_row(name, options)
        for images in (options.scan // 2, options.scan):
            source = options.folder / "hollow"
            make_hollow(source, images - 50_000, 50_000, 1000)
            print_scan(images, options)
            shutil.rmtree(source)


def prepare(options: argparse.Namespace) -> None:
    """Write the index of a train split of this size."""
    bits, entries = np.random.default_rng(0), np.empty(options.images, ENTRY)
    entries["length"] = bits.integers(60_000, 160_000, options.images)
    entries["offset"] = np.cumsum(entries["length"], dtype=np.uint64)
    entries["label"] = np.sort(bits.integers(0, options.classes, options.images))
    entries["shard"] = 0
    write_index(options.folder / "train.npy", entries)


def print_row(name: str, options: argparse.Namespace) -> None:
    """Measure an item in processes of their own, and print its median."""
    words = ["--item", name, "--images", str(options.images), "--classes", str(options.classes)]
    command = [sys.executable, __file__, *words, "--folder", str(options.folder)]
    results = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout)
        for _ in range(REPEATS)
    ]
    seconds, memory = (statistics.median(each[key] for each in results) for key in ("s", "mb"))
    print(f"{name:44} {seconds:8.2f} {memory:8.0f}  {results[0]['bytes'] or ''}", flush=True)


def print_scan(images: int, options: argparse.Namespace) -> None:
    """Run the process stage with layout=index on hollow archives; print its time and its peak memory.

    The last column is the peak without pages of files, which the kernel discards when memory is short.
    """
    results, private = [], [0]

    def record(process: psutil.Process) -> None:
        private[-1] = max(private[-1], private_bytes(process.pid))

    for _ in range(REPEATS):
        workspace = options.folder / "workspace"
        link_archives(options.folder / "hollow", workspace, hashed=False)
        (seconds, _), peak_bytes = watched(
            [sys.executable, "-c", OURS, str(workspace), "", "1", "process.workers=1"], record
        )
        private.append(0)
        results.append((seconds, peak_bytes))
        shutil.rmtree(workspace)
    seconds, peak_bytes = (statistics.median(values) for values in zip(*results, strict=True))
    name = f"process, {images:,} images (whole process)"
    own = f"{statistics.median(private[:-1]) / 1e6:.0f} MB without pages of files"
    print(f"{name:44} {seconds:8.2f} {peak_bytes / 1e6:8.0f}  {own}", flush=True)


def measure(item: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, peak memory beyond the imports in MB, and what the item counts in bytes."""
    item(argparse.Namespace(**vars(options) | {"images": 1000, "classes": 10, "warm": True}))  # imports
    reset_peak()
    before, begin = peak(), time.perf_counter()
    count = item(options)
    return {"s": time.perf_counter() - begin, "mb": (peak() - before) / 1e6, "bytes": count}


def reset_peak() -> None:
    """Set this process's peak of resident memory to what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the peak of resident memory in bytes."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) << 10


def open_index(options: argparse.Namespace) -> int:
    """Open the index and read 1,000 entries at random."""
    from hpc_imagenet.datastore.index import open_index

    entries = open_index(options.folder / "train.npy")
    for row in np.random.default_rng(0).integers(0, options.images, 1000).tolist():
        entries[row].tolist()
    return (options.folder / "train.npy").stat().st_size


def start_epoch(options: argparse.Namespace) -> int:
    """Take the first batch of an epoch from the sampler of one of eight ranks."""
    from hpc_imagenet.training.loading.image_order import permutation
    from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler

    share = BatchShare(min(1024, options.images), rank=3, size=8)
    next(iter(TrainSampler(options.images, SEED, share, epoch=2)))
    return permutation(1000, SEED, 2).nbytes * options.images // 1000


def hash_index(options: argparse.Namespace) -> int:
    """Hash the index, as verify does."""
    from hpc_imagenet.datastore.file_hash import new_digest

    digest = new_digest()
    with (options.folder / "train.npy").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return (options.folder / "train.npy").stat().st_size


def write_manifest(options: argparse.Namespace) -> int:
    """Write and read the manifest of a dataset with one shard per 10,000 images."""
    from hpc_imagenet.datastore.manifest import FILE, ClassNames, File, Manifest, Split, load_manifest

    classes = tuple(ClassNames(f"n{i:08d}", (f"word {i}", f"other {i}")) for i in range(options.classes))
    count = max(1, options.images // 10_000)
    shards = tuple(File(f"{i:05d}.tar", 10**9, "blake3:" + "0" * 64) for i in range(count))
    split = Split(File("train.npy", 16 * options.images, "blake3:" + "0" * 64), options.images)
    folder = options.folder / "manifest"
    folder.mkdir(exist_ok=True)
    Manifest("x", "0" * 12, "2020-01-01", classes, shards, {"train": split}, (), {}).save(folder)
    load_manifest(folder)
    return (folder / FILE).stat().st_size


def count_validation(options: argparse.Namespace) -> int:
    """Count a validation batch of 64 logits per class, and write the file of all classes."""
    import torch

    from hpc_imagenet.datastore.manifest import ClassNames
    from hpc_imagenet.training.confusion import ConfusionCounts
    from hpc_imagenet.training.metrics import ClassificationMetrics, write_class_accuracies

    classes = [ClassNames(f"n{i:08d}", (f"word {i}",)) for i in range(options.classes)]
    logits, labels = torch.randn(64, options.classes), torch.arange(64) % options.classes
    best = logits.topk(5).indices
    accuracy, confusion = ClassificationMetrics(options.classes), ConfusionCounts(options.classes)
    accuracy.update(best, labels, torch.ones(64))
    confusion.update(best[:, 0], labels)
    path = options.folder / "val_classes.csv"
    write_class_accuracies(path, classes, accuracy.compute()["counts"])
    return path.stat().st_size


def list_images(options: argparse.Namespace) -> int:
    """List the images class by class as a scan does, write the index, make the certificate.

    Returns:
        resident bytes without pages of files, at the most.
    """
    from hpc_imagenet.data.ilsvrc.scan import _Columns
    from hpc_imagenet.data.images.image_header import FACTS
    from hpc_imagenet.data.prepare.certificate import build_certificate
    from hpc_imagenet.data.tar.tar_scan import ImageEntries
    from hpc_imagenet.datastore.manifest import ClassNames

    columns, offset, private, ended = _Columns(), 0, [0], threading.Event()

    def record() -> None:
        while not ended.wait(0.002):
            private.append(max(private.pop(), private_bytes(os.getpid())))

    recorder = threading.Thread(target=record)
    recorder.start()
    for number in range(options.classes):
        count = options.images * (number + 1) // options.classes - options.images * number // options.classes
        names = np.array([b"n%08d_%d.JPEG" % (number, i) for i in range(count)], "S100")
        lengths = np.full(count, 110_000)
        offsets = offset + np.cumsum(lengths)
        columns.add(ImageEntries(names, offsets, lengths, np.zeros(count, FACTS)), number, 0)
        offset = int(offsets[-1])
    index = columns.index.array()
    write_index(options.folder / "listed.npy", index)
    classes = [ClassNames(f"n{i:08d}", (f"word {i}",)) for i in range(options.classes)]
    build_certificate(
        name="x",
        content="0",
        classes=classes,
        splits={"train": index},
        facts={"train": columns.facts.array()},
        names={"train": columns.names.array()},
        files=(),
        skipped=(),
        provenance={},
        tools={},
    )
    ended.set()
    recorder.join()
    return private[0]


def private_bytes(process: int) -> int:
    """Return the resident memory of a process without pages of files; 0 once it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/status").read_text().split("RssAnon:")[1].split()[0]) << 10
    return 0


ITEMS: dict[str, Callable[[argparse.Namespace], int]] = {
    "index: open, 1,000 entries": open_index,
    "index: hash": hash_index,
    "sampler: first batch of an epoch, one rank": start_epoch,
    "process: list of images, certificate (private)": list_images,
    "manifest: write and read": write_manifest,
    "validation: counts and val_classes.csv": count_validation,
}

if __name__ == "__main__":
    main()
