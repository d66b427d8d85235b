"""Loaders from images in a folder to batches, ours and those of packages, each in its own process.

    python loader_ways.py NAME FOLDER WORKERS IMAGES

loader.py runs it. The process binds itself to as many CPUs as it has workers, and prints JSON: images/s,
CPU ms per image, s to the first batch, and the difference to the same crops by Pillow in grey levels.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loader_crops import SIZE, Draw, by_spdl, by_torchvision, by_us, pillow, spdl_filter

BATCH, SCALE = 64, 0.08
CHECKED = 48  # images that are compared with Pillow


@dataclass
class Way:
    """An endless iterator of batches, and how this loader crops an image."""

    batches: Iterator[Any]
    draw: Draw | None = None  # None: no crop, or by Pillow itself


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def image_folder(folder: Path, workers: int, floats: bool) -> Way:
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    last = (
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        if floats
        else [transforms.PILToTensor()]
    )
    crop = transforms.RandomResizedCrop(SIZE, (SCALE, 1))
    change = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
    images = datasets.ImageFolder(str(folder / "folders"), change)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )
    return Way(endless(loader))


class DecodedFiles:
    """Files of class folders, decoded and cropped by torchvision."""

    def __init__(self, folder: Path) -> None:
        from torchvision.transforms import v2

        self.paths = [str(path) for path in sorted(folder.rglob("*.JPEG"))]
        self.change = v2.Compose(
            [v2.RandomResizedCrop(SIZE, (SCALE, 1), antialias=True), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return self.change(decode_jpeg(read_file(self.paths[index]), ImageReadMode.RGB))


def decode_jpeg_files(folder: Path, workers: int) -> Way:
    import torch

    torch.set_num_threads(1)
    files: Any = DecodedFiles(folder / "folders")
    loader: Any = torch.utils.data.DataLoader(
        files, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )
    return Way(endless(loader), by_torchvision)


def spdl(folder: Path, workers: int) -> Way:
    import random

    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import RandomResizedCrop

    torch.set_num_threads(1)
    paths = [str(path) for path in sorted((folder / "folders").rglob("*.JPEG"))]
    spdl.io.demux_image(paths[0])  # an error here ends it; within the pipeline it would only be logged

    def shuffled() -> Iterator[str]:
        while True:
            yield from random.sample(paths, len(paths))

    def decode(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        # Only the size is needed to draw a crop; an empty tensor of one pixel repeated has it for nothing.
        shape = torch.empty(1, 1, 1).expand(3, packets.height, packets.width)
        upper, left, high, wide = RandomResizedCrop.get_params(shape, [SCALE, 1.0], [3 / 4, 4 / 3])
        box = (left, upper, left + wide, upper + high)
        return spdl.io.decode_packets(packets, spdl_filter(box, random.random() < 0.5))

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled())
        .pipe(decode, concurrency=workers)
        .aggregate(BATCH)
        .pipe(lambda frames: spdl.io.to_torch(spdl.io.convert_frames(frames)))
        .add_sink(3)
        .build(num_threads=workers)
    )
    pipeline.start()
    return Way(iter(pipeline.get_iterator()), by_spdl)


def ours(folder: Path, workers: int, variant: str, processes: bool = False) -> Way:
    import torch

    from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
    from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
    from hpc_imagenet.training.loading.crop import RandomResizedCrop
    from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler

    torch.set_num_threads(1)
    split = DatasetReader(folder / variant).open_split("train")
    batches = BatchBuilder(split, RandomResizedCrop(SIZE, SCALE, 0.5), 0)
    sampler = TrainSampler(len(split), 0, BatchShare(BATCH))
    if not processes:
        return Way(endless(BatchLoader(batches, sampler, workers)), by_us)
    from torch.utils.data import DataLoader

    whole: Any = Whole(split)
    loader: Any = DataLoader(
        whole, sampler=sampler, batch_size=None, num_workers=workers, persistent_workers=True
    )
    return Way(endless(loader), by_us)


class Whole:
    """Our batches for PyTorch's worker processes, written directly into shared memory."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __getitem__(self, keys: Any) -> Any:
        import torch

        from hpc_imagenet.training.loading.batch_loader import BatchBuilder
        from hpc_imagenet.training.loading.crop import RandomResizedCrop

        shape = (len(keys), SIZE, SIZE, 3)
        storage = torch.UntypedStorage._new_shared(len(keys) * SIZE * SIZE * 3)
        pixels = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape).permute(0, 3, 1, 2)  # type: ignore[call-overload]
        labels = torch.zeros(len(keys), dtype=torch.int64)
        BatchBuilder(self.split, RandomResizedCrop(SIZE, SCALE, 0.5), 0).fill(
            (pixels, labels), keys, range(len(keys))
        )
        return pixels, labels


def ours_reading(folder: Path, workers: int) -> Way:
    from concurrent.futures import ThreadPoolExecutor

    from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader

    split = DatasetReader(folder / "archive").open_split("train")
    order = np.random.default_rng(0).permutation(len(split)).tolist()
    threads = ThreadPoolExecutor(workers)

    def read() -> Iterator[Any]:
        while True:
            for at in range(0, len(order) - BATCH + 1, BATCH):
                yield list(threads.map(split.read, order[at : at + BATCH]))

    return Way(read())


def litdata(folder: Path, workers: int, decode: bool) -> Way:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    change = v2.Compose([v2.RandomResizedCrop(SIZE, (SCALE, 1), antialias=True), v2.RandomHorizontalFlip()])

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return (change(sample["image"]), sample["label"]) if decode else sample

    name = "litdata" if decode else "litdata-bytes"
    data = Images(str(folder / name), shuffle=True, drop_last=True)
    collate = None if decode else list
    loader = StreamingDataLoader(
        data,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
        collate_fn=collate,
    )
    return Way(endless(loader), by_torchvision if decode else None)


def webdataset(folder: Path, workers: int, decode: bool) -> Way:
    import torch
    import webdataset as wds
    from torchvision import transforms

    torch.set_num_threads(1)
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (SCALE, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    shards = [str(path) for path in sorted((folder / "webdataset").iterdir())]
    data: Any = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(500)
    if decode:
        data = data.decode("pil").to_tuple("jpg", "cls").map_tuple(change, lambda label: label).batched(BATCH)
    else:
        data = data.to_tuple("jpg", "cls").batched(BATCH, collation_fn=list)
    loader = wds.WebLoader(data.repeat(), batch_size=None, num_workers=workers)
    return Way(iter(loader))


def dali(folder: Path, workers: int) -> Way:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, seed=0)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        data, label = fn.readers.file(file_root=str(folder / "folders"), random_shuffle=True)
        images = fn.decoders.image_random_crop(data, random_area=[SCALE, 1], output_type=types.RGB)
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    built = pipeline()
    built.build()

    def run() -> Iterator[Any]:
        while True:
            yield built.run()

    return Way(run())


def ffcv(folder: Path, workers: int, name: str) -> Way:
    import torch
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    torch.set_num_threads(1)
    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(SCALE, 1))
    pipelines = {"image": [crop, RandomHorizontalFlip(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(
        str(folder / name / "train.beton"),
        BATCH,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        pipelines=pipelines,
        drop_last=True,
    )
    return Way(endless(loader))


WAYS: dict[str, tuple[str, Callable[[Path, int], Way]]] = {
    "folder-float": ("ImageFolder + PIL, float", lambda f, w: image_folder(f, w, True)),
    "folder-bytes": ("ImageFolder + PIL, uint8", lambda f, w: image_folder(f, w, False)),
    "decode_jpeg": ("torchvision's decode_jpeg + v2, uint8", decode_jpeg_files),
    "spdl": ("SPDL, uint8", spdl),
    "webdataset": ("webdataset + PIL, uint8", lambda f, w: webdataset(f, w, True)),
    "litdata": ("litdata + its decoder, uint8", lambda f, w: litdata(f, w, True)),
    "dali": ("DALI on CPU, uint8", dali),
    "ffcv": ("FFCV, JPEG of quality 90", lambda f, w: ffcv(f, w, "ffcv")),
    "ffcv-same": ("FFCV, JPEG of the same quality", lambda f, w: ffcv(f, w, "ffcv-same")),
    "ffcv-short256": ("FFCV, short side 256, quality 90", lambda f, w: ffcv(f, w, "ffcv-short256")),
    "ours": ("ours", lambda f, w: ours(f, w, "archive")),
    "ours-processes": ("ours, worker processes", lambda f, w: ours(f, w, "archive", processes=True)),
    "ours-tiled": ("ours, tiled shards", lambda f, w: ours(f, w, "tiled")),
    "ours-short256": ("ours, short side 256", lambda f, w: ours(f, w, "short256")),
    "ours-short256-tiled": ("ours, short side 256, tiled", lambda f, w: ours(f, w, "short256-tiled")),
    "read-ours": ("reading only: ours", ours_reading),
    "read-litdata": ("reading only: litdata", lambda f, w: litdata(f, w, False)),
    "read-webdataset": ("reading only: webdataset", lambda f, w: webdataset(f, w, False)),
}


def child(name: str, folder: Path, workers: int, images: int) -> None:
    """Measure one loader once, and print the result as JSON."""
    import psutil
    import torch  # noqa: F401 - imports are not measured

    if (package := name.partition("-")[0]) in ("litdata", "webdataset", "ffcv", "spdl"):
        importlib.import_module(package)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:workers])
    begin = time.perf_counter()
    way = WAYS[name][1](folder, workers)
    next(way.batches)
    first = time.perf_counter() - begin
    for _ in range(2):  # prepared during the wait for the first one
        next(way.batches)
    spent, begin, done = cpu(), time.perf_counter(), 0
    while done < images:
        next(way.batches)
        done += BATCH
    wall = time.perf_counter() - begin
    result = {"rate": done / wall, "cpu": (cpu() - spent) / done * 1e3, "first": first}
    if way.draw:
        result |= fidelity(way.draw, folder)
    print(json.dumps(result), flush=True)
    for one in psutil.Process().children(recursive=True):  # workers of endless loaders
        one.kill()
    os._exit(0)


def cpu() -> float:
    """Seconds of this process and of its living children."""
    import psutil

    whole = psutil.Process()
    return sum(
        sum(one.cpu_times()[:2]) for one in (whole, *whole.children(recursive=True)) if one.is_running()
    )


def fidelity(draw: Draw, folder: Path) -> dict[str, float]:
    """Compare crops of the archive's images with Pillow's."""
    import torch
    from PIL import Image
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    means, worst = [], 0
    for path in sorted((folder / "folders").rglob("*.JPEG"))[:CHECKED]:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            upper, left, high, wide = RandomResizedCrop.get_params(image, [SCALE, 1.0], [3 / 4, 4 / 3])
        box = (left, upper, left + wide, upper + high)
        off = np.abs(np.asarray(draw(data, box)).astype(int) - pillow(data, box).astype(int))
        means.append(float(off.mean()))
        worst = max(worst, int(off.max()))
    return {"off": statistics.mean(means), "worst": worst}


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
