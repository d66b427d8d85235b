"""Measure reading on a node without copies: first batch, images/s during staging and after it.

    python benchmarks/staging.py [--gb 8] [--shard-gb 1] [--repeats 3] [--folder DIR] [--scratch DIR]

A version of synthetic images of ImageNet's size (500 x 375 px, about 105 kB) is stored in DIR and dropped
from the page cache before each start. A new process opens it with cluster.scratch, and a loader with one
thread per CPU makes batches of 64 at 224 px: first while a process of low priority copies and hashes the
shards, then from the copies. First batch: s from opening the version, and the same with the imports of
Python and torch. Read: bytes that this process and the copying one have read from the disk meanwhile, as a
multiple of those of the version (Linux counts them in /proc/PID/io): 1.0 if each byte is read once for both.
CPU: s of the copying process per GB. The last row is without scratch. Then the index of ImageNet's full
count: ms to open it, and the private dirty memory that a process needs to open it and look up images (the
page cache does not count).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from shaped import make_images

from hpc_imagenet.datastore.file_hash import format_digest, hash_bytes, new_digest
from hpc_imagenet.datastore.index import ENTRY, open_index, write_index
from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split
from hpc_imagenet.io.tar_header import END, member_header

BATCH, SIZE = 64, 224
FULL = 1_281_167  # images of ImageNet's train


def make(home: Path, size: float, shard_size: float) -> int:
    """Write `home/made/v1` of about `size` bytes; return its images."""
    folder, pool, bits = home / "made/v1", make_images(64), random.Random(0)
    (folder / "shards").mkdir(parents=True)
    shards, entries = [], []
    for number in range(max(1, round(size / shard_size))):
        path, digest, at = folder / f"shards/train-{number:03d}.tar", new_digest(), 0
        with path.open("wb") as file:
            while at < shard_size:
                image = bits.choice(pool)
                entries.append((at + 512, len(image), bits.randrange(1000), number))
                piece = member_header(f"{len(entries)}.JPEG", len(image)) + image + bytes(-len(image) % 512)
                digest.update(piece)
                file.write(piece)
                at += len(piece)
            digest.update(END)
            file.write(END)
        shards.append(File(f"shards/{path.name}", at + len(END), format_digest(digest)))
    write_index(folder / "train.npy", np.array(entries, ENTRY))
    data = (folder / "train.npy").read_bytes()
    index = File("train.npy", len(data), hash_bytes(data))
    classes = tuple(ClassNames(f"n{i:08d}", (f"class {i}",)) for i in range(1000))
    Manifest("made", "0", "", classes, tuple(shards), {"train": Split(index, len(entries))}).save(folder)
    return len(entries)


def forget(folder: Path) -> None:
    """Drop all files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(home: Path, scratch: str, seconds: float) -> None:
    """Read as a training does, and print the measurements as JSON."""
    started = time.perf_counter()
    import torch  # noqa: F401 - a part of the start

    from hpc_imagenet.config.schema import Cluster, Datastore
    from hpc_imagenet.datastore.open_dataset import open_dataset
    from hpc_imagenet.datastore.versions import open_version
    from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
    from hpc_imagenet.training.loading.crop import RandomResizedCrop
    from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler

    begin = time.perf_counter()
    measured: dict[str, float] = {}
    version = open_version(Datastore("made", str(home)))
    with open_dataset(version, Cluster(scratch=scratch or None), stages=True) as store:
        split, staged = store.open_split("train"), bool(scratch)
        loader = BatchLoader(
            BatchBuilder(split, RandomResizedCrop(SIZE, 0.08, 0.5), 0),
            TrainSampler(len(split), 0, BatchShare(BATCH)),
            len(os.sched_getaffinity(0)),
        )
        phases = [(staged, 600.0), (False, seconds)] if staged else [(False, seconds)]
        for far, most in phases:
            batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epochs without end
            images, since = 0, time.perf_counter()
            while time.perf_counter() - since < most and (not far or not store.shards.is_complete()):
                next(batches)
                measured.setdefault("first", time.perf_counter() - begin)
                measured.setdefault("start", time.perf_counter() - started)
                images += BATCH
                if far and images % (16 * BATCH) == 0:  # the loader polls only the shards that it reads
                    [staged_shard(store, shard) for shard in range(len(store.manifest.shards))]
            took = time.perf_counter() - since
            if far:
                copying = store.shards._copier._process.pid  # type: ignore[attr-defined]
                size = sum(shard.bytes for shard in store.manifest.shards)
                measured |= {"while": images / took, "took": took, "cpu": cpu_seconds(copying) / size * 1e9}
                measured["read"] = (read_bytes(os.getpid()) + read_bytes(copying)) / size
            else:
                measured["after"] = images / took
    print(json.dumps(measured))
    sys.stdout.flush()
    os._exit(0)


def read_bytes(pid: int) -> int:
    """Return the bytes that a process has caused to be read from a disk."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["read_bytes"])


def cpu_seconds(pid: int) -> float:
    import psutil

    return sum(psutil.Process(pid).cpu_times()[:2])


def staged_shard(store: object, shard: int) -> bool:
    return bool(store.shards.poll(shard))  # type: ignore[attr-defined]


def index_of_full_count(folder: Path) -> tuple[float, float]:
    """Return ms to open an index of FULL images, and MB of private memory to look up images."""
    path, bits = folder / "full.npy", np.random.default_rng(0)
    entries = np.zeros(FULL, ENTRY)
    entries["offset"], entries["length"] = np.arange(FULL) * 110_000, 105_000
    write_index(path, entries)
    order = bits.permutation(FULL)
    code = (
        "import sys, json, re\n"
        "from pathlib import Path\n"
        "from hpc_imagenet.datastore.index import open_index\n"
        "def own():\n"
        "    return sum(int(k) for k in re.findall(r'Private_Dirty: +(\\d+)', "
        "open('/proc/self/smaps_rollup').read()))\n"
        "before = own()\n"
        "index = open_index(Path(sys.argv[1]))\n"
        f"total = sum(index[i]['length'].item() for i in range(0, {FULL}, 7))\n"
        "print(own() - before)\n"
    )
    measured = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    )
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        index = open_index(path)
        index[int(order[0])]
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times), int(measured.stdout) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=8.0, help="GB of the version (8)")
    parser.add_argument("--shard-gb", type=float, default=1.0, help="GB of a shard (1)")
    parser.add_argument("--repeats", type=int, default=3, help="times each (3)")
    parser.add_argument("--folder", type=Path, help="folder of the version (default: a temporary one)")
    parser.add_argument("--scratch", type=Path, help="scratch folder (default: beside it)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), options.child[1], 10.0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        home, scratch = Path(name) / "stores", options.scratch or Path(name) / "disk"
        images = make(home, options.gb * 1e9, options.shard_gb * 1e9)
        seen: dict[str, list[dict[str, float]]] = {"with cluster.scratch": [], "without": []}
        for _ in range(options.repeats):
            for row, where in (("with cluster.scratch", str(scratch)), ("without", "")):
                shutil.rmtree(scratch, ignore_errors=True)
                forget(home)
                command = [sys.executable, __file__, "--child", str(home), where]
                measured = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seen[row].append(json.loads(measured.splitlines()[-1]))
        print(f"{platform.machine()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the end")
        print(
            f"{images:,} images, {options.gb:g} GB in shards of {options.shard_gb:g} GB; medians of ", end=""
        )
        print(f"{options.repeats}\n")
        print(f"{'':22}{'first batch s':>15}{'with imports':>14}{'staged after s':>16}", end="")
        print(f"{'images/s while':>16}{'after':>8}{'ratio':>7}{'read':>7}{'CPU s/GB':>10}")
        for row, found in seen.items():
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            print(f"{row:22}{middle['first']:15.2f}{middle['start']:14.2f}", end="")
            if "while" in middle:
                ratio = statistics.median(one["while"] / one["after"] for one in found)
                print(
                    f"{middle['took']:16.1f}{middle['while']:16.0f}{middle['after']:8.0f}{ratio:7.2f}", end=""
                )
                print(f"{middle['read']:7.2f}{middle['cpu']:10.2f}")
            else:
                print(f"{'':16}{'':16}{middle['after']:8.0f}")
        opening, memory = index_of_full_count(Path(name))
        print(f"\nindex of {FULL:,} images: opened in {opening:.1f} ms, {memory:.1f} MB of a process's own")


if __name__ == "__main__":
    main()
