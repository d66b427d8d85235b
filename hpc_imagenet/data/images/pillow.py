"""Pillow: open an image in any format that it reads, and convert it to RGB as training sees it.

Of an animation this is the first frame.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image

from hpc_imagenet.data.images.image_header import ORIENTATION

# What Pillow raises for damaged or unsupported files; AVIF's decoder raises RuntimeError.
ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_COMMON = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
_SIXTEEN_BITS = frozenset({"PNG", "PPM"})  # formats whose mode I has 16 bits


@contextlib.contextmanager
def open_image(file: IO[bytes]) -> Iterator[Image.Image]:
    """Open an image without decoding it.

    Raises:
        ERRORS: not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about damaged Exif, which decoding does not need
        with Image.open(file) as image:
            yield image


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image; 1 also if its Exif is damaged."""
    if image.format == "AVIF":
        image.info.pop("xmp", None)  # Pillow would fall back to it, though AVIF is turned by irot and imir
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (*ERRORS, TypeError):  # TypeError: not a number
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB with 8 bits per channel.

    Of 16 bits the upper 8 are taken; Pillow's own conversion would clip nearly all of them to white.

    Raises:
        ValueError: 32 bits per channel, whose range is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel, whose range is unknown: convert it to 8 or 16 bits")
    return image.convert("RGB")


def load(image: Image.Image) -> None:
    """Decode an opened image, and convert it where the conversion to RGB may fail.

    Raises:
        ERRORS: training could not read it.
    """
    image.load()
    if image.mode not in _COMMON:
        to_rgb(image)


def reason(error: BaseException) -> str:
    """Return Pillow's message without the representation of a buffer."""
    return str(error).split(" <_io")[0] or type(error).__name__
