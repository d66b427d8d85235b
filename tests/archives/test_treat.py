from __future__ import annotations

import io
import random
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, jpeg
from PIL import Image

from hpc_imagenet.data.images import image_header, shard_transform
from hpc_imagenet.data.images.image_header import CMYK, GREY, PNG, PROGRESSIVE, ROTATED, TILED
from hpc_imagenet.data.images.shard_transform import ShardTransform
from hpc_imagenet.errors import UserError

needs_jpegtran = pytest.mark.skipif(not shutil.which("jpegtran"), reason="no jpegtran on the PATH")
TURN = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def treated(data: bytes, how: ShardTransform) -> tuple[bytes, image_header.ImageInfo]:
    out, look = how(data, image_header.inspect(data))
    assert image_header.inspect(out)._replace(marks=0) == look._replace(marks=0)
    assert image_header.inspect(out).flags == look.flags & ~TILED
    return out, look


def pixels(data: bytes) -> np.ndarray:  # type: ignore[type-arg]
    """Return what training sees."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(["short", "long"]), st.integers(1, 600))
def test_sizes(width: int, height: int, side: str, px: int) -> None:
    new = ShardTransform(side, px).size(width, height)
    pick = min if side == "short" else max
    assert pick(new) == min(px, pick(width, height)) or min(new) == 1
    assert new[0] <= width
    assert new[1] <= height
    if pick(width, height) <= px:
        assert new == (width, height)
    elif min(new) > 1:
        assert abs(new[0] * height - new[1] * width) <= max(width, height)


def test_resizes_only_what_is_larger() -> None:
    how = ShardTransform("short", 24)
    small = encoded(size=(24, 90))
    assert treated(small, how)[0] == small
    large, look = treated(encoded(size=(200, 100)), how)
    assert (look.width, look.height, look.flags) == (48, 24, 0)
    theirs = Image.open(io.BytesIO(encoded(size=(200, 100)))).resize((48, 24), Image.Resampling.BICUBIC)
    assert abs(pixels(large) - np.asarray(theirs).astype(int)).mean() < 3


def test_resize_keeps_what_matters() -> None:
    how = ShardTransform("long", 20, 95)
    assert treated(encoded(mode="L", size=(64, 64)), how)[1].flags == GREY
    assert treated(encoded(exif=TURN, size=(64, 64)), how)[1].flags == ROTATED
    for data in (encoded("PNG", size=(64, 64)), encoded(mode="CMYK", size=(64, 64))):
        out, look = treated(data, how)
        assert (look.width, look.height, look.flags) == (20, 20, 0)
        assert Image.open(io.BytesIO(out)).mode == "RGB"


def test_quality_is_a_matter_of_bytes() -> None:
    data = encoded(size=(300, 300), quality=100)
    sizes = [len(treated(data, ShardTransform("long", 200, quality))[0]) for quality in (10, 50, 90)]
    assert sizes == sorted(set(sizes))


@needs_jpegtran
@pytest.mark.parametrize(
    ("data", "most"),
    [
        (encoded(progressive=True, size=(64, 48)), 0),
        (encoded(progressive=True, mode="L", size=(64, 48)), 0),
        (encoded("PNG", size=(64, 48)), 4),
        (encoded(mode="CMYK", size=(64, 48)), 4),
    ],
)
def test_normalises_at_little_loss(data: bytes, most: int) -> None:
    out, look = treated(data, ShardTransform(normalise=True))
    assert not look.flags & (PNG | CMYK | PROGRESSIVE)
    assert abs(pixels(out) - pixels(data)).max() <= most


@needs_jpegtran
def test_normalise_leaves_the_ordinary_alone() -> None:
    for data in (encoded(), encoded(mode="L"), encoded(exif=TURN)):
        assert treated(data, ShardTransform(normalise=True))[0] == data


@needs_jpegtran
@pytest.mark.parametrize(
    "data",
    [
        encoded(size=(130, 70)),
        encoded(size=(130, 70), subsampling=0),
        encoded(mode="L", size=(130, 70)),
        encoded(mode="CMYK", size=(130, 70)),
        encoded(progressive=True, size=(130, 70)),
        encoded(exif=TURN, size=(130, 70)),
        jpeg(random.Random(2), 70_000),
    ],
)
def test_tiles_show_the_same_picture_bit_for_bit(data: bytes) -> None:
    out, look = treated(data, ShardTransform(tile=True))
    assert look.flags & TILED
    assert b"\xff\xdd\x00\x04\x00\x01" in out, "restart interval of one block"
    assert out.count(b"\xff\xd0") >= (look.width > 16)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(out)) as after:
        assert (before.mode, before.size) == (after.mode, after.size)
        assert before.tobytes() == after.tobytes()
        assert before.getexif() == after.getexif()


@needs_jpegtran
def test_what_cannot_be_tiled_stays() -> None:
    data = encoded("PNG")
    assert treated(data, ShardTransform(tile=True)) == (data, image_header.inspect(data))


def test_a_missing_jpegtran_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    shard_transform._jpegtran_version.cache_clear()
    for how in (ShardTransform(tile=True), ShardTransform(normalise=True)):
        with pytest.raises(UserError, match="need the program jpegtran"):
            how.tools()
    assert ShardTransform("short", 256).tools().keys() == {"pillow"}
    assert ShardTransform().tools() == {}
    shard_transform._jpegtran_version.cache_clear()


def test_a_corrupt_image_is_told() -> None:
    data = encoded(size=(64, 64))
    with pytest.raises(ValueError, match="Truncated"):
        ShardTransform("short", 8)(data[:400], image_header.ImageInfo(64, 64, 0))
