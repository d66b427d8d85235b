"""EXIF orientation: read it, and turn an image upright, without loss where possible.

A JPEG is turned by jpegtran, which moves its coefficients. Where that is impossible (the sides are not
multiples of its blocks, or there is no jpegtran) the image is encoded again at quality 95. PNG and WebP are
encoded again without loss, AVIF as a JPEG of quality 95. TIFF is left alone: Pillow turns it whenever it
opens it. The new file has no Exif data.
Source: Exif 2.3 table 4 (orientation); PNG specification 11.3.3 (eXIf); WebP container specification (VP8X);
ISO/IEC 23008-12 (irot and imir of AVIF, which Pillow presents as Exif).
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

from PIL import ImageOps

from hpc_imagenet.data.images import jpeg_header, pillow
from hpc_imagenet.data.images.image_header import ORIENTATION
from hpc_imagenet.io.child_environment import plain_environment

UPRIGHT = 1
QUALITY = 95  # of a JPEG that jpegtran cannot turn, or that is made of an AVIF

_HEAD = 4096  # bytes: holds the start of any Exif segment
_TAIL = 70_000  # bytes: holds Exif of up to 64 kB, as in a JPEG, at the end of a PNG
_PNG = b"\x89PNG\r\n\x1a\n"
_SHORT = 3  # type of a TIFF entry: 16 bits
_VP8X_EXIF = 8  # flag in a WebP file: it has Exif data
_TURNS = {  # orientation → jpegtran's options
    2: ("-flip", "horizontal"),
    3: ("-rotate", "180"),
    4: ("-flip", "vertical"),
    5: ("-transpose",),
    6: ("-rotate", "90"),
    7: ("-transverse",),
    8: ("-rotate", "270"),
}
# Options of Pillow. exact: keep the colours of transparent pixels, which training sees.
_LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}}
_JPEG_OPTIONS = {"quality": QUALITY, "subsampling": 0}
_JPEG_MODES = ("L", "RGB", "CMYK")


def has_jpegtran() -> bool:
    """Whether JPEGs can be turned without loss on this machine; else their bytes are others."""
    return shutil.which("jpegtran") is not None


def read_orientation(path: Path) -> int:
    """Return the EXIF orientation of a file, 1 to 8; 1 (upright) also if it has none or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            value = _peek_png(file.fileno()) if head.startswith(_PNG) else _peek(head)
            if value is None:
                file.seek(0)
                with pillow.open_image(file) as image:
                    value = pillow.exif_orientation(image)
    except pillow.ERRORS:
        return UPRIGHT  # the process stage reports unreadable images
    return value if value in _TURNS else UPRIGHT


def make_upright(data: bytes, orientation: int) -> tuple[bytes, bool]:
    """Turn an image upright.

    Args:
        data: bytes of the file.
        orientation: its EXIF orientation, 2 to 8.

    Returns:
        bytes of the new file, and whether its pixels are exactly the old ones. An image that cannot be
        decoded is returned as it is.
    """
    if data.startswith(jpeg_header.SOI) and (jpeg := _turn_jpeg(data, orientation)):
        return jpeg, True
    try:
        with pillow.open_image(io.BytesIO(data)) as image:
            lossless = _LOSSLESS.get(image.format or "")
            target = "JPEG" if lossless is None else image.format
            buffer = io.BytesIO()
            turned = ImageOps.exif_transpose(image)
            if lossless is None and turned.mode not in _JPEG_MODES:  # an AVIF with transparency
                turned = pillow.to_rgb(turned)
            turned.save(buffer, target, exif=b"", **(_JPEG_OPTIONS if lossless is None else lossless))
    except pillow.ERRORS:
        return data, True
    return buffer.getvalue(), lossless is not None


def _peek(head: bytes) -> int | None:
    """Return the orientation from the first bytes of a file; None if they are not conclusive."""
    if head.startswith(jpeg_header.SOI):
        try:
            for marker, begin, _ in jpeg_header.segments(head):
                if marker in jpeg_header.FRAMES or marker == jpeg_header.SOS:
                    return UPRIGHT
                if marker == jpeg_header.APP1 and head[begin + 4 : begin + 8] == b"Exif":
                    return _first_directory(head[begin + 10 :])
        except (IndexError, struct.error):  # a long segment
            return None
        return UPRIGHT
    if head[:4] == b"RIFF" and head[12:16] == b"VP8X":
        return None if head[20] & _VP8X_EXIF else UPRIGHT
    if head[4:8] == b"ftyp":  # AVIF
        return None
    return UPRIGHT


def _peek_png(descriptor: int) -> int | None:
    """Return that a PNG is upright if none of its chunks is Exif; None if one is.

    It may be behind a colour profile, of which only the header is read, or behind the pixels. These are
    thousands of chunks, so what is behind them is searched for at the end of the file.

    Raises:
        struct.error: the file ends before its pixels.
    """
    at, kind = len(_PNG), b""
    while kind not in (b"IDAT", b"eXIf"):
        size, kind = struct.unpack(">I4s", os.pread(descriptor, 8, at))
        at += size + 12
    tail = os.pread(descriptor, _TAIL, max(at, os.fstat(descriptor).st_size - _TAIL))
    return None if kind == b"eXIf" or b"eXIf" in tail else UPRIGHT


def _first_directory(tiff: bytes) -> int | None:
    """Return the orientation from the first directory of a TIFF; None if it is not of the usual type.

    Raises:
        struct.error: the directory is not in these bytes.
    """
    order = "<" if tiff[:2] == b"II" else ">"
    (begin,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, begin)
    for number in range(entries):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, begin + 2 + 12 * number)
        if tag == ORIENTATION:
            return int(value) if (kind, count) == (_SHORT, 1) else None
    return UPRIGHT


def _turn_jpeg(data: bytes, orientation: int) -> bytes:
    """Turn a JPEG without loss; return empty bytes if that is impossible."""
    program = shutil.which("jpegtran")
    if program is None:
        return b""
    command = (program, "-copy", "none", "-optimize", "-perfect", *_TURNS[orientation])
    env = plain_environment()
    done = subprocess.run(command, input=data, capture_output=True, check=False, env=env)
    return b"" if done.returncode else done.stdout
