"""Measure the time to find the labels of many images, compared with torchvision's ImageFolder.

    python benchmarks/layouts.py [--images 100000] [--classes 1000] [--repeats 3]

Each image is a file of one byte: no way opens it. Ways alternate, each in its own process, so
that a busy moment of the machine affects all of them. Seconds of CPU and peak memory are the process's own,
without those of the imports; wall time follows the file system and the load. ImageFolder finds the training
images only and reads no sizes or dates; ours finds all, with both.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("class folders", "class folders, ImageFolder", "a CSV with a column of labels")
LIMIT = 300  # s for one measurement


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.folder)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory(prefix="layouts-") as temporary:
        folders, table = Path(temporary, "folders"), Path(temporary, "table")
        write_class_folders(folders, options.images, options.classes)
        write_table(table, options.images, options.classes)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way in WAYS:
                folder = table if way == WAYS[2] else folders
                command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=LIMIT)
                found[way].append(json.loads(done.stdout))
    print(f"{options.images:,} images of {options.classes:,} classes, medians of {options.repeats}\n")
    print(f"{'':30}  {'CPU s':>6}  {'wall s':>6}  {'MB':>5}")
    for way, results in found.items():
        cpu, wall, memory = (statistics.median(row[key] for row in results) for key in ("cpu", "wall", "mb"))
        print(f"{way:30}  {cpu:6.2f}  {wall:6.2f}  {memory:5.0f}")


def write_class_folders(root: Path, images: int, classes: int) -> None:
    """Write train/CLASS/N.jpg and val/CLASS/N.jpg: one image in ten is for validation."""
    for image in range(images):
        split = "val" if image // classes % 10 == 9 else "train"
        write_image(root / split / f"class{image % classes:05}" / f"{image:07}.jpg")


def write_table(root: Path, images: int, classes: int) -> None:
    """Write images/N.jpg and train.csv with their classes."""
    for image in range(images):
        write_image(root / "images" / f"{image:07}.jpg")
    with (root / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "label"))
        rows.writerows((f"{image:07}.jpg", f"class{image % classes:05}") for image in range(images))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff")


def measure(way: str, folder: Path) -> dict[str, float]:
    """Return seconds of CPU, seconds, and MB of memory beyond the imports."""
    from torchvision.datasets import ImageFolder

    from hpc_imagenet.config.dataset import Dataset
    from hpc_imagenet.data.layouts.image_finder import find_images

    dataset = Dataset(name="layouts", source=str(folder), format="images", val_fraction=None)
    if way == WAYS[2]:
        dataset.val_fraction = 0.1
    memory, cpu, wall = peak(), time.process_time(), time.perf_counter()
    ImageFolder(str(folder / "train")) if way == WAYS[1] else find_images(folder, dataset, threads=2)
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "mb": (peak() - memory) / 1e6,
    }


def peak() -> int:
    """Return the process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
