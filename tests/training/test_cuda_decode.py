"""Compare nvJPEG with libjpeg; without a GPU, the CPU rehearses the checks.

    python -m pytest -s tests/training/test_cuda_decode.py

`-s` shows the figures. benchmarks/gpu.py runs these checks as item A2.
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from gpu_report import report
from loader_data import make_images, write_store
from PIL import Image
from torch import Tensor

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.training.loading import device_prefetch
from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import CropBox, RandomResizedCrop
from hpc_imagenet.training.loading.decode import EncodedImage
from hpc_imagenet.training.loading.device_prefetch import PendingImage
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler

SIDE = 64  # px of the square that is compared
KINDS = 8  # images of each kind


def photo(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Return a smooth image in strong colours with a little noise."""
    bits = np.random.default_rng(number)
    coarse = Image.fromarray(bits.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float)
    return Image.fromarray((smooth + bits.normal(0, 3, (*smooth.shape[:2], 1))).clip(0, 255).astype(np.uint8))


def by_pillow(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    quality = {"quality": 95} if file_format == "JPEG" else {}
    image.save(buffer, file_format, **quality, **options)
    return buffer.getvalue()


def by_turbo(subsampling: str) -> Callable[[Image.Image], bytes]:
    return lambda image: simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=95, colorspace="RGB", colorsubsampling=subsampling
    )


def with_adobe_marker(image: Image.Image) -> bytes:
    """Return a YCbCr JPEG with Adobe's marker and without the JFIF header."""
    data = by_pillow(image, subsampling="4:2:0")
    assert data[2:4] == b"\xff\xe0"
    rest = 4 + int.from_bytes(data[4:6], "big")
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\1" + data[rest:]


def with_odd_factors(image: Image.Image) -> bytes:
    """Return a JPEG with a quarter of the chroma rows, made from the blocks of a 4:2:0 JPEG."""
    data = bytearray(by_turbo("420")(image.resize((256, 128))))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x22
    data[frame + 11] = 0x14  # the same number of blocks per MCU: 1 x 4 instead of 2 x 2
    data[frame + 5 : frame + 9] = (256).to_bytes(2, "big") + (128).to_bytes(2, "big")
    return bytes(data)


ENCODERS: dict[
    str, tuple[Callable[[Image.Image], bytes], bool]
] = {  # encoder; whether the image is left to the GPU
    "4:4:4": (by_turbo("444"), True),
    "4:2:2": (by_turbo("422"), True),
    "4:2:0": (by_turbo("420"), True),
    "4:4:0": (by_turbo("440"), True),
    "4:1:1": (by_turbo("411"), True),
    "grey": (lambda image: by_pillow(image.convert("L")), True),
    "progressive": (functools.partial(by_pillow, progressive=True), True),
    "restart markers": (functools.partial(by_pillow, restart_marker_blocks=1), True),
    "RGB-coded": (functools.partial(by_pillow, keep_rgb=True), False),
    "Adobe YCC": (with_adobe_marker, True),
    "odd size": (lambda image: by_pillow(image.crop((0, 0, 93, 77)), subsampling="4:2:0"), True),
    "odd factors": (with_odd_factors, True),
    "CMYK": (lambda image: by_pillow(image.convert("CMYK")), False),
    "PNG": (lambda image: by_pillow(image, "PNG"), False),
}

MAY_BE_REFUSED = ("4:4:0", "4:1:1", "progressive", "odd factors")  # rare; CPUs decode them if refused


def compare(
    images: list[EncodedImage], pending: list[PendingImage], device: torch.device
) -> tuple[list[PendingImage], float, float]:
    """Decode on the device; return the refused images, and the mean and largest difference from libjpeg."""
    pixels = torch.zeros(len(images), 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    refused = device_prefetch.decode_on_gpu(pending, pixels)
    decoded = [image for image in pending if image not in refused]
    if not decoded:
        return refused, 0.0, 0.0
    expected = np.stack([images[image.position].pixels(image.crop.source).copy() for image in decoded])
    found = pixels[[image.position for image in decoded]].permute(0, 2, 3, 1).cpu().numpy()
    off = np.abs(found.astype(int) - expected)
    return refused, float(off.mean()), float(off.max())


@pytest.mark.slow
def test_nvjpeg_is_available(device: torch.device) -> None:
    """Without nvJPEG, CPUs would decode everything, and the other tests would pass."""
    line = device_prefetch.check_gpu_decode(device, max(1, len(os.sched_getaffinity(0)) - 1))
    ok = line.startswith("nvJPEG" if device.type == "cuda" else "libjpeg")
    report(line, ok=ok)
    assert ok, line


@pytest.mark.parametrize("kind", ENCODERS)
def test_nvjpeg_matches_libjpeg_or_leaves_the_image_to_cpus(device: torch.device, kind: str) -> None:
    encode, on_device = ENCODERS[kind]
    images = [EncodedImage(encode(photo(number))) for number in range(KINDS)]
    assert [image.plain for image in images] == [on_device] * KINDS
    right, lower = images[0].width, images[0].height  # the last blocks may be partial
    crop = CropBox((right - SIDE, lower - SIDE, right, lower), SIDE, SIDE)  # no resize
    pending = [PendingImage(position, image._data, crop) for position, image in enumerate(images)]
    if not on_device:
        report(f"nvJPEG, {kind}: left to CPUs", ok=True)
        if kind == "RGB-coded":  # report whether that is needed; other kinds do not have three components
            refused, mean, _ = compare(images, pending, device)
            report(
                f"nvJPEG, {kind}: {device} refuses {len(refused)}, off by {mean:.1f} grey levels on average"
            )
        return
    refused, mean, worst = compare(images, pending, device)
    ok = mean < 3 and (not refused or kind in MAY_BE_REFUSED)
    line = f"nvJPEG, {kind}: {len(refused)} of {KINDS} refused by {device}, the others differ by"
    line = f"{line} {mean:.2f} grey levels on average, at most {worst:.0f}"
    report(line, ok=ok, mean=mean, worst=worst, refused=len(refused))
    assert ok, line


def sums(batches: Any, device: torch.device, busy: int, wait: bool) -> tuple[Tensor, list[int]]:
    """Sum the pixels of each image after other work on the device; return the sums and torch's memory, bytes.

    The memory does not include nvJPEG's own; that of the whole device would include other processes.

    Args:
        batches: iterator over pixels and labels.
        device: device of the batches.
        busy: side of the matrices whose products keep the device busy before each sum.
        wait: synchronize with the device after each batch.
    """
    work = torch.rand(busy, busy, device=device)
    image_sums, memory = [], []
    for pixels, _ in batches:
        for _ in range(8):
            work = (work @ work).clamp(0, 1)
        image_sums.append(pixels.sum((1, 2, 3), dtype=torch.int64))
        if device.type == "cuda":
            memory.append(torch.cuda.memory_reserved(device))
            if wait:
                torch.cuda.synchronize(device)
    return torch.stack(image_sums).cpu(), memory


@pytest.mark.slow
def test_nvjpeg_batches_are_the_same_beside_a_busy_stream(device: torch.device, tmp_path: Path) -> None:
    on_gpu = device.type == "cuda"
    count, batch, size, busy = (300, 256, 224, 4096) if on_gpu else (5, 8, 32, 64)
    write_store(tmp_path / "photos", [(data, 0) for data in make_images(96 if on_gpu else 8)])
    store = DatasetReader(tmp_path / "photos")
    split = SplitReader(store, np.resize(store.open_split("train").index, count * batch))
    workers = max(1, len(os.sched_getaffinity(0)) - 1)

    def loader() -> BatchLoader:
        batches = BatchBuilder(split, RandomResizedCrop(size, 0.25, 0.5), 0, on_gpu=True)
        return BatchLoader(batches, TrainSampler(len(split), 0, BatchShare(batch)), workers, device)

    sequential, began = loader(), time.perf_counter()  # one batch at a time
    expected, _ = sums(map(sequential._to_device, sequential._host_batches()), device, busy, wait=True)
    rate = len(split) / (time.perf_counter() - began)
    report(f"nvJPEG: {count} batches one after another, {rate:,.0f} images/s", rate=rate)
    concurrent = loader()
    found, memory = sums(concurrent, device, busy, wait=False)
    different = int((expected != found).sum())
    grown = (memory[-1] - memory[len(memory) // 4]) / 2**20 if memory else 0.0
    refused = len(sequential.batches.refused | concurrent.batches.refused)
    ok = different == 0 and grown < 256 and not refused
    line = f"nvJPEG: {count} batches beside a busy stream, {different} of {len(split)} images differ"
    line = f"{line}; {refused} refused; torch's memory grew by {grown:.0f} MiB"
    report(line, ok=ok, grown=grown, refused=refused)
    assert ok, line
