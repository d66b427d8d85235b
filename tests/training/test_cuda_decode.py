"""What nvJPEG decodes, beside libjpeg; without a GPU, the way there is rehearsed on the CPU.

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
from loader_data import pictures, write_store
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
    """Return a soft picture in strong colours with a little grain."""
    bits = np.random.default_rng(number)
    coarse = Image.fromarray(bits.integers(0, 256, (6, 8, 3), np.uint8))
    soft = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float)
    return Image.fromarray((soft + bits.normal(0, 3, (*soft.shape[:2], 1))).clip(0, 255).astype(np.uint8))


def by_pillow(picture: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 95} if form == "JPEG" else {}), **options)
    return buffer.getvalue()


def by_turbo(subsampling: str) -> Callable[[Image.Image], bytes]:
    return lambda picture: simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture), quality=95, colorspace="RGB", colorsubsampling=subsampling
    )


def with_adobe_marker(picture: Image.Image) -> bytes:
    """Return a YCbCr JPEG that says so in Adobe's way, without JFIF's header."""
    data = by_pillow(picture, subsampling="4:2:0")
    assert data[2:4] == b"\xff\xe0"
    behind = 4 + int.from_bytes(data[4:6], "big")
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\1" + data[behind:]


def with_odd_factors(picture: Image.Image) -> bytes:
    """Return a JPEG whose colours have a quarter of the rows; its blocks are those of another picture."""
    data = bytearray(by_turbo("420")(picture.resize((256, 128))))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x22
    data[frame + 11] = 0x14  # as many blocks in a unit: 1 x 4 instead of 2 x 2
    data[frame + 5 : frame + 9] = (256).to_bytes(2, "big") + (128).to_bytes(2, "big")
    return bytes(data)


ENCODERS: dict[str, tuple[Callable[[Image.Image], bytes], bool]] = {  # and whether a GPU is to decode it
    "4:4:4": (by_turbo("444"), True),
    "4:2:2": (by_turbo("422"), True),
    "4:2:0": (by_turbo("420"), True),
    "4:4:0": (by_turbo("440"), True),
    "4:1:1": (by_turbo("411"), True),
    "grey": (lambda picture: by_pillow(picture.convert("L")), True),
    "progressive": (functools.partial(by_pillow, progressive=True), True),
    "restart markers": (functools.partial(by_pillow, restart_marker_blocks=1), True),
    "RGB-coded": (functools.partial(by_pillow, keep_rgb=True), False),
    "Adobe YCC": (with_adobe_marker, True),
    "odd size": (lambda picture: by_pillow(picture.crop((0, 0, 93, 77)), subsampling="4:2:0"), True),
    "odd factors": (with_odd_factors, True),
    "CMYK": (lambda picture: by_pillow(picture.convert("CMYK")), False),
    "PNG": (lambda picture: by_pillow(picture, "PNG"), False),
}

MAY_BE_REFUSED = ("4:4:0", "4:1:1", "progressive", "odd factors")  # rare ones, which CPUs then decode


def compared(
    images: list[EncodedImage], pieces: list[PendingImage], device: torch.device
) -> tuple[list[PendingImage], float, float]:
    """Decode on the device; return what it refuses, and how far the others are from libjpeg (mean, worst)."""
    pixels = torch.zeros(len(images), 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    refused = device_prefetch.decode_on_gpu(pieces, pixels)
    taken = [piece for piece in pieces if piece not in refused]
    if not taken:
        return refused, 0.0, 0.0
    expected = np.stack([images[piece.place].pixels(piece.crop.source).copy() for piece in taken])
    found = pixels[[piece.place for piece in taken]].permute(0, 2, 3, 1).cpu().numpy()
    off = np.abs(found.astype(int) - expected)
    return refused, float(off.mean()), float(off.max())


def test_nvjpeg_decodes_at_all(device: torch.device) -> None:
    """Where it does not, everything else here would be decoded by CPUs, and be right."""
    line = device_prefetch.check_gpu_decode(device, max(1, len(os.sched_getaffinity(0)) - 1))
    ok = line.startswith("nvJPEG" if device.type == "cuda" else "libjpeg")
    report(line, ok=ok)
    assert ok, line


@pytest.mark.parametrize("kind", ENCODERS)
def test_nvjpeg_decodes_each_kind_as_libjpeg_does_or_leaves_it_to_cpus(
    device: torch.device, kind: str
) -> None:
    encode, on_device = ENCODERS[kind]
    images = [EncodedImage(encode(photo(number))) for number in range(KINDS)]
    assert [image.plain for image in images] == [on_device] * KINDS
    right, lower = images[0].width, images[0].height  # where the last blocks may be cut
    crop = CropBox((right - SIDE, lower - SIDE, right, lower), SIDE, SIDE)  # nothing is resized
    pieces = [PendingImage(place, image._data, crop) for place, image in enumerate(images)]
    if not on_device:
        report(f"nvJPEG, {kind}: left to CPUs", ok=True)
        if kind == "RGB-coded":  # whether that has to be; the others are no JPEGs of three components
            refused, mean, _ = compared(images, pieces, device)
            report(
                f"nvJPEG, {kind}: {device} refuses {len(refused)}, would be off {mean:.1f} grey levels mean"
            )
        return
    refused, mean, worst = compared(images, pieces, device)
    ok = mean < 3 and (not refused or kind in MAY_BE_REFUSED)
    line = f"nvJPEG, {kind}: {len(refused)} of {KINDS} refused by {device}, the others off {mean:.2f} grey"
    line = f"{line} levels mean, {worst:.0f} worst"
    report(line, ok=ok, mean=mean, worst=worst, refused=len(refused))
    assert ok, line


def sums(batches: Any, device: torch.device, busy: int, wait: bool) -> tuple[Tensor, list[int]]:
    """Return the sum of each image's pixels, taken behind other work of the device; torch's memory, bytes.

    nvJPEG's own memory is not in it, but that of the whole device would be other processes' as well.

    Args:
        batches: iterator over pixels and labels.
        device: of the batches.
        busy: side of the matrices that keep the device busy before each sum.
        wait: whether to wait for the device behind each batch.
    """
    work = torch.rand(busy, busy, device=device)
    made, memory = [], []
    for pixels, _ in batches:
        for _ in range(8):
            work = (work @ work).clamp(0, 1)
        made.append(pixels.sum((1, 2, 3), dtype=torch.int64))
        if device.type == "cuda":
            memory.append(torch.cuda.memory_reserved(device))
            if wait:
                torch.cuda.synchronize(device)
    return torch.stack(made).cpu(), memory


@pytest.mark.slow
def test_nvjpeg_batches_beside_a_busy_stream_are_those_of_an_idle_one(
    device: torch.device, tmp_path: Path
) -> None:
    on_gpu = device.type == "cuda"
    count, batch, size, busy = (300, 256, 224, 4096) if on_gpu else (5, 8, 32, 64)
    write_store(tmp_path / "photos", [(data, 0) for data in pictures(96 if on_gpu else 8)])
    store = DatasetReader(tmp_path / "photos")
    split = SplitReader(store, np.resize(store.open_split("train").index, count * batch))
    workers = max(1, len(os.sched_getaffinity(0)) - 1)

    def loader() -> BatchLoader:
        made = BatchBuilder(split, RandomResizedCrop(size, 0.25, 0.5), 0, on_gpu=True)
        return BatchLoader(made, TrainSampler(len(split), 0, BatchShare(batch)), workers, device)

    quiet, began = loader(), time.perf_counter()  # batch by batch, nothing at the same time
    expected, _ = sums(map(quiet._finish, quiet._prepared()), device, busy, wait=True)
    rate = len(split) / (time.perf_counter() - began)
    report(f"nvJPEG: {count} batches one after another, {rate:,.0f} images/s", rate=rate)
    beside = loader()
    found, memory = sums(beside, device, busy, wait=False)
    different = int((expected != found).sum())
    grown = (memory[-1] - memory[len(memory) // 4]) / 2**20 if memory else 0.0
    refused = len(quiet.batches.refused | beside.batches.refused)
    ok = different == 0 and grown < 256 and not refused
    line = f"nvJPEG: {count} batches beside a busy stream, {different} of {len(split)} images differ"
    line = f"{line}; {refused} refused; torch's memory grew by {grown:.0f} MiB"
    report(line, ok=ok, grown=grown, refused=refused)
    assert ok, line
