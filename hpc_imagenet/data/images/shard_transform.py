"""Image transform applied while shards are written: resize, normalise to baseline RGB JPEG, restart markers.

Resizing decodes and encodes with Pillow, and reduces with torch. Normalising decodes and encodes a PNG or a
CMYK JPEG; a progressive JPEG is rewritten without loss by jpegtran of libjpeg-turbo, with the same
coefficients.
Tiling runs jpegtran on every JPEG, with optimised Huffman tables and a restart marker after every block of 8
or 16 px, so that a part of the image can be decoded without the rest.
"""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import PIL
from PIL import Image, features

from hpc_imagenet.config.schema import Process
from hpc_imagenet.data.images import image_header, pillow
from hpc_imagenet.data.images.image_header import CMYK, OTHER, PNG, PROGRESSIVE, ROTATED, TILED, ImageInfo
from hpc_imagenet.data.images.resize import resize_bicubic
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.child_environment import plain_environment

_JPEGTRAN = ("jpegtran", "-copy", "all", "-optimize")
_RESTART = ("-restart", "1B")  # after each block
_NEAR_LOSSLESS = {"quality": 100, "subsampling": 0}  # 0.2 grey levels off on average


@dataclass(frozen=True)
class ShardTransform:
    """Transform of one image, configured by the settings of `process`."""

    side: str | None = None  # which side is limited: "short" or "long"; None: no resize
    px: int = 0  # maximum of that side
    quality: int = 90
    normalise: bool = False
    tile: bool = False

    @property
    def copies(self) -> bool:
        """Whether every image is copied unchanged."""
        return not (self.side or self.normalise or self.tile)

    def tools(self) -> dict[str, str]:
        """Return the versions of the tools that determine the output bytes.

        Raises:
            UserError: jpegtran is needed but not installed.
        """
        tools = {}
        if self.side or self.normalise:
            codec = "libjpeg_turbo" if features.check("libjpeg_turbo") else "jpg"
            tools["pillow"] = f"{PIL.__version__} with {codec} {features.version(codec)}"
        if self.side:
            tools["torch"] = metadata.version("torch").partition("+")[0]  # without the build, such as +cu128
        if self.normalise or self.tile:
            tools["jpegtran"] = _jpegtran_version()
        return tools

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the new (width, height) in px of an image of this size; never larger than the input."""
        side = {None: 0, "short": min(width, height), "long": max(width, height)}[self.side]
        if side <= self.px or not side:
            return width, height
        return max(1, round(width * self.px / side)), max(1, round(height * self.px / side))

    def __call__(self, data: bytes, info: ImageInfo) -> tuple[bytes, ImageInfo]:
        """Return the bytes of the transformed image and its info.

        Args:
            data: bytes of the image file.
            info: size and flags of the image; must not have the flag CORRUPT.

        Raises:
            ValueError: the image cannot be decoded.
        """
        size = self.size(info.width, info.height)
        shrinks = size != (info.width, info.height)
        if shrinks or (self.normalise and info.flags & (PNG | OTHER | CMYK)):
            data = self._encode(data, size if shrinks else None, info)
            info = image_header.inspect(data)
        if info.flags & (PNG | OTHER):
            return data, info
        if self.tile and (tiled := _jpegtran(data, *_RESTART)):
            return tiled, info._replace(flags=info.flags & ~PROGRESSIVE | TILED)
        if self.normalise and info.flags & PROGRESSIVE and (baseline := _jpegtran(data)):
            return baseline, info._replace(flags=info.flags & ~PROGRESSIVE)
        return data, info

    def _encode(self, data: bytes, size: tuple[int, int] | None, info: ImageInfo) -> bytes:
        options: dict[str, Any] = {}
        if info.flags & PNG:  # whose Exif may be in none of the bytes that a scan reads
            info = image_header.inspect(data)
        try:
            with Image.open(io.BytesIO(data)) as image:
                if info.flags & ROTATED:
                    # Keep only the orientation: other Exif data of cameras cannot always be written back.
                    options["exif"] = exif = Image.Exif()
                    exif[image_header.ORIENTATION] = pillow.exif_orientation(image)
                if size is None:
                    return _save(_to_rgb_or_grey(image), {**_NEAR_LOSSLESS, **options})
                # Decode a JPEG at reduced scale if that is still at least twice the target size.
                image.draft(None, (2 * size[0], 2 * size[1]))
                small = resize_bicubic(_to_rgb_or_grey(image), size)
                return _save(small, {"quality": self.quality, **options})
        except pillow.ERRORS as error:
            raise ValueError(pillow.reason(error)) from None


def shard_transform(process: Process) -> ShardTransform:
    """Return the transform for the settings of `process`."""
    side, _, px = (process.resize or "").partition(":")
    return ShardTransform(side or None, int(px or 0), process.quality, process.normalise, process.tile)


def _to_rgb_or_grey(image: Image.Image) -> Image.Image:
    """Return the image in RGB, as training sees it; a grey image stays grey."""
    return image if image.mode in ("L", "RGB") else pillow.to_rgb(image)


def _save(image: Image.Image, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _jpegtran(data: bytes, *options: str) -> bytes:
    """Rewrite a JPEG without loss; return empty bytes if jpegtran fails."""
    command = (*_JPEGTRAN, *options)
    env = plain_environment()
    done = subprocess.run(command, input=data, capture_output=True, check=False, env=env)
    return b"" if done.returncode else done.stdout


@functools.cache
def _jpegtran_version() -> str:
    program = shutil.which(_JPEGTRAN[0])
    if program is None:
        raise UserError(
            "process.normalise and process.tile need the program jpegtran on the PATH of the node: "
            "apt install libjpeg-turbo-progs, or conda install libjpeg-turbo"
        )
    result = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return (result.stderr or result.stdout).decode(errors="replace").splitlines()[0].strip()
