"""What training sees of images that are neither JPEG nor plain PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sample_images import encoded

from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.images.image_header import CORRUPT, GREY, OTHER, PNG
from hpc_imagenet.data.images.shard_transform import ShardTransform
from hpc_imagenet.training.loading.decode import EncodedImage


def decoded(data: bytes) -> np.ndarray:
    image = EncodedImage(data)
    return image.pixels((0, 0, image.width, image.height))


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_of_sixteen_bits_the_upper_eight_are_taken(file_format: str) -> None:
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    data = saved(Image.fromarray(values), file_format)
    np.testing.assert_array_equal(decoded(data)[..., 1], values >> 8)
    info = image_header.inspect(data)
    assert not info.flags & CORRUPT
    small, _ = ShardTransform("short", 8)(data, info)
    assert 100 < decoded(small).mean() < 155


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_are_refused(kind: type) -> None:
    data = saved(Image.fromarray(np.ones((8, 8), kind)), "TIFF")
    assert image_header.inspect(data).flags & CORRUPT
    assert "32 bits per channel" in image_header.decode_error(data)
    with pytest.raises(ValueError, match="32 bits per channel"):
        decoded(data)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(file_format: str) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert decoded(data).shape == (7, 9, 3)
    assert np.abs(decoded(data).astype(int) - [255, 0, 0]).max() < 8
    info = image_header.inspect(data)
    assert (info.width, info.height) == (9, 7)
    assert info.flags & (PNG | OTHER)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF"])
def test_other_formats_are_decoded_as_pillow_does(file_format: str) -> None:
    for mode in ("RGB", "L"):
        try:
            data = encoded(file_format, mode)
        except (OSError, KeyError):
            pytest.skip(f"Pillow was built without {file_format}")
        info = image_header.inspect(data)
        assert info.flags & ~GREY == OTHER
        np.testing.assert_array_equal(decoded(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))
        assert image_header.inspect(data[: len(data) // 3]).flags & CORRUPT
