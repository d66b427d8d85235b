"""Small encoded images of many formats and modes, for test archives."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

from PIL import Image


def encoded(
    file_format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (16, 12), **options: Any
) -> bytes:
    """Return an encoded image with smooth colour gradients."""
    gradient = Image.linear_gradient("L").resize(size)
    bands = [
        gradient,
        gradient.transpose(Image.Transpose.ROTATE_180),
        gradient.point(lambda v: 255 - v),
        gradient,
    ]
    image = Image.merge(mode, bands[: len(mode)]) if len(mode) > 1 else gradient.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(bits: random.Random, length: int = 0) -> bytes:
    """Return a unique JPEG; comment segments make it about `length` bytes long."""
    data = _plain_jpeg(bits.randrange(8, 40), bits.randrange(8, 40))
    segments, remaining = b"", max(8, length - len(data))
    while remaining > 0:
        text = bits.randbytes(min(remaining, 60_000)).replace(b"\xff", b"\0")
        segments += b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
        remaining -= len(text) + 4
    return data[:2] + segments + data[2:]


@functools.cache
def _plain_jpeg(width: int, height: int) -> bytes:
    return encoded(size=(width, height), quality=50)
