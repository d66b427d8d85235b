"""Image headers: read size, format and flags of an image from its first and last bytes, or decode it.

For most JPEGs the first 1 kB of 110 kB is enough: the frame header has all facts, and the end-of-image marker
shows that the file is not truncated. If they are not conclusive (a longer header, no end marker), the whole
image is parsed, and decoded if necessary. Only an image that Pillow cannot decode, as training would, is
flagged as corrupt.
Source: PNG specification 5.3, 11.2.2 and 11.3.3 (eXIf), Exif 2.3 table 4 (orientation).
"""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpc_imagenet.data.images import jpeg_header

HEAD = 1024  # bytes parsed first: holds the header unless there is a long Exif segment

# px of an image: a header that claims more is corrupt. From here on Pillow refuses to decode, so that a
# header check and a decode check agree, and no training allocates 13 GB for a header of 65,500 x 65,500 px.
MAX_PIXELS = 178_956_970

# One entry per image. `marks` holds the flag bits below; stored scans and receipts use that name.
FACTS = np.dtype([("width", "<u2"), ("height", "<u2"), ("marks", "u1")])
PNG, OTHER, GREY, CMYK, PROGRESSIVE, ROTATED, CORRUPT, TILED = (1 << bit for bit in range(8))
FLAG_NAMES = {
    PNG: "PNG, whatever its extension",
    OTHER: "neither JPEG nor PNG",
    GREY: "grey",
    CMYK: "CMYK",
    PROGRESSIVE: "progressive JPEG",
    ROTATED: "EXIF orientation other than upright",
    CORRUPT: "corrupt",
}

_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_PNG_GREY = (0, 4)  # colour types: grey, grey with alpha
ORIENTATION = 0x0112  # the Exif tag
# The TIFF directory entry of tag 0x0112 (one value of type short or long): 1 is upright, 2 to 8 are not.
# Searched as bytes within the Exif segment: 1 µs, where parsing the directories takes 60 µs.
_ROTATED = re.compile(
    rb"\x01\x12\x00(?:\x03\x00\x00\x00\x01\x00|\x04\x00\x00\x00\x01\x00\x00\x00)[\x02-\x08]"
    rb"|\x12\x01(?:\x03\x00\x01\x00\x00\x00[\x02-\x08]\x00|\x04\x00\x01\x00\x00\x00[\x02-\x08]\x00\x00\x00)"
)


class ImageInfo(NamedTuple):
    """Size and flags of an image, in the field order of `FACTS`."""

    width: int  # px
    height: int
    flags: int


def peek(head: bytes, tail: bytes) -> ImageInfo | None:
    """Return the info of an image from its first and last bytes, or None if they are not conclusive.

    Args:
        head: the first `HEAD` bytes of the file, or all bytes of a shorter file.
        tail: the last bytes of the file.
    """
    info = _peek(head, tail)
    if info and info.width * info.height > MAX_PIXELS:
        return ImageInfo(0, 0, CORRUPT)
    return info and _clipped_info(*info)


def _peek(head: bytes, tail: bytes) -> ImageInfo | None:
    if head.startswith(jpeg_header.SOI):
        return _peek_jpeg(head) if jpeg_header.has_end_marker(tail) else None
    if len(head) > 25 and head[:8] == _PNG and tail[-8:] == _PNG_END and head[12:16] == b"IHDR":
        grey = GREY if head[25] in _PNG_GREY else 0
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        pixels = head.find(b"IDAT")
        if pixels < 0 and len(head) != HEAD:  # these are all bytes, so there are no pixels
            return None
        # Exif behind a long colour profile is not counted: to find it, the whole image would be read.
        rotated = _is_rotated_png(head, pixels if pixels >= 0 else len(head))
        rotated = rotated or _is_rotated_png(tail, len(tail))
        return ImageInfo(width, height, PNG | grey | (ROTATED if rotated else 0))
    return None


def _is_rotated_png(part: bytes, end: int) -> bool:
    """Whether there is an orientation other than upright in the Exif of a part of a PNG.

    Exif behind the pixels is found if it begins in the last bytes that are read.
    """
    begin = part.find(b"eXIf", 0, end)
    return begin >= 0 and _ROTATED.search(part, begin, end) is not None


def inspect(data: bytes) -> ImageInfo:
    """Return the info of an image from all its bytes; `flags` has CORRUPT if it cannot be decoded."""
    return peek(data, data) or _decode_info(data)


def decode_error(data: bytes) -> str:
    """Decode an image and return the error message, or an empty string on success."""
    from hpc_imagenet.data.images import pillow

    try:
        with pillow.open_image(io.BytesIO(data)) as image:
            pillow.load(image)
    except pillow.ERRORS as error:
        return pillow.reason(error)
    return ""


def peek_many(
    data: npt.NDArray[np.uint8], begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Return the facts of many JPEGs at once, with the result of `peek`; see `jpeg_header.find_frames`.

    Returns:
        facts, shape [images], dtype `FACTS`; the width is 0 where the bytes are not conclusive.
    """
    facts = np.zeros(len(begins), FACTS)
    frames = jpeg_header.find_frames(data, begins, lengths)
    rows = np.flatnonzero(frames)
    frames = frames[rows]
    height, width = (data[frames + i].astype(np.uint16) << 8 | data[frames + i + 1] for i in (5, 7))
    components = data[frames + 9]
    flags = np.where(components == 1, GREY, np.where(components == 3, 0, CMYK))
    flags |= np.where(data[frames + 1] & 3 == 2, PROGRESSIVE, 0)  # C2, C6, CA and CE
    facts["height"][rows], facts["width"][rows], facts["marks"][rows] = height, width, flags
    pixels = height.astype(np.int64) * width
    facts[rows[(pixels == 0) | (pixels > MAX_PIXELS)]] = 0  # left to `peek`
    return facts


def _peek_jpeg(head: bytes) -> ImageInfo | None:
    """Parse a JPEG up to its frame header; None if the frame header is not in `head`."""
    flags = 0
    try:
        for marker, begin, end in jpeg_header.segments(head):
            if marker in jpeg_header.FRAMES:
                width, height, components = jpeg_header.frame_size(head, begin)
                if components != 3:
                    flags |= GREY if components == 1 else CMYK
                if marker & 3 == 2:  # C2, C6, CA and CE
                    flags |= PROGRESSIVE
                return ImageInfo(width, height, flags) if width and height else None
            is_exif = marker == jpeg_header.APP1 and head[begin + 4 : begin + 8] == b"Exif"
            if is_exif and _ROTATED.search(head, begin, end):
                flags |= ROTATED
    except IndexError:
        pass
    return None


def _decode_info(data: bytes) -> ImageInfo:
    from hpc_imagenet.data.images import pillow

    try:
        with pillow.open_image(io.BytesIO(data)) as image:
            pillow.load(image)
            flags = {"JPEG": 0, "MPO": 0, "PNG": PNG}.get(image.format or "", OTHER)
            flags |= {"1": GREY, "L": GREY, "LA": GREY, "I;16": GREY, "CMYK": CMYK}.get(image.mode, 0)
            flags |= PROGRESSIVE if image.info.get("progressive") else 0
            flags |= ROTATED if pillow.exif_orientation(image) in range(2, 9) else 0
            return _clipped_info(image.width, image.height, flags)
    except pillow.ERRORS:
        return ImageInfo(0, 0, CORRUPT)


def _clipped_info(width: int, height: int, flags: int) -> ImageInfo:
    limit = np.iinfo(FACTS["width"]).max
    return ImageInfo(min(width, limit), min(height, limit), flags)
