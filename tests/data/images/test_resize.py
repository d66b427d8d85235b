from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sample_images import encoded

from hpc_imagenet.data.images.resize import resize_bicubic

ANY_CPU = """
import hashlib, numpy, PIL.Image
from hpc_imagenet.data.images.resize import resize_bicubic
pixels = numpy.random.default_rng(0).integers(0, 256, (375, 500, 3), numpy.uint8)
print(hashlib.md5(resize_bicubic(PIL.Image.fromarray(pixels), (341, 256)).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(341, 256), (20, 3), (1, 1), (499, 374)])
def test_resize_differs_from_pillow_by_rounding_only(mode: str, size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(encoded(mode=mode, size=(500, 375))))
    ours, pillow = resize_bicubic(image, size), image.resize(size, Image.Resampling.BICUBIC)
    assert (ours.mode, ours.size) == (mode, size)
    difference = abs(np.asarray(ours).astype(int) - np.asarray(pillow).astype(int))
    assert difference.max() <= 2  # each of two passes rounds
    assert difference.mean() < 0.05


@pytest.mark.slow
def test_resize_gives_the_same_bytes_with_any_vector_instructions() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", ANY_CPU],
            env={**os.environ, "ATEN_CPU_CAPABILITY": instructions},
            check=True,
            capture_output=True,
        ).stdout
        for instructions in ("default", "avx2")
    }
    assert len(digests) == 1
