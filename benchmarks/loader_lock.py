"""Measure how long an image holds Python's lock in the loader, and model any number of threads from it.

    python benchmarks/loader_lock.py [--images 64] [--repeats 15]

Lock: microseconds of CPU time of an image without reading, decoding and resizing, which release the lock; the
rest is counted as held, though some of it is not. Work: microseconds with them. Both are the least of all
repeats, in one thread. The threads are modelled as a closed queueing network: each image waits for the lock
and holds it, then works beside the others (mean value analysis, Reiser and Lavenberg 1980), with a CPU for
each thread and no limit of the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_data import KINDS, as_processed, make_images, write_store

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.training.loading import crop, decode
from hpc_imagenet.training.loading.batch_loader import BatchBuilder
from hpc_imagenet.training.loading.crop import RandomResizedCrop

SIZE, SCALE = 224, 0.08  # px, smallest share of the area
THREADS = (1, 2, 4, 8, 16, 32)


def seconds(split: SplitReader, repeats: int) -> float:
    """Return the CPU seconds of an image in `BatchBuilder.fill`, without the bytes of its file."""
    images = [split.read(image) for image in range(len(split))]
    builder = BatchBuilder(split, RandomResizedCrop(SIZE, SCALE, 0.5), 0)
    keys = [(0, image) for image in range(len(split))]
    batch, best = builder.allocate(keys), float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        builder.fill(batch, keys, range(len(keys)), images.__getitem__)
        best = min(best, (time.thread_time() - begin) / len(keys))
    return best


def without_decoding(split: SplitReader, repeats: int) -> float:
    """Return the same with nothing decoded and only 4 px resized."""
    tiny, resizes = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), dict(crop._RESIZE)
    target = torch.empty(1, 3, 4, 4, dtype=torch.uint8)
    whole = np.zeros((512, 512, 3), np.uint8)

    def resize(pixels: Any, size: Any, *rest: Any, out: Any) -> None:
        resizes["bilinear"](tiny, (4, 4), *rest, out=target)
        if not out.numel():
            out.resize_(1, 3, *size, memory_format=torch.channels_last)

    real = decode._decode_jpeg
    try:
        crop._RESIZE["bilinear"] = resize  # type: ignore[assignment]
        decode._decode_jpeg = lambda data, width, height, strict=True: whole[:height, :width]
        return seconds(split, repeats)
    finally:
        crop._RESIZE.update(resizes)
        decode._decode_jpeg = real


def rates(lock: float, work: float, threads: int) -> list[float]:
    """Return the images/s of 1 to `threads` threads, by mean value analysis.

    Args:
        lock: s that an image holds the lock.
        work: s of an image in all.
        threads: largest number of threads.
    """
    queue, found = 0.0, []
    for count in range(1, threads + 1):
        waiting = lock * (1 + queue)
        found.append(count / (waiting + work - lock))
        queue = found[-1] * waiting
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=64, help="different images (64)")
    parser.add_argument("--repeats", type=int, default=15, help="times each (15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = make_images(options.images)
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
    columns = "".join(f"{count:>8}" for count in THREADS)
    print(f"{'':16}{'lock us':>8}{'work us':>8}   images/s, then times those of one thread, with threads:")
    print(f"{'':35}{columns}")
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            images, _ = as_processed(pool, kind)
            write_store(Path(name) / kind, [(data, 0) for data in images])
            split = DatasetReader(Path(name) / kind).open_split("train")
            lock, work = without_decoding(split, options.repeats), seconds(split, options.repeats)
            found = rates(lock, work, max(THREADS))
            print(f"{kind:16}{lock * 1e6:8.0f}{work * 1e6:8.0f}   ", end="")
            print("".join(f"{found[count - 1]:8,.0f}" for count in THREADS))
            print(f"{'':35}" + "".join(f"{found[count - 1] / found[0]:8.2f}" for count in THREADS))


if __name__ == "__main__":
    main()
