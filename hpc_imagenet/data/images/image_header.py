"""What an image is, from its first and last bytes: size, format, oddities; and whether it can be decoded.

Of a JPEG the header says all that is counted, and the mark at its end that nothing was cut off, so that
1 kB of 110 is looked at. Whatever these leave open, such as a longer header or an end without its mark, is
decided by a closer look at all of the image, at last by decoding it: only what Pillow cannot decode, as
training would, is called corrupt.
Source: ITU-T T.81 annex B (markers), PNG specification 5.3 and 11.2.2, Exif 2.3 table 4 (orientation).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

HEAD = 1024  # bytes of its beginning that are looked at first: the header, but for a long Exif segment

# One entry an image. `marks` holds the bits below.
FACTS = np.dtype([("width", "<u2"), ("height", "<u2"), ("marks", "u1")])
PNG, OTHER, GREY, CMYK, PROGRESSIVE, ROTATED, CORRUPT, TILED = (1 << bit for bit in range(8))
FLAG_NAMES = {
    PNG: "PNG, whatever its name says",
    OTHER: "neither JPEG nor PNG",
    GREY: "grey",
    CMYK: "CMYK",
    PROGRESSIVE: "progressive JPEG",
    ROTATED: "EXIF says to turn or mirror it",
    CORRUPT: "corrupt",
}

_JPEG, _END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_PNG_GREY = (0, 4)  # colour types: grey, grey with alpha
ORIENTATION = 0x0112  # the Exif tag
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # within C0 to CF those that begin no frame
_LATE_END = 4096  # bytes: so far from the end of the file a JPEG's end mark may lie
# The entry of a TIFF directory for tag 0x0112, a short, one of them: 1 is upright, 2 to 8 are not. Looked for
# as bytes within the Exif segment, which takes 1 µs where walking the directories takes 60.
_TURNED = re.compile(
    rb"\x01\x12\x00\x03\x00\x00\x00\x01\x00[\x02-\x08]|\x12\x01\x03\x00\x01\x00\x00\x00[\x02-\x08]\x00"
)


class ImageInfo(NamedTuple):
    """What an image is; in the order of `FACTS`."""

    width: int  # px
    height: int
    flags: int


def peek(head: bytes, tail: bytes) -> ImageInfo | None:
    """Say what an image is from its first and last bytes, or None where they do not tell.

    Args:
        head: its first `HEAD` bytes, or all of it.
        tail: some of its last bytes.
    """
    if head[:2] == _JPEG:
        return _frame(head) if _END in tail else None
    if head[:8] == _PNG and tail[-8:] == _PNG_END and head[12:16] == b"IHDR":
        grey = GREY if head[25] in _PNG_GREY else 0
        return _look(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"), PNG | grey)
    return None


def inspect(data: bytes) -> ImageInfo:
    """Say what an image is from all of its bytes; `marks` has CORRUPT where it cannot be decoded."""
    return peek(data, data[-_LATE_END:]) or _decoded(data)


def decode_error(data: bytes) -> str:
    """Decode an image and return why that fails, or nothing where it does not."""
    from PIL import Image

    try:
        with _opened(data) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error).split(" <_io")[0]  # Pillow names the buffer it was given
    return ""


def _frame(head: bytes) -> ImageInfo | None:
    """Walk the markers of a JPEG up to its frame header."""
    marks, at = 0, 2
    try:
        while True:
            if head[at] != 0xFF:
                return None
            marker = head[at + 1]
            if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
                components = head[at + 9]
                if components != 3:
                    marks |= GREY if components == 1 else CMYK
                if marker & 3 == 2:
                    marks |= PROGRESSIVE
                width, height = head[at + 7] << 8 | head[at + 8], head[at + 5] << 8 | head[at + 6]
                return ImageInfo(width, height, marks) if width and height else None
            if marker == 0xFF:  # fill bytes may stand before any marker
                at += 1
                continue
            if marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # without a length, or data before a frame
                return None
            end = at + 2 + (head[at + 2] << 8 | head[at + 3])
            if marker == 0xE1 and head[at + 4 : at + 8] == b"Exif" and _TURNED.search(head, at, end):
                marks |= ROTATED
            at = end
    except IndexError:
        return None


def _decoded(data: bytes) -> ImageInfo:
    from PIL import Image

    try:
        with _opened(data) as picture:
            picture.load()
            marks = {"JPEG": 0, "MPO": 0, "PNG": PNG}.get(picture.format or "", OTHER)
            marks |= {"1": GREY, "L": GREY, "LA": GREY, "I;16": GREY, "CMYK": CMYK}.get(picture.mode, 0)
            marks |= PROGRESSIVE if picture.info.get("progressive") else 0
            marks |= ROTATED if picture.getexif().get(ORIENTATION, 1) in range(2, 9) else 0
            return _look(picture.width, picture.height, marks)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ImageInfo(0, 0, CORRUPT)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged Exif, which decoding does not need
        with Image.open(io.BytesIO(data)) as picture:
            yield picture


def _look(width: int, height: int, marks: int) -> ImageInfo:
    limit = np.iinfo(FACTS["width"]).max
    return ImageInfo(min(width, limit), min(height, limit), marks)
