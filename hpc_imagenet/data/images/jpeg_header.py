"""JPEG headers: the markers, and what decoding needs to know before the first scan.

A JPEG is a sequence of segments: FF, a marker, two bytes with the length of the segment, and its contents.
Source: ITU-T T.81 annex B (markers), B.2.4.4 (restart intervals), A.2.3 (order of the blocks); T.872, 6.5.3
(Adobe's marker).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # start and end of an image
SOS, DRI, RST0 = 0xDA, 0xDD, 0xD0  # start of a scan, restart interval, first of eight restart markers
APP1, APP14 = 0xE1, 0xEE  # Exif, Adobe
_SEQUENTIAL, _HUFFMAN = (0xC0, 0xC1), (0xC0, 0xC1, 0xC2)  # frames: one scan may hold all; Huffman-coded
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITH_LENGTH = frozenset((*range(0xC0, RST0), *range(SOS, 0xFF)))  # markers followed by a length
_TAIL = 4096  # bytes at the end of a file in which the end marker is searched

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


class JpegHeader(NamedTuple):
    """Header of a JPEG."""

    width: int  # px
    height: int
    at: int  # byte offset of the height, 2 bytes; the width follows
    block: tuple[int, int]  # px: width and height of an MCU (minimum coded unit)
    restart: int  # MCUs between two restart markers; 0: none
    scan: int  # byte offset of the first scan's data
    single: bool  # whether this scan holds the whole image, top to bottom
    rgb: bool  # components are red, green and blue; nvJPEG may decode them as YCbCr


def has_end_marker(data: bytes) -> bool:
    """Whether a file, or the last bytes of it, has an end marker: the image is not truncated."""
    return data.rfind(EOI, -_TAIL) >= 0


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, begin, end) of the segments up to the first start of a scan, or to invalid data.

    Raises:
        IndexError: the data ends between two segments, or inside the first bytes of one.
    """
    begin = len(SOI)
    while data[begin] == 0xFF:
        marker = data[begin + 1]
        if marker not in _WITH_LENGTH:
            if marker != 0xFF:
                return
            begin += 1  # any marker may be preceded by fill bytes
            continue
        end = begin + 2 + (data[begin + 2] << 8 | data[begin + 3])
        yield marker, begin, end
        if marker == SOS:
            return
        begin = end


def frame_size(data: bytes, begin: int) -> tuple[int, int, int]:
    """Return (width in px, height in px, number of components) of the frame header at byte `begin`."""
    return data[begin + 7] << 8 | data[begin + 8], data[begin + 5] << 8 | data[begin + 6], data[begin + 9]


def read_header(data: bytes) -> JpegHeader | None:
    """Read the header of a JPEG up to its first scan; None if it is unusual or not a JPEG."""
    if not data.startswith(SOI):
        return None
    frame = restart = sos = scan = 0
    adobe_rgb = False
    try:
        for marker, begin, end in segments(data):
            if marker == DRI:
                restart = data[begin + 4] << 8 | data[begin + 5]
            elif marker in FRAMES:
                if frame or marker not in _HUFFMAN:
                    return None
                frame = begin
            elif marker == APP14 and data[begin + 4 : begin + 9] == b"Adobe":
                adobe_rgb = data[begin + 15] == 0  # transform 0: none
            elif marker == SOS:
                sos, scan = begin, end
        if not frame or not scan or data[frame + 4] != 8:  # bits per sample
            return None
        width, height, components = frame_size(data, frame)
        if components not in (1, 3) or not width or not height:
            return None
        # With one component, an MCU is 8 x 8 px for any sampling factors.
        factors = [data[frame + 11 + 3 * i] for i in range(components)] if components > 1 else [0x11]
        block = 8 * max(f >> 4 for f in factors), 8 * max(f & 15 for f in factors)
        single = data[frame + 1] in _SEQUENTIAL and data[sos + 4] == components
        ids = bytes(data[frame + 10 + 3 * i] for i in range(components))
        rgb = components == 3 and (adobe_rgb or ids == b"RGB")
        return JpegHeader(width, height, frame + 5, block, restart, scan, single, rgb)
    except IndexError:
        return None


# Kinds of markers for `find_frames`. 0: stop here.
_SEGMENT, _FRAME, _EXIF = 1, 2, 3
_KINDS = np.zeros(256, np.uint8)
_KINDS[0xC0:0xFF] = _SEGMENT
_KINDS[[0xC8, *range(RST0, SOS + 1)]] = 0
_KINDS[list(FRAMES)] = _FRAME
_KINDS[APP1] = _EXIF
_MAX_SEGMENTS = 16  # before the frame header


def find_frames(data: Bytes, begins: Offsets, lengths: Offsets) -> Offsets:
    """Find the frame headers of many JPEGs at once.

    Args:
        data: bytes, shape [bytes].
        begins: offset of each JPEG in `data`, shape [images].
        lengths: number of bytes of each JPEG that are in `data`, shape [images]; 0: skip it.

    Returns:
        offset of each frame header in `data`, shape [images]. 0 if it is not in these bytes, or an Exif
        segment or more than 16 segments precede it.
    """
    frames = np.zeros(len(begins), np.int64)
    rows, position = np.arange(len(begins)), np.full(len(begins), len(SOI))
    for _ in range(_MAX_SEGMENTS):
        rows = rows[position[rows] + 10 <= lengths[rows]]
        if not len(rows):
            break
        markers = begins[rows] + position[rows]
        kinds = np.where(data[markers] == 0xFF, _KINDS[data[markers + 1]], 0)
        kinds[(kinds == _EXIF) & (data[markers + 4] != ord("E"))] = _SEGMENT
        is_frame, is_segment = kinds == _FRAME, kinds == _SEGMENT
        frames[rows[is_frame]] = markers[is_frame]
        markers, rows = markers[is_segment], rows[is_segment]
        position[rows] += 2 + (data[markers + 2].astype(np.int64) << 8 | data[markers + 3])
    return frames
