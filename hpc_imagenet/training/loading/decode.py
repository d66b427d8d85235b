"""Decode an image or a part of it, with the same pixels as Pillow, but faster.

JPEGs are decoded by libjpeg-turbo, through simplejpeg. Most of the time goes to the entropy decoder, which
must read every bit before the last one needed. So a JPEG is cut before it is decoded, without changing the
pixels:

- with restart markers (written by process.tile), the segments that cover the part form a smaller JPEG, if
  they spare more decoding than splicing them costs;
- otherwise the height in the header is lowered to the lower edge of the part.

Everything else (PNG, GIF, CMYK …, errors) is decoded by Pillow, which decides whether an image is corrupt.
"""

from __future__ import annotations

import contextlib
import io
import threading
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from hpc_imagenet.data.images import pillow
from hpc_imagenet.data.images.image_header import MAX_PIXELS
from hpc_imagenet.data.images.jpeg_header import EOI, RST0, JpegHeader, has_end_marker, read_header
from hpc_imagenet.training.loading.crop import Box

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB
Item = TypeVar("Item", np.uint8, np.bool_)

_MARGIN = 2  # px beyond an edge that chroma upsampling reads
_NARROWEST = 5  # px: libjpeg-turbo upsamples the chroma of narrower images in another way
_MIN_SPARED = 12_000  # bytes; decoding fewer takes less time than splicing does
# Indexed by the byte after an FF: 00 is a stuffed FF, and FF is a fill byte; all others are markers.
_IS_MARKER = np.array([0 < code < 0xFF for code in range(256)])
_scratch = threading.local()


class EncodedImage:
    """An encoded image whose header has been read.

    Args:
        data: bytes of the file.

    Attributes:
        width: px.
        height: px.
        plain: whether it is a complete JPEG that any decoder supports: grey or YCbCr, 8 bits, Huffman-coded.

    Raises:
        ValueError: the data is not an image.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._decoded: Image.Image | None = None
        self._frame = read_header(data)
        self.plain = self._frame is not None and not self._frame.rgb and has_end_marker(data)
        if self._frame:
            self.width, self.height = self._frame.width, self._frame.height
            if self.width * self.height > MAX_PIXELS:  # the buffer of its pixels would take 13 GB
                raise ValueError(f"{self.width} x {self.height} px, more than {MAX_PIXELS} in all")
        else:
            self._decoded = _pillow(data)
            self.width, self.height = self._decoded.size

    def pixels(self, box: Box) -> Pixels:
        """Return the pixels within `box`, shape [lower - upper, right - left, 3].

        The result may be a view of a buffer that the next call in the same thread overwrites.

        Raises:
            ValueError: the image cannot be decoded.
        """
        left, upper, right, lower = box
        if self._frame and self._decoded is None:
            # On a warning of libjpeg-turbo, Pillow decides whether the image is corrupt.
            with contextlib.suppress(ValueError):
                decoded, x, y = _decode_part(self._data, self._frame, box)
                return decoded[upper - y : lower - y, left - x : right - x]
        if self._decoded is None:
            self._decoded = _pillow(self._data)
        return np.array(self._decoded)[upper:lower, left:right]


def _decode_part(data: bytes, frame: JpegHeader, box: Box) -> tuple[Pixels, int, int]:
    """Decode a part of a JPEG that contains `box`; return its pixels and its x and y in the image (px)."""
    if frame.single:
        if frame.restart and (spliced := _splice(data, frame, box)):
            return spliced
        height = -(-(box[3] + _MARGIN) // frame.block[1]) * frame.block[1]
        if height < frame.height:
            if not has_end_marker(data):
                raise ValueError("truncated")
            shortened = bytearray(data)
            shortened[frame.at : frame.at + 2] = height.to_bytes(2, "big")
            # strict=False suppresses the warning about extra data after the last row.
            return _decode_jpeg(shortened, frame.width, height, strict=False), 0, 0
    return _decode_jpeg(data, frame.width, frame.height), 0, 0


def _splice(data: bytes, frame: JpegHeader, box: Box) -> tuple[Pixels, int, int] | None:
    """Decode a JPEG made of the segments that cover `box`.

    Returns:
        pixels with their x and y in the image (px); None if segments span rows or are damaged, or if lowering
        the height takes less time.
    """
    block_width, block_height = frame.block
    blocks, rows = -(-frame.width // block_width), -(-frame.height // block_height)
    columns, remainder = divmod(blocks, frame.restart)
    if remainder:
        return None
    step = block_width * frame.restart  # px: width of a segment
    left = max(0, min(box[0] - _MARGIN, frame.width - _NARROWEST)) // step
    right = min(columns, -(-(box[2] + _MARGIN) // step))
    upper = max(0, box[1] - _MARGIN) // block_height
    lower = min(rows, -(-(box[3] + _MARGIN) // block_height))
    spared = lower * columns - (lower - upper) * (right - left)
    if spared * (len(data) - frame.scan) < _MIN_SPARED * rows * columns:
        return None

    scan = np.frombuffer(data, np.uint8, offset=frame.scan)
    is_ff = np.equal(scan[:-1], 0xFF, out=_buffer("is_ff", len(scan) - 1, np.bool_))
    after = np.flatnonzero(is_ff) + 1
    ends = after[_IS_MARKER[scan[after]]][: columns * rows] + 1
    if len(ends) < columns * rows:
        return None  # damaged
    # Restart markers are numbered modulo 8; the last segment ends with the end marker.
    numbers = RST0 + np.arange(len(ends), dtype=np.uint8) % 8
    numbers[-1] = EOI[1]
    if (scan[ends - 1] != numbers).any():
        return None

    end = ends.reshape(rows, columns)
    begin = np.zeros_like(end)
    begin.ravel()[1:] = ends[:-1]
    lengths = (end - begin)[upper:lower, left:right].ravel()
    row_ranges = zip(begin[upper:lower, left].tolist(), end[upper:lower, right - 1].tolist(), strict=True)
    header = bytearray(data[: frame.scan])
    width = min(frame.width, right * step) - left * step
    height = min(frame.height, lower * block_height) - upper * block_height
    header[frame.at : frame.at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    parts = [scan[first:last] for first, last in row_ranges]
    spliced = np.concatenate([np.frombuffer(header, np.uint8), *parts])
    spliced[len(header) + np.cumsum(lengths) - 1] = numbers[: len(lengths)]
    spliced[-1] = EOI[1]
    return _decode_jpeg(spliced, width, height), left * step, upper * block_height


def _decode_jpeg(data: bytes | bytearray | Pixels, width: int, height: int, strict: bool = True) -> Pixels:
    """Decode a whole JPEG into a buffer of this thread."""
    buffer = _buffer("pixels", 3 * width * height, np.uint8)
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=strict)
    return pixels


def _buffer(name: str, items: int, kind: type[Item]) -> npt.NDArray[Item]:
    """Return a buffer of this thread that is reused by each call with this name: allocation is slow."""
    buffer: npt.NDArray[Item] | None = getattr(_scratch, name, None)
    if buffer is None or len(buffer) < items:
        buffer = np.empty(items, kind)
        setattr(_scratch, name, buffer)
    return buffer[:items]


def _pillow(data: bytes) -> Image.Image:
    try:
        return pillow.to_rgb(Image.open(io.BytesIO(data)))
    except pillow.ERRORS as error:
        raise ValueError(pillow.reason(error)) from None
