from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, jpeg
from PIL import Image

from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.images.image_header import (
    CMYK,
    CORRUPT,
    GREY,
    OTHER,
    PNG,
    PROGRESSIVE,
    ROTATED,
    ImageInfo,
)


def exif(orientation: int, byte_order: str) -> bytes:
    """Return an Exif segment's body with nothing but the orientation."""
    little = byte_order == "little"
    number = lambda value, size: value.to_bytes(size, byte_order)  # type: ignore[arg-type]  # noqa: E731
    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + bytes(2)
    return b"Exif\0\0" + (b"II*\0" if little else b"MM\0*") + number(8, 4) + number(1, 2) + entry + bytes(4)


KINDS = [
    (encoded(), 0),
    (encoded(mode="L"), GREY),
    (encoded(mode="CMYK"), CMYK),
    (encoded(progressive=True), PROGRESSIVE),
    (encoded(progressive=True, mode="L"), PROGRESSIVE | GREY),
    (encoded("PNG"), PNG),
    (encoded("PNG", mode="L"), PNG | GREY),
    (encoded("BMP"), OTHER),
    (encoded("WEBP"), OTHER),
    (encoded(exif=exif(6, "little")), ROTATED),
    (encoded(exif=exif(3, "big")), ROTATED),
    (encoded(exif=exif(1, "big")), 0),
]


@pytest.mark.parametrize(("data", "marks"), KINDS)
def test_says_what_an_image_is(data: bytes, marks: int) -> None:
    assert image_header.inspect(data) == ImageInfo(16, 12, marks)
    assert image_header.decode_error(data) == ""


@pytest.mark.parametrize(("data", "marks"), KINDS)
def test_pillow_says_the_same(data: bytes, marks: int) -> None:
    assert image_header._decoded(data) == ImageInfo(16, 12, marks)


def test_the_first_bytes_are_enough_of_an_ordinary_jpeg() -> None:
    data = jpeg(random.Random(1), 1500)
    assert image_header.peek(data[: image_header.HEAD], data[-2:]) == image_header.inspect(data)


def test_a_long_header_takes_a_closer_look() -> None:
    data = jpeg(random.Random(1), 200_000)
    assert image_header.peek(data[: image_header.HEAD], data[-2:]) is None
    with Image.open(io.BytesIO(data)) as image:
        assert image_header.inspect(data) == ImageInfo(*image.size, 0)


def test_bytes_behind_the_end_are_no_flaw() -> None:
    whole = jpeg(random.Random(1))
    for more in (b"\0", b"\r\n" * 100, b"\0" * 9000):
        assert not image_header.inspect(whole + more).flags & CORRUPT


def test_an_end_without_its_mark_is_decided_by_decoding() -> None:
    whole = encoded(size=(64, 64))
    assert image_header.inspect(whole[:-2]).flags & CORRUPT == (
        CORRUPT if image_header.decode_error(whole[:-2]) else 0
    )
    assert image_header.inspect(whole[: len(whole) // 2]) == ImageInfo(0, 0, CORRUPT)
    assert image_header.decode_error(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"<html>"]
)
def test_what_is_no_image_is_corrupt(data: bytes) -> None:
    assert image_header.inspect(data) == ImageInfo(0, 0, CORRUPT)
    assert image_header.decode_error(data)


@given(st.binary(max_size=300), st.sampled_from([data for data, _ in KINDS]), st.integers(0, 700))
def test_no_bytes_break_it(noise: bytes, data: bytes, at: int) -> None:
    harmed = data[:at] + noise + data[at + len(noise) :]
    look = image_header.inspect(harmed)
    assert 0 <= look.width <= 65535
    assert isinstance(image_header.decode_error(harmed), str)
    if not look.flags & CORRUPT:
        assert look.width > 0
