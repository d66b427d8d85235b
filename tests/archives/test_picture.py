from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, jpeg
from PIL import Image

from hpc_imagenet.archives import picture
from hpc_imagenet.archives.picture import CMYK, CORRUPT, GREY, OTHER, PNG, PROGRESSIVE, TURNED, Look


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
    (encoded(exif=exif(6, "little")), TURNED),
    (encoded(exif=exif(3, "big")), TURNED),
    (encoded(exif=exif(1, "big")), 0),
]


@pytest.mark.parametrize(("data", "marks"), KINDS)
def test_says_what_an_image_is(data: bytes, marks: int) -> None:
    assert picture.examine(data) == Look(16, 12, marks)
    assert picture.flaw(data) == ""


@pytest.mark.parametrize(("data", "marks"), KINDS)
def test_pillow_says_the_same(data: bytes, marks: int) -> None:
    assert picture._decoded(data) == Look(16, 12, marks)


def test_the_first_bytes_are_enough_of_an_ordinary_jpeg() -> None:
    data = jpeg(random.Random(1), 2500)
    assert picture.glance(data[:3072], data[-2:]) == picture.examine(data)


def test_a_long_header_takes_a_closer_look() -> None:
    data = jpeg(random.Random(1), 200_000)
    assert picture.glance(data[:3072], data[-2:]) is None
    with Image.open(io.BytesIO(data)) as image:
        assert picture.examine(data) == Look(*image.size, 0)


def test_bytes_behind_the_end_are_no_flaw() -> None:
    whole = jpeg(random.Random(1))
    for more in (b"\0", b"\r\n" * 100, b"\0" * 9000):
        assert not picture.examine(whole + more).marks & CORRUPT


def test_an_end_without_its_mark_is_decided_by_decoding() -> None:
    whole = encoded(size=(64, 64))
    assert picture.examine(whole[:-2]).marks & CORRUPT == (CORRUPT if picture.flaw(whole[:-2]) else 0)
    assert picture.examine(whole[: len(whole) // 2]) == Look(0, 0, CORRUPT)
    assert picture.flaw(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"<html>"]
)
def test_what_is_no_image_is_corrupt(data: bytes) -> None:
    assert picture.examine(data) == Look(0, 0, CORRUPT)
    assert picture.flaw(data)


@given(st.binary(max_size=300), st.sampled_from([data for data, _ in KINDS]), st.integers(0, 700))
def test_no_bytes_break_it(noise: bytes, data: bytes, at: int) -> None:
    harmed = data[:at] + noise + data[at + len(noise) :]
    look = picture.examine(harmed)
    assert 0 <= look.width <= 65535
    assert isinstance(picture.flaw(harmed), str)
    if not look.marks & CORRUPT:
        assert look.width > 0
