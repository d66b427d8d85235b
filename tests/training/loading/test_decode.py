"""`EncodedImage`: decoding a part of an image gives the same pixels as Pillow."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_images import encoded

from hpc_imagenet.data.images.image_header import TILED, inspect
from hpc_imagenet.data.images.shard_transform import ShardTransform
from hpc_imagenet.training.loading import decode
from hpc_imagenet.training.loading.decode import EncodedImage

JPEGTRAN = shutil.which("jpegtran")
needs_jpegtran = pytest.mark.skipif(JPEGTRAN is None, reason="no jpegtran (libjpeg-turbo-progs)")


@pytest.fixture(autouse=True, scope="module")
def small_images_are_spliced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_MIN_SPARED", 0)
        yield


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def noisy(size: tuple[int, int], subsampling: int, **options: object) -> bytes:
    """Return a JPEG with random pixels, so that a shift or a wrong colour is detected."""
    bits = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(bits).resize((2 * size[0], size[1])).crop((0, 0, *size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=subsampling, **options)
    return buffer.getvalue()


def with_restart_markers(data: bytes, interval: str) -> bytes:
    assert JPEGTRAN
    command = [JPEGTRAN, "-copy", "all", "-optimize", "-restart", interval]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Draw the size of an image and a box inside it."""
    width, height = draw(sizes)
    left, upper = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (
        left,
        upper,
        draw(st.integers(left + 1, width)),
        draw(st.integers(upper + 1, height)),
    )


def matches_pillow(data: bytes, box: tuple[int, int, int, int]) -> bool:
    return np.array_equal(EncodedImage(data).pixels(box), pillow(data)[box[1] : box[3], box[0] : box[2]])


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(parts(), st.sampled_from([0, 1, 2]), st.booleans())
def test_part_has_the_pixels_of_the_whole(part, subsampling: int, progressive: bool) -> None:
    size, box = part
    assert matches_pillow(noisy(size, subsampling, progressive=progressive), box)


@pytest.mark.slow
@needs_jpegtran
@settings(max_examples=25, deadline=None)
@given(parts(), st.sampled_from([0, 1, 2]), st.sampled_from(["1B", "2B", "3B", "1", "2"]))
@example(((19, 1), (18, 0, 19, 1)), 1, "1B")  # the last block has 3 px
def test_part_of_a_tiled_image_has_the_pixels_of_the_whole(part, subsampling: int, interval: str) -> None:
    size, box = part
    assert matches_pillow(with_restart_markers(noisy(size, subsampling), interval), box)


@needs_jpegtran
def test_only_the_part_of_a_tiled_image_is_decoded() -> None:
    """The data of other parts may be damaged."""
    plain = noisy((160, 160), 2)
    data, info = ShardTransform(tile=True)(plain, inspect(plain))  # what process.tile=true writes
    assert info.flags & TILED
    scan, box = EncodedImage(data)._frame.scan, (100, 100, 130, 130)
    marks = [at for at in range(scan, len(data)) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    assert len(marks) == 99
    damaged = bytearray(data)
    for at in range(marks[4] + 2, marks[5]):  # in the first row of blocks
        damaged[at] = 0
    left, upper, right, lower = box
    expected = pillow(data)[upper:lower, left:right]
    assert np.array_equal(EncodedImage(bytes(damaged)).pixels(box), expected)
    assert not np.array_equal(
        EncodedImage(bytes(damaged)).pixels((60, 0, 100, 16)), pillow(data)[:16, 60:100]
    )


@needs_jpegtran
def test_tiled_image_is_spliced_only_if_that_spares_enough_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part spares two thirds of the image's data: the rows above it and the columns beside it."""
    image = EncodedImage(with_restart_markers(noisy((160, 160), 2), "1B"))
    decoded, real = [], decode._decode_jpeg

    def record(data: bytes, width: int, height: int, strict: bool = True) -> np.ndarray:
        decoded.append((width, height))
        return real(data, width, height, strict)

    monkeypatch.setattr(decode, "_decode_jpeg", record)
    for spared in (0.5, 0.8):  # of the data
        monkeypatch.setattr(decode, "_MIN_SPARED", int(spared * len(image._data)))
        image.pixels((100, 100, 130, 130))
    assert decoded == [(48, 48), (160, 144)]


@needs_jpegtran
@pytest.mark.parametrize("fault", ["missing", "number"])
def test_damaged_restart_markers_are_decoded_by_pillow(fault: str) -> None:
    data = bytearray(with_restart_markers(noisy((64, 64), 0), "1B"))
    at = data.index(b"\xff\xd3")
    if fault == "missing":
        del data[at : at + 2]
    else:
        data[at + 1] = 0xD6
    expected = pillow(bytes(data))
    assert np.array_equal(EncodedImage(bytes(data)).pixels((40, 40, 64, 64)), expected[40:64, 40:64])


UNUSUAL = {
    "png named jpeg": encoded("PNG"),
    "png with alpha": encoded("PNG", "RGBA"),
    "bmp": encoded("BMP"),
    "cmyk": encoded(mode="CMYK"),
    "grey": encoded(mode="L", size=(60, 60)),
    "progressive": encoded(size=(60, 60), progressive=True),
    "data after the image": encoded(size=(60, 60)) + b"behind" * 300,
    "restart markers that Pillow writes": encoded(size=(60, 60), restart_marker_blocks=1),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_images_match_pillow(kind: str) -> None:
    data = UNUSUAL[kind]
    image = EncodedImage(data)
    width, height = Image.open(io.BytesIO(data)).size
    assert (image.width, image.height) == (width, height)
    for box in ((0, 0, width, height), (2, 3, width // 2, height // 2)):
        assert matches_pillow(data, box), box


@pytest.mark.parametrize("marking", ["adobe", "ids"])
def test_rgb_jpeg_matches_pillow_and_is_not_plain(marking: str) -> None:
    data = encoded(size=(60, 60), keep_rgb=True)  # Pillow writes both Adobe's marker and R, G, B as ids
    if marking == "ids":
        data = data.replace(b"Adobe", b"adobe")
    else:
        data = data.replace(b"\x03R\x11\0G\x11\0B", b"\x03\1\x11\0\2\x11\0\3").replace(
            b"\x03R\0G\0B", b"\x03\1\0\2\0\3"
        )
        assert data.count(b"R\0") == 0
    assert not EncodedImage(data).plain
    assert matches_pillow(data, (0, 0, 60, 60))
    assert EncodedImage(encoded(size=(60, 60))).plain


def test_exif_orientation_is_ignored() -> None:
    """As in the usual training pipelines for ImageNet."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(size=(48, 32), exif=exif)
    assert (EncodedImage(data).width, EncodedImage(data).height) == (48, 32)
    assert matches_pillow(data, (0, 0, 48, 32))


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 5000, b"\xff\xd8", b"\xff\xd8\xff\xe0", encoded()[:200], b"BM"]
)
def test_data_that_is_not_an_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        EncodedImage(data).pixels((0, 0, 1, 1))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("lower", [16, 120])
def test_truncated_image_is_an_error(share: float, lower: int) -> None:
    """Even if the part is complete, because every epoch decodes another part."""
    data = noisy((120, 120), 2)
    with pytest.raises(ValueError, match="truncated"):
        EncodedImage(data[: int(share * len(data))]).pixels((0, 0, 16, lower))


def test_random_damage_gives_the_same_errors_and_pixels_as_pillow() -> None:
    """Nothing crashes."""
    bits = random.Random(5)
    plain = noisy((96, 96), 2)
    for _ in range(60):
        data = bytearray(plain)
        for _ in range(bits.randrange(1, 4)):
            data[bits.randrange(len(data))] = bits.randrange(256)
        try:
            expected = pillow(bytes(data))
        except (OSError, SyntaxError, ValueError):
            expected = None
        try:
            image = EncodedImage(bytes(data))
            found = image.pixels((0, 0, image.width, image.height)) if image.width < 1000 else None
        except ValueError:
            assert expected is None
            continue
        if found is not None:
            assert expected is not None
            assert np.array_equal(found, expected)
