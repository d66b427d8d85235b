"""From an image's bytes to its pixels, or to those of a part of it; the same as Pillow's, and faster.

JPEGs are decoded by libjpeg-turbo, by way of simplejpeg. Decoding is bound by the entropy decoder, which has
to read every bit before the last one that is wanted. So a JPEG is cut before it is decoded, with the same
pixels as a result:

- with restart markers (process.tile writes them) the segments that cover the part become a JPEG of their own;
- without them the height in its header is lowered to the lower edge of the part.

Whatever is unusual, a PNG, CMYK or an error, goes to Pillow, which has the last word on what is corrupt.
Source: ITU-T T.81 annex B (markers), B.2.4.4 (restart intervals), A.2.3 (order of the blocks).
"""

from __future__ import annotations

import contextlib
import io
import threading
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from hpc_imagenet.training.loading.crop import Box

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB
Item = TypeVar("Item", np.uint8, np.bool_)

_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of Pillow
_SOI, _SOS, _DRI, _RST, _EOI = b"\xff\xd8", 0xDA, 0xDD, 0xD0, 0xD9
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2  # Huffman-coded frames
_APP14 = 0xEE  # Adobe's marker says whether colours are transformed (T.872, 6.5.3)
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # within C0 to CF those that begin no frame
_TAIL = 4096  # bytes: so far from the end of the file a JPEG's end mark may lie
_MARGIN = 2  # px beyond an edge that the smoothing of the colours looks at
# By the byte that follows an FF: 00 makes it a plain FF, and another FF fills; all else is a marker.
_IS_MARKER = np.array([0 < code < 0xFF for code in range(256)])
_scratch = threading.local()


class _Frame(NamedTuple):
    """What the header of a JPEG says."""

    width: int  # px
    height: int
    at: int  # byte offset of the height, 2 bytes; the width follows
    block: tuple[int, int]  # px: width and height of what is coded together
    restart: int  # blocks between two restart markers; 0: there are none
    scan: int  # byte offset of the first scan's data
    single: bool  # whether that scan is all there is, top to bottom
    rgb: bool  # whether its components are red, green and blue, which nvJPEG may take for YCbCr


class EncodedImage:
    """An image that is not decoded yet.

    Args:
        data: a file's bytes.

    Attributes:
        width: px.
        height: px.
        plain: whether it is a JPEG that any decoder takes, and not cut off: grey or YCbCr, 8 bits,
            Huffman-coded.

    Raises:
        ValueError: it is no image.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._picture: Image.Image | None = None
        self._frame = _frame(data)
        self.plain = self._frame is not None and not self._frame.rgb and _ends(data)
        if self._frame:
            self.width, self.height = self._frame.width, self._frame.height
        else:
            self._picture = _pillow(data)
            self.width, self.height = self._picture.size

    def pixels(self, box: Box) -> Pixels:
        """Return the pixels within `box`, shape [lower - upper, right - left, 3].

        They may lie in memory that the next call in the same thread writes to.

        Raises:
            ValueError: it cannot be decoded.
        """
        left, upper, right, lower = box
        if self._frame and self._picture is None:
            # What libjpeg-turbo warns of, Pillow judges.
            with contextlib.suppress(ValueError):
                whole, x, y = _part(self._data, self._frame, box)
                return whole[upper - y : lower - y, left - x : right - x]
        if self._picture is None:
            self._picture = _pillow(self._data)
        return np.array(self._picture)[upper:lower, left:right]


def _part(data: bytes, frame: _Frame, box: Box) -> tuple[Pixels, int, int]:
    """Decode a part of a JPEG that holds `box`; return it, and where in the picture it begins (px: x, y)."""
    if frame.single:
        if frame.restart and (spliced := _splice(data, frame, box)):
            return spliced
        lowest = -(-(box[3] + _MARGIN) // frame.block[1]) * frame.block[1]
        if lowest < frame.height:
            if not _ends(data):
                raise ValueError("cut off")
            lower = bytearray(data)
            lower[frame.at : frame.at + 2] = lowest.to_bytes(2, "big")
            # The warning that is left out is of the data behind the lowest row.
            return _turbo(lower, frame.width, lowest, strict=False), 0, 0
    return _turbo(data, frame.width, frame.height), 0, 0


def _splice(data: bytes, frame: _Frame, box: Box) -> tuple[Pixels, int, int] | None:
    """Make a JPEG of the segments that cover `box`, and decode it; None where segments run over rows."""
    wide, high = frame.block
    across, down = -(-frame.width // wide), -(-frame.height // high)
    columns, rest = divmod(across, frame.restart)
    if rest:
        return None
    step = wide * frame.restart  # px: the width of a segment
    left, right = max(0, box[0] - _MARGIN) // step, min(columns, -(-(box[2] + _MARGIN) // step))
    upper, lower = max(0, box[1] - _MARGIN) // high, min(down, -(-(box[3] + _MARGIN) // high))

    scan = np.frombuffer(data, np.uint8, offset=frame.scan)
    after = np.flatnonzero(np.equal(scan[:-1], 0xFF, out=_memory("marks", len(scan) - 1, np.bool_))) + 1
    ends = after[_IS_MARKER[scan[after]]][: columns * down] + 1
    if len(ends) < columns * down:
        return None  # damaged
    # Markers count from 0 to 7 and again, and the last one is the end.
    numbers = _RST + np.arange(len(ends), dtype=np.uint8) % 8
    numbers[-1] = _EOI
    if (scan[ends - 1] != numbers).any():
        return None

    end = ends.reshape(down, columns)
    begin = np.zeros_like(end)
    begin.ravel()[1:] = ends[:-1]
    lengths = (end - begin)[upper:lower, left:right].ravel()
    rows = zip(begin[upper:lower, left].tolist(), end[upper:lower, right - 1].tolist(), strict=True)
    header = bytearray(data[: frame.scan])
    width, height = (
        min(frame.width, right * step) - left * step,
        min(frame.height, lower * high) - upper * high,
    )
    header[frame.at : frame.at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    parts = [scan[first:last] for first, last in rows]
    spliced = np.concatenate([np.frombuffer(header, np.uint8), *parts])
    spliced[len(header) + np.cumsum(lengths) - 1] = numbers[: len(lengths)]
    spliced[-1] = _EOI
    return _turbo(spliced, width, height), left * step, upper * high


def _turbo(data: bytes | bytearray | Pixels, width: int, height: int, strict: bool = True) -> Pixels:
    """Decode all of a JPEG into this thread's memory."""
    buffer = _memory("pixels", 3 * width * height, np.uint8)
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=strict)
    return pixels


def _memory(name: str, items: int, kind: type[Item]) -> npt.NDArray[Item]:
    """Return memory of this thread, the same again at the next call by that name: fresh memory is slow."""
    kept: npt.NDArray[Item] | None = getattr(_scratch, name, None)
    if kept is None or len(kept) < items:
        kept = np.empty(items, kind)
        setattr(_scratch, name, kept)
    return kept[:items]


def _pillow(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except _ERRORS as error:
        raise ValueError(str(error).split(" <_io")[0]) from None  # Pillow names the buffer it was given


def _ends(data: bytes) -> bool:
    return data.rfind(b"\xff\xd9", -_TAIL) >= 0


def _frame(data: bytes) -> _Frame | None:
    """Read the header of a JPEG up to its first scan; None where it is another image or an unusual one."""
    if data[:2] != _SOI:
        return None
    at, restart, found, adobe = 2, 0, 0, False
    try:
        while True:
            if data[at] != 0xFF:
                return None
            marker = data[at + 1]
            if marker == 0xFF:  # fill bytes may stand before any marker
                at += 1
                continue
            end = at + 2 + (data[at + 2] << 8 | data[at + 3])
            if marker == _SOS:
                break
            if marker == _DRI:
                restart = data[at + 4] << 8 | data[at + 5]
            elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
                if marker not in (*_SEQUENTIAL, _PROGRESSIVE) or found:
                    return None
                found = at
            elif marker == _APP14 and data[at + 4 : at + 9] == b"Adobe":
                adobe = data[at + 15] == 0  # the transform: none
            elif not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
                return None
            at = end
        if not found or data[found + 4] != 8:  # bits a sample
            return None
        components = data[found + 9]
        height, width = data[found + 5] << 8 | data[found + 6], data[found + 7] << 8 | data[found + 8]
        if components not in (1, 3) or not width or not height:
            return None
        # A single component's blocks are of 8 px, whatever its factors say.
        factors = [data[found + 11 + 3 * i] for i in range(components)] if components > 1 else [0x11]
        block = 8 * max(f >> 4 for f in factors), 8 * max(f & 15 for f in factors)
        single = data[found + 1] in _SEQUENTIAL and data[at + 4] == components
        ids = bytes(data[found + 10 + 3 * i] for i in range(components))
        rgb = components == 3 and (adobe or ids == b"RGB")
        return _Frame(width, height, found + 5, block, restart, end, single, rgb)
    except IndexError:
        return None
