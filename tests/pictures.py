"""Small images of many kinds, as bytes: what archives are made of in tests."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

from PIL import Image


def encoded(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (16, 12), **options: Any) -> bytes:
    """Return an image with soft colours that differ from place to place."""
    picture = Image.linear_gradient("L").resize(size)
    bands = [
        picture,
        picture.transpose(Image.Transpose.ROTATE_180),
        picture.point(lambda v: 255 - v),
        picture,
    ]
    whole = Image.merge(mode, bands[: len(mode)]) if len(mode) > 1 else picture.convert(mode)
    buffer = io.BytesIO()
    whole.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(bits: random.Random, length: int = 0) -> bytes:
    """Return a JPEG that no other is like, with comments that make it about so long (bytes)."""
    plain = _plain(bits.randrange(8, 40), bits.randrange(8, 40))
    segments, left = b"", max(8, length - len(plain))
    while left > 0:
        text = bits.randbytes(min(left, 60_000)).replace(b"\xff", b"\0")
        segments += b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
        left -= len(text) + 4
    return plain[:2] + segments + plain[2:]


@functools.cache
def _plain(width: int, height: int) -> bytes:
    return encoded(size=(width, height), quality=50)
