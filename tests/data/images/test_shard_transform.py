from __future__ import annotations

import io
import random
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_images import encoded, jpeg

from hpc_imagenet.data.images import image_header, shard_transform
from hpc_imagenet.data.images.image_header import CMYK, GREY, PNG, PROGRESSIVE, ROTATED, TILED
from hpc_imagenet.data.images.shard_transform import ShardTransform
from hpc_imagenet.errors import UserError

needs_jpegtran = pytest.mark.skipif(not shutil.which("jpegtran"), reason="no jpegtran on the PATH")
ROTATED_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def transformed(data: bytes, transform: ShardTransform) -> tuple[bytes, image_header.ImageInfo]:
    out, info = transform(data, image_header.inspect(data))
    assert image_header.inspect(out)._replace(flags=0) == info._replace(flags=0)
    assert image_header.inspect(out).flags == info.flags & ~TILED
    return out, info


def pixels(data: bytes) -> np.ndarray:  # type: ignore[type-arg]
    """Return the RGB pixels that training sees."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.slow
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(["short", "long"]), st.integers(1, 600))
def test_size_limits_the_chosen_side(width: int, height: int, side: str, px: int) -> None:
    new = ShardTransform(side, px).size(width, height)
    pick = min if side == "short" else max
    assert pick(new) == min(px, pick(width, height)) or min(new) == 1
    assert new[0] <= width
    assert new[1] <= height
    if pick(width, height) <= px:
        assert new == (width, height)
    elif min(new) > 1:
        assert abs(new[0] * height - new[1] * width) <= max(width, height)


def test_resize_shrinks_only_larger_images() -> None:
    transform = ShardTransform("short", 24)
    small = encoded(size=(24, 90))
    assert transformed(small, transform)[0] == small
    large, info = transformed(encoded(size=(200, 100)), transform)
    assert (info.width, info.height, info.flags) == (48, 24, 0)
    expected = Image.open(io.BytesIO(encoded(size=(200, 100)))).resize((48, 24), Image.Resampling.BICUBIC)
    assert abs(pixels(large) - np.asarray(expected).astype(int)).mean() < 3


def test_resize_keeps_grey_and_orientation() -> None:
    transform = ShardTransform("long", 20, 95)
    assert transformed(encoded(mode="L", size=(64, 64)), transform)[1].flags == GREY
    assert transformed(encoded(exif=ROTATED_EXIF, size=(64, 64)), transform)[1].flags == ROTATED
    png = encoded("PNG", exif=ROTATED_EXIF, size=(64, 64))
    assert transformed(png, transform)[1].flags == ROTATED
    png = encoded("PNG", exif=ROTATED_EXIF, icc_profile=bytes(range(256)) * 99, size=(64, 64))
    scanned = image_header.ImageInfo(64, 64, PNG)  # Exif is not in the first bytes
    assert transform(png, scanned)[1].flags == ROTATED
    for data in (encoded("PNG", size=(64, 64)), encoded(mode="CMYK", size=(64, 64))):
        out, info = transformed(data, transform)
        assert (info.width, info.height, info.flags) == (20, 20, 0)
        assert Image.open(io.BytesIO(out)).mode == "RGB"


def test_higher_quality_gives_larger_files() -> None:
    data = encoded(size=(300, 300), quality=100)
    sizes = [len(transformed(data, ShardTransform("long", 200, quality))[0]) for quality in (10, 50, 90)]
    assert sizes == sorted(set(sizes))


@needs_jpegtran
@pytest.mark.parametrize(
    ("data", "max_difference"),
    [
        (encoded(progressive=True, size=(64, 48)), 0),
        (encoded(progressive=True, mode="L", size=(64, 48)), 0),
        (encoded("PNG", size=(64, 48)), 4),
        (encoded(mode="CMYK", size=(64, 48)), 4),
    ],
)
def test_normalise_loses_at_most_four_grey_levels(data: bytes, max_difference: int) -> None:
    out, info = transformed(data, ShardTransform(normalise=True))
    assert not info.flags & (PNG | CMYK | PROGRESSIVE)
    assert abs(pixels(out) - pixels(data)).max() <= max_difference


@needs_jpegtran
def test_normalise_copies_baseline_images() -> None:
    for data in (encoded(), encoded(mode="L"), encoded(exif=ROTATED_EXIF)):
        assert transformed(data, ShardTransform(normalise=True))[0] == data


@needs_jpegtran
@pytest.mark.parametrize(
    "data",
    [
        encoded(size=(130, 70)),
        encoded(size=(130, 70), subsampling=0),
        encoded(mode="L", size=(130, 70)),
        encoded(mode="CMYK", size=(130, 70)),
        encoded(progressive=True, size=(130, 70)),
        encoded(exif=ROTATED_EXIF, size=(130, 70)),
        jpeg(random.Random(2), 70_000),
    ],
)
def test_tiling_keeps_the_pixels_bit_for_bit(data: bytes) -> None:
    out, info = transformed(data, ShardTransform(tile=True))
    assert info.flags & TILED
    assert b"\xff\xdd\x00\x04\x00\x01" in out, "restart interval of one block"
    assert out.count(b"\xff\xd0") >= (info.width > 16)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(out)) as after:
        assert (before.mode, before.size) == (after.mode, after.size)
        assert before.tobytes() == after.tobytes()
        assert before.getexif() == after.getexif()


@needs_jpegtran
def test_png_is_not_tiled() -> None:
    data = encoded("PNG")
    assert transformed(data, ShardTransform(tile=True)) == (data, image_header.inspect(data))


def test_missing_jpegtran_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    shard_transform._jpegtran_version.cache_clear()
    for transform in (ShardTransform(tile=True), ShardTransform(normalise=True)):
        with pytest.raises(UserError, match="need the program jpegtran"):
            transform.tools()
    assert ShardTransform("short", 256).tools().keys() == {"pillow", "torch"}
    assert ShardTransform().tools() == {}
    shard_transform._jpegtran_version.cache_clear()


def test_resize_of_a_corrupt_image_raises() -> None:
    data = encoded(size=(64, 64))
    with pytest.raises(ValueError, match="Truncated"):
        ShardTransform("short", 8)(data[:400], image_header.ImageInfo(64, 64, 0))
