"""EXIF orientation as Pillow reads it, from headers of cameras and of programs."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from sample_images import encoded

from hpc_imagenet.data.images.image_header import ORIENTATION
from hpc_imagenet.data.images.orientation import make_upright, read_orientation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


def exif_bytes(value: int, order: bytes, *, before: int = 0, gap: int = 0, size: int = 2) -> bytes:
    """Return the contents of an Exif segment: a gap, `before` entries, the orientation of `size` bytes."""
    kind = "little" if order == b"II" else "big"

    def number(n: int, size: int) -> bytes:
        return n.to_bytes(size, kind)  # type: ignore[arg-type]

    entries = [
        number(0x0100 + i, 2) + number(3, 2) + number(1, 4) + number(7, 2) + b"\0\0" for i in range(before)
    ]
    kind_of_value = number({2: 3, 4: 4}[size], 2)  # SHORT or LONG
    entries.append(
        number(ORIENTATION, 2) + kind_of_value + number(1, 4) + number(value, size) + bytes(4 - size)
    )
    directory = number(len(entries), 2) + b"".join(entries) + number(0, 4)
    return b"Exif\0\0" + order + number(42, 2) + number(8 + gap, 4) + bytes(gap) + directory


@pytest.mark.parametrize("order", [b"II", b"MM"])
@pytest.mark.parametrize("gap", [0, 300, 20_000])
def test_orientation_is_found_anywhere_in_the_header(path: Path, order: bytes, gap: int) -> None:
    for value in range(1, 9):
        for before in (0, 9):
            path.write_bytes(encoded(exif=exif_bytes(value, order, before=before, gap=gap)))
            assert read_orientation(path) == value
        path.write_bytes(encoded(exif=exif_bytes(value, order, gap=gap, size=4)))
        assert read_orientation(path) == value


def test_exif_of_a_png_is_found_behind_a_profile_and_behind_the_pixels(path: Path) -> None:
    for options in ({}, {"icc_profile": b"x" * 9000}):
        data = encoded("PNG", exif=exif_bytes(6, b"MM"), **options)
        path.write_bytes(data)
        assert read_orientation(path) == 6
        begin = data.index(b"eXIf") - 4
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        path.write_bytes(data[:begin] + data[end:-12] + data[begin:end] + data[-12:])
        assert read_orientation(path) == 6
        path.write_bytes(data[:begin] + data[end:])
        assert read_orientation(path) == 1


def test_the_pixels_of_a_png_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = 1000 * (b"\x00\x00\x20\x00IDAT" + bytes((1 << 13) + 4))
    data = encoded("PNG", exif=exif_bytes(6, b"MM"))
    read, pread = [], os.pread

    def recorded(descriptor: int, size: int, at: int) -> bytes:
        read.append(pread(descriptor, size, at))
        return read[-1]

    monkeypatch.setattr(os, "pread", recorded)
    path.write_bytes(data[: data.index(b"eXIf") - 4] + pixels + data[-12:])
    assert read_orientation(path) == 1
    assert len(read) < 10
    assert sum(map(len, read)) < 100_000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_images_without_orientation_are_upright(path: Path, kind: str) -> None:
    path.write_bytes(encoded(kind))
    assert read_orientation(path) == 1
    path.write_bytes(encoded(kind)[:9])
    assert read_orientation(path) == 1
    assert read_orientation(path.with_name("absent")) == 1


@pytest.mark.slow
@given(noise=st.binary(max_size=120), value=st.integers(0, 65_535))
@settings(max_examples=60, deadline=None)
def test_damaged_exif_is_no_error(noise: bytes, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    for exif in (b"Exif\0\0" + noise, exif_bytes(value, b"II")[:-7] + noise):
        path.write_bytes(encoded(exif=exif))
        assert read_orientation(path) in range(1, 9)


@pytest.mark.skipif(not shutil.which("jpegtran"), reason="no jpegtran (libjpeg-turbo-progs)")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_turned_without_loss_and_the_same_way_each_time(mode: str) -> None:
    for value in range(2, 9):
        data = encoded(mode=mode, size=(64, 32), exif=exif_bytes(value, b"MM"))
        turned, lossless = make_upright(data, value)
        assert lossless
        assert make_upright(data, value) == (turned, True)
        with Image.open(io.BytesIO(turned)) as image, Image.open(io.BytesIO(data)) as original:
            assert not image.getexif()
            assert image.mode == mode
            expected = np.array(ImageOps.exif_transpose(original)).astype(int)
            assert np.abs(np.array(image).astype(int) - expected).max() < 12  # rounding of the chroma


def test_other_modes_and_damaged_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for kind, mode in (("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("WEBP", "RGBA")):
        data = encoded(kind, mode, size=(17, 9), exif=exif_bytes(6, b"II")[6 if kind != "JPEG" else 0 :])
        turned, lossless = make_upright(data, 6)
        assert lossless == (kind != "JPEG")
        with Image.open(io.BytesIO(turned)) as image:
            assert (image.size, image.mode, image.format) == ((9, 17), mode, kind)
    cut = encoded(size=(64, 64), quality=95)[:900]
    assert make_upright(cut, 6) == (cut, True)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_avif_is_turned(path: Path, mode: str) -> None:
    for value in range(2, 9):
        data = encoded("AVIF", mode, size=(64, 48), exif=exif_bytes(value, b"MM"))
        path.write_bytes(data)
        assert read_orientation(path) == value
        turned, lossless = make_upright(data, value)
        assert not lossless
        with Image.open(io.BytesIO(turned)) as image, Image.open(io.BytesIO(data)) as original:
            assert not image.getexif()
            expected = np.array(ImageOps.exif_transpose(original).convert("RGB")).astype(int)
            assert np.abs(np.array(image.convert("RGB")).astype(int) - expected).mean() < 2
    path.write_bytes(encoded("AVIF", mode))
    assert read_orientation(path) == 1
    path.write_bytes(encoded("AVIF", mode, xmp=b'<x tiff:Orientation="6"/>'))
    assert read_orientation(path) == 1


def test_transparent_pixels_of_webp_keep_their_colours() -> None:
    colours = np.arange(16 * 12 * 4, dtype=np.uint8).reshape(12, 16, 4)
    colours[..., 3] = 0
    buffer = io.BytesIO()
    exif = exif_bytes(6, b"II")
    Image.fromarray(colours).save(buffer, "WEBP", lossless=True, exact=True, exif=exif)
    turned, lossless = make_upright(buffer.getvalue(), 6)
    assert lossless
    with Image.open(io.BytesIO(turned)) as image:
        np.testing.assert_array_equal(np.array(image), np.rot90(colours, -1))
