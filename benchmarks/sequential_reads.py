"""Count the reads of an epoch with and without recipe.shuffle_window: places, bytes of each, and order.

    python benchmarks/sequential_reads.py [--images 1281167] [--window 65536] [--gb 4] [--folder DIR]

The first table is calculated from the samplers and an index of images of ImageNet's sizes: a place is where
consecutive bytes begin that a rank reads, with gaps of up to 1 MiB; excess is what is read beyond the
images. The second one is measured on a file of `--gb` whose pages were dropped from the cache: requests
that had to wait for the disk, as RWF_NOWAIT reports it; jumps are those that did not begin where the one
before ended. Images are not decoded. The last table counts the classes of a batch and of a window, with
1,000 classes of equal size in the order of the split.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import File, Manifest, Split
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.datastore.reader.shard_reader import FolderShards
from hpc_imagenet.datastore.reader.window_reader import extents, open_prefetcher
from hpc_imagenet.training.loading.image_order import ImageOrder
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler

BATCH = 1024
WORLDS = (1, 8, 64, 1024)  # ranks
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--window", type=int, default=65_536, help="images of a window")
    parser.add_argument("--gb", type=float, default=4, help="GB of the file that is read")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    options = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, load {os.getloadavg()[0]:.1f}")
    print(f"{options.images:,} images, global batch {BATCH}, window {options.window:,}\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        split = make_split(Path(folder) / "whole", options.images, sparse=True)
        print(f"{'an epoch, each rank':24}{'images':>10}{'places':>10}{'kB each':>9}{'excess':>8}")
        for ranks in (count for count in WORLDS if BATCH % count == 0):
            for window in (None, options.window):
                print_places(split, ranks, window)
        count = int(options.gb * 1e9 / 111_000)
        split = make_split(Path(folder) / "part", count)
        window = max(BATCH, min(options.window, count // 4))
        print(f"\n{count:,} images from a cold file, window {window:,}; load {os.getloadavg()[0]:.1f}")
        print(f"{'':24}{'requests':>10}{'kB each':>9}{'jumps':>8}{'median jump, MB':>17}{'s':>8}{'MB/s':>7}")
        for each in (None, window):
            print_cold(split, each)
    print(f"\n{'classes, mean':24}{'batch of 256':>14}{'window':>10}")
    for each in (None, options.window):
        print_classes(options.images, each)


def make_split(folder: Path, images: int, sparse: bool = False) -> SplitReader:
    """Return a split of images of 60 to 160 kB behind each other in one shard."""
    folder.mkdir()
    bits, entries = np.random.default_rng(0), np.zeros(images, ENTRY)
    entries["length"] = bits.integers(60_000, 160_000, images)
    sizes = 512 + entries["length"].astype(np.int64) + -entries["length"].astype(np.int64) % 512
    entries["offset"] = 512 + np.cumsum(sizes) - sizes
    write_index(folder / "train.npy", entries)
    size = int(sizes.sum()) + 1024
    with (folder / "train.tar").open("wb") as file:
        block = bits.bytes(1 << 24)
        while not sparse and file.tell() < size:
            file.write(block[: size - file.tell()])
        file.truncate(size)
        os.fsync(file.fileno())
    files = [File(name, (folder / name).stat().st_size, "md5:") for name in ("train.tar", "train.npy")]
    Manifest("x", "0", "", (), (files[0],), {"train": Split(files[1], images)}).save(folder)
    return DatasetReader(folder).open_split("train")


def windows_of(sampler: TrainSampler) -> Iterator[list[int]]:
    """Yield the images of each window of a rank; without windows those of each batch."""
    numbers = sampler.windows() or itertools.count()
    for _, pairs in itertools.groupby(zip(sampler, numbers, strict=False), lambda pair: pair[1]):
        yield [index for keys, _ in pairs for _, index in keys]


def print_places(split: SplitReader, ranks: int, window: int | None) -> None:
    images = places = read = needed = 0
    chosen = range(0, ranks, max(1, ranks // 8))  # eight ranks represent all
    for rank in chosen:
        for used in windows_of(TrainSampler(len(split), SEED, BatchShare(BATCH, rank, ranks), window=window)):
            needed += int(split.index["length"][used].sum(dtype=np.int64)) + 1024 * len(used)
            images += len(used)
            if window is None:  # one request an image, whatever is beside it
                places, read = places + len(used), needed
                continue
            found = extents(split, used)
            places += len(found)
            read += sum(each.end - each.begin for each in found)
    name = f"{ranks} ranks, {'whole split' if window is None else 'window'}"
    each, excess = read / places / 1e3, max(0.0, read / needed - 1)
    per_rank = [round(count / len(chosen)) for count in (images, places)]
    print(f"{name:24}{per_rank[0]:10,}{per_rank[1]:10,}{each:9,.0f}{excess:8.1%}", flush=True)


class CountingShards(FolderShards):
    """Shards of a folder that record the reads which are not in the page cache."""

    def __init__(self, shards: FolderShards) -> None:
        self.__dict__.update(shards.__getstate__())
        self.waited: list[tuple[int, int]] = []  # offset and bytes

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`."""
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            try:
                got = os.preadv(descriptor, [bytearray(length)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                got = 0
            if got < length:
                self.waited.append((offset, length))
        return super().read(shard, offset, length)


def print_cold(split: SplitReader, window: int | None) -> None:
    shards = split.store.shards
    assert isinstance(shards, FolderShards)
    counted = CountingShards(shards)
    split = DatasetReader(split.store.folder, counted).open_split("train")
    counted.read(0, 0, 1)
    os.posix_fadvise(counted._descriptors[0], 0, 0, os.POSIX_FADV_DONTNEED)
    counted.waited.clear()
    sampler = TrainSampler(len(split), SEED, BatchShare(BATCH), window=window)
    begin = time.perf_counter()
    prefetcher = open_prefetcher(split, sampler.windows())
    if prefetcher is None:
        used = [len(split.read(index)[0]) for keys in sampler for _, index in keys]
    else:
        batches = prefetcher.batches((keys, [index for _, index in keys]) for keys in sampler)
        used = [len(prefetcher.read(index)[0]) for keys in batches for _, index in keys]
        prefetcher.close()
    seconds = time.perf_counter() - begin
    jumps = [abs(b - a - size) for (a, size), (b, _) in itertools.pairwise(counted.waited)]
    jumps = [jump for jump in jumps if jump > 0]
    each = statistics.mean(size for _, size in counted.waited) / 1e3
    name = "whole split" if window is None else "window"
    jump, rate = statistics.median(jumps) / 1e6, sum(used) / 1e6 / seconds
    print(f"{name:24}{len(counted.waited):10,}{each:9,.0f}{len(jumps):8,}{jump:17,.1f}", end="")
    print(f"{seconds:8.1f}{rate:7,.0f}", flush=True)


def print_classes(images: int, window: int | None, classes: int = 1000) -> None:
    order = ImageOrder(images, SEED, 256, window)
    batches = list(itertools.islice(order.batches(0), 4 * order.window_steps))
    labels = [np.unique(batch.astype(np.int64) * classes // images) for batch in batches]
    windows = [
        len(np.unique(np.concatenate(labels[begin : begin + order.window_steps])))
        for begin in range(0, len(labels), order.window_steps)
    ]
    of_batch = statistics.mean(len(each) for each in labels)
    name = "whole split" if window is None else "window"
    print(f"{name:24}{of_batch:14.0f}{statistics.mean(windows):10.0f}", flush=True)


if __name__ == "__main__":
    main()
