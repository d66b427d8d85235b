"""Crops of an image as Pillow, torchvision, SPDL and this package make them, for loader_ways.py."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

SIZE = 224  # px

Draw = Callable[[bytes, tuple[int, int, int, int]], Any]  # a crop of an image, [SIZE, SIZE, 3]


def pillow(data: bytes, box: tuple[int, int, int, int]) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def by_torchvision(data: bytes, box: tuple[int, int, int, int]) -> Any:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional

    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    left, upper, right, lower = box
    size = [SIZE, SIZE]
    drawn = functional.resized_crop(image, upper, left, lower - upper, right - left, size, antialias=True)
    return drawn.permute(1, 2, 0).numpy()


def by_us(data: bytes, box: tuple[int, int, int, int]) -> Any:
    import torch

    from hpc_imagenet.training.loading.crop import CropBox, apply_crop
    from hpc_imagenet.training.loading.decode import EncodedImage

    out = torch.empty(1, SIZE, SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(EncodedImage(data).pixels(box)).permute(2, 0, 1)[None]
    apply_crop(pixels, CropBox(box, SIZE, SIZE), out)
    return out[0].permute(1, 2, 0).numpy()


def by_spdl(data: bytes, box: tuple[int, int, int, int]) -> Any:
    import spdl.io

    buffer = spdl.io.convert_frames(
        spdl.io.decode_packets(spdl.io.demux_image(data), spdl_filter(box, False))
    )
    return spdl.io.to_numpy(buffer)


def spdl_filter(box: tuple[int, int, int, int], flip: bool) -> str:
    """Return the filter of FFmpeg for a crop."""
    left, upper, right, lower = box
    crop = f"crop={right - left}:{lower - upper}:{left}:{upper}:exact=1"
    return f"{crop},scale={SIZE}:{SIZE}:flags=bilinear{',hflip' * flip},format=pix_fmts=rgb24"
