from __future__ import annotations

import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_images import encoded, jpeg

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


def exif(orientation: int, byte_order: str, size: int = 2) -> bytes:
    """Return the body of an Exif segment that has only an orientation, of 2 or 4 bytes."""
    little = byte_order == "little"
    number = lambda value, size: value.to_bytes(size, byte_order)  # type: ignore[arg-type]  # noqa: E731
    entry = number(0x0112, 2) + number({2: 3, 4: 4}[size], 2) + number(1, 4) + number(orientation, size)
    entry += bytes(4 - size)
    return b"Exif\0\0" + (b"II*\0" if little else b"MM\0*") + number(8, 4) + number(1, 2) + entry + bytes(4)


KINDS = [
    (encoded(), 0),
    (encoded(mode="L"), GREY),
    (encoded(mode="CMYK"), CMYK),
    (encoded(progressive=True), PROGRESSIVE),
    (encoded(progressive=True, mode="L"), PROGRESSIVE | GREY),
    (encoded("PNG"), PNG),
    (encoded("PNG", mode="L"), PNG | GREY),
    (encoded("PNG", exif=exif(6, "little")), PNG | ROTATED),
    (encoded("PNG", exif=exif(3, "big"), mode="L"), PNG | GREY | ROTATED),
    (encoded("PNG", exif=exif(1, "big")), PNG),
    (encoded("BMP"), OTHER),
    (encoded("WEBP"), OTHER),
    (encoded(exif=exif(6, "little")), ROTATED),
    (encoded(exif=exif(3, "big")), ROTATED),
    (encoded(exif=exif(1, "big")), 0),
    (encoded(exif=exif(6, "little", 4)), ROTATED),
    (encoded(exif=exif(3, "big", 4)), ROTATED),
    (encoded(exif=exif(1, "little", 4)), 0),
]


@pytest.mark.parametrize(("data", "flags"), KINDS)
def test_inspect_returns_size_and_flags(data: bytes, flags: int) -> None:
    assert image_header.inspect(data) == ImageInfo(16, 12, flags)
    assert image_header.decode_error(data) == ""


@pytest.mark.parametrize(("data", "flags"), KINDS)
def test_decode_info_agrees_with_inspect(data: bytes, flags: int) -> None:
    assert image_header._decode_info(data) == ImageInfo(16, 12, flags)


def test_an_image_with_damaged_exif_is_not_corrupt() -> None:
    data = encoded("WEBP", exif=b"Exif\0\0garbage")
    assert image_header.inspect(data) == ImageInfo(16, 12, OTHER)


def test_peek_needs_only_the_first_bytes_of_a_plain_jpeg() -> None:
    data = jpeg(random.Random(1), 1500)
    assert image_header.peek(data[: image_header.HEAD], data[-2:]) == image_header.inspect(data)


def test_long_jpeg_header_needs_the_whole_image() -> None:
    data = jpeg(random.Random(1), 200_000)
    assert image_header.peek(data[: image_header.HEAD], data[-2:]) is None
    with Image.open(io.BytesIO(data)) as image:
        assert image_header.inspect(data) == ImageInfo(*image.size, 0)


def test_bytes_after_the_end_marker_are_not_corrupt() -> None:
    image_bytes = jpeg(random.Random(1))
    for extra in (b"\0", b"\r\n" * 100, b"\0" * 9000):
        assert not image_header.inspect(image_bytes + extra).flags & CORRUPT


def test_jpeg_without_end_marker_is_decoded() -> None:
    image_bytes = encoded(size=(64, 64))
    assert image_header.inspect(image_bytes[:-2]).flags & CORRUPT == (
        CORRUPT if image_header.decode_error(image_bytes[:-2]) else 0
    )
    assert image_header.inspect(image_bytes[: len(image_bytes) // 2]) == ImageInfo(0, 0, CORRUPT)
    assert image_header.decode_error(image_bytes[: len(image_bytes) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"<html>"]
)
def test_non_images_are_corrupt(data: bytes) -> None:
    assert image_header.inspect(data) == ImageInfo(0, 0, CORRUPT)
    assert image_header.decode_error(data)


@pytest.mark.slow
@given(st.binary(max_size=300), st.sampled_from([data for data, _ in KINDS]), st.integers(0, 700))
def test_inspect_accepts_arbitrary_bytes(noise: bytes, data: bytes, offset: int) -> None:
    damaged = data[:offset] + noise + data[offset + len(noise) :]
    info = image_header.inspect(damaged)
    assert 0 <= info.width <= 65535
    assert isinstance(image_header.decode_error(damaged), str)
    if not info.flags & CORRUPT:
        assert info.width > 0


def header_of(width: int, height: int) -> bytes:
    """Return a JPEG that is whole but for its size, which is only in the header."""
    data = bytearray(encoded(size=(64, 64)))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def test_limit_of_pixels_is_that_of_pillow() -> None:
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == image_header.MAX_PIXELS


@pytest.mark.parametrize("size", [(65_500, 65_500), (13_378, 13_378), (65_535, 2_731)])
def test_header_of_too_many_pixels_is_corrupt(size: tuple[int, int]) -> None:
    data = header_of(*size)
    assert image_header.inspect(data) == ImageInfo(0, 0, CORRUPT)
    assert "exceeds limit" in image_header.decode_error(data)
    bytes_of = np.frombuffer(data, np.uint8)
    facts = image_header.peek_many(bytes_of, np.array([0]), np.array([len(data)]))
    assert facts["width"].tolist() == [0]  # left to `inspect`


def test_largest_header_that_pillow_decodes_is_not_corrupt() -> None:
    assert image_header.inspect(header_of(13_377, 13_377)) == ImageInfo(13_377, 13_377, 0)


def test_png_header_of_too_many_pixels_is_corrupt() -> None:
    data = bytearray(encoded("PNG"))
    data[16:24] = (1 << 30).to_bytes(4, "big") * 2
    assert image_header.inspect(bytes(data)) == ImageInfo(0, 0, CORRUPT)


def test_png_that_ends_inside_its_header_is_corrupt() -> None:
    data = encoded("PNG")
    assert image_header.inspect(data[:16] + data[-8:]) == ImageInfo(0, 0, CORRUPT)


def test_exif_of_a_png_is_found_behind_a_profile_and_behind_the_pixels() -> None:
    data = encoded("PNG", exif=exif(6, "big"), icc_profile=random.Random(1).randbytes(9000))
    head, tail = data[: image_header.HEAD], data[-100:]  # a scan must not read each PNG with a profile
    assert image_header.peek(head, tail) == ImageInfo(16, 12, PNG)
    assert image_header.inspect(data) == ImageInfo(16, 12, PNG | ROTATED)
    data = encoded("PNG", size=(200, 200), exif=exif(6, "big"))
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    moved = data[:begin] + data[end:-12] + data[begin:end] + data[-12:]
    info = image_header.peek(moved[: image_header.HEAD], moved[-512:])
    assert info == ImageInfo(200, 200, PNG | ROTATED)
