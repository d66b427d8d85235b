"""What is done to an image on its way into a shard: made smaller, made ordinary, given restart markers.

Resizing decodes and encodes again, by Pillow; so does normalising a PNG or a CMYK JPEG. A progressive JPEG
is normalised without loss by the program jpegtran of libjpeg-turbo, which moves the same coefficients into
another file. Tiling does the same with every JPEG, for a file with optimised tables and a restart marker
behind every block of 8 or 16 px: whoever needs a part of the picture need not decode the rest.
"""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import PIL
from PIL import Image, features

from hpc_imagenet.config.schema import Process
from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.images.image_header import CMYK, OTHER, PNG, PROGRESSIVE, ROTATED, TILED, ImageInfo
from hpc_imagenet.errors import UserError

_JPEGTRAN = ("jpegtran", "-copy", "all", "-optimize")
_RESTART = ("-restart", "1B")  # behind each block
_BEST = {"quality": 100, "subsampling": 0}  # 0.2 grey levels off on average


@dataclass(frozen=True)
class ShardTransform:
    """As the settings of `process` have it."""

    side: str | None = None  # short or long
    px: int = 0  # of that side, at most
    quality: int = 90
    normalise: bool = False
    tile: bool = False

    @property
    def copies(self) -> bool:
        """Whether every image stays as it is."""
        return not (self.side or self.normalise or self.tile)

    def tools(self) -> dict[str, str]:
        """Return the versions of what decides the bytes that come out.

        Raises:
            UserError: jpegtran is needed and missing.
        """
        tools = {}
        if self.side or self.normalise:
            codec = "libjpeg_turbo" if features.check("libjpeg_turbo") else "jpg"
            tools["pillow"] = f"{PIL.__version__} with {codec} {features.version(codec)}"
        if self.normalise or self.tile:
            tools["jpegtran"] = _jpegtran_version()
        return tools

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return how large, in px, a picture of this size becomes; never larger than it is."""
        side = {None: 0, "short": min(width, height), "long": max(width, height)}[self.side]
        if side <= self.px or not side:
            return width, height
        return max(1, round(width * self.px / side)), max(1, round(height * self.px / side))

    def __call__(self, data: bytes, look: ImageInfo) -> tuple[bytes, ImageInfo]:
        """Return the image as it shall lie in the shard, and what it is then.

        Args:
            data: a file's bytes.
            look: what it is; where `marks` says CORRUPT it must not come here.

        Raises:
            ValueError: it cannot be decoded.
        """
        size = self.size(look.width, look.height)
        smaller = size != (look.width, look.height)
        if smaller or (self.normalise and look.flags & (PNG | OTHER | CMYK)):
            data = self._encode(data, size if smaller else None, look)
            look = image_header.inspect(data)
        if look.flags & (PNG | OTHER):
            return data, look
        if self.tile and (tiled := _jpegtran(data, *_RESTART)):
            return tiled, look._replace(flags=look.flags & ~PROGRESSIVE | TILED)
        if self.normalise and look.flags & PROGRESSIVE and (baseline := _jpegtran(data)):
            return baseline, look._replace(flags=look.flags & ~PROGRESSIVE)
        return data, look

    def _encode(self, data: bytes, size: tuple[int, int] | None, look: ImageInfo) -> bytes:
        options: dict[str, Any] = {}
        try:
            with Image.open(io.BytesIO(data)) as image:
                if look.flags & ROTATED:
                    # Nothing else of Exif: what cameras write there cannot always be written again.
                    options["exif"] = exif = Image.Exif()
                    exif[image_header.ORIENTATION] = image.getexif().get(image_header.ORIENTATION, 1)
                if size is None:
                    return _save(_colours(image), {**_BEST, **options})
                # A JPEG is decoded at a half or less where that is still twice as large as wanted.
                image.draft(None, (2 * size[0], 2 * size[1]))
                small = _colours(image).resize(size, Image.Resampling.BICUBIC)
                return _save(small, {"quality": self.quality, **options})
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from None


def shard_transform(process: Process) -> ShardTransform:
    """Return what the settings ask for."""
    side, _, px = (process.resize or "").partition(":")
    return ShardTransform(side or None, int(px or 0), process.quality, process.normalise, process.tile)


def _colours(image: Image.Image) -> Image.Image:
    """Return the picture as training sees it, but for a grey one, which stays grey."""
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _save(image: Image.Image, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _jpegtran(data: bytes, *options: str) -> bytes:
    """Return the same picture in another file, or nothing where jpegtran finds fault with it."""
    done = subprocess.run((*_JPEGTRAN, *options), input=data, capture_output=True, check=False)
    return b"" if done.returncode else done.stdout


@functools.cache
def _jpegtran_version() -> str:
    program = shutil.which(_JPEGTRAN[0])
    if program is None:
        raise UserError(
            "process.normalise and process.tile need the program jpegtran on the PATH of the node: "
            "apt install libjpeg-turbo-progs, or conda install libjpeg-turbo"
        )
    told = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return (told.stderr or told.stdout).decode(errors="replace").splitlines()[0].strip()
