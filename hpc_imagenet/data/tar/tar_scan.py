"""Every image of one flat tar: its name, address, size and oddities, at one `pread` of 2 kB an image.

That block takes in what lies around a header: the last bytes of the image before, and the first of the next.
1.28 million rounds are needed for ImageNet, so the usual form of a tar (nothing but plain ustar or GNU
headers of files, no folders) is walked by its sizes alone, and hundreds of headers are then checked at once.
Whatever is not of that form, damage too, is left to `tar.members`, which says what it is; so every error has
one source.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.images.image_header import FACTS, HEAD
from hpc_imagenet.data.tar.tar_reader import BLOCK, members
from hpc_imagenet.errors import UserError

# What torchvision's ImageFolder takes for an image: a file of another kind would shift the labels of val.
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MOST = (1 << 32) - 1  # bytes of an image: what an index holds
AT_ONCE = 512  # images: 1 MB of blocks, which stays in a core's cache

_READ = BLOCK + BLOCK + HEAD  # the end of the image before, the header, the beginning of the image
_SIZE = slice(BLOCK + 124, BLOCK + 135)  # of the member, in octal digits
_WEIGHTS = 8 ** np.arange(5, -1, -1)

Array = npt.NDArray[Any]


class ImageEntries(NamedTuple):
    """The images of a tar, in its order; each array of shape [images]."""

    names: Array  # bytes: file names without folders
    offsets: Array  # i8: of the first byte, in the file that holds the tar
    lengths: Array  # i8: bytes
    facts: Array  # dtype FACTS


def find_images(descriptor: int, begin: int, end: int, where: str) -> ImageEntries:
    """Find the images of the tar in bytes [begin, end) of an open file.

    Args:
        descriptor: an open file.
        begin: its byte where the tar begins.
        end: the byte behind the tar's last.
        where: what an error calls the tar.

    Raises:
        UserError: as `tar.members`; no image in it, or something that is none.
    """
    parts = _scan_fast(descriptor, begin, end)
    if parts is None:
        parts = [_scan_any(descriptor, begin, end, where)]
    found = ImageEntries(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if not len(found.names):
        raise UserError(f"{where}: an empty archive")
    for i in np.flatnonzero((found.lengths < 1) | (found.lengths > MOST)).tolist():
        name = os.fsdecode(found.names[i])
        raise UserError(f"{where}: {name} has {found.lengths[i]} bytes: an image has 1 to {MOST}")
    return found


def _scan_any(descriptor: int, begin: int, end: int, where: str) -> ImageEntries:
    """Walk a tar of any form."""
    found = []
    for member in members(descriptor, begin, end, where):
        if not member.name.lower().endswith(IMAGES):
            raise UserError(f"{where}: holds {member.name}, which is no image ({' '.join(IMAGES)})")
        name = os.fsencode(posixpath.basename(member.name))
        if len(name) > 255:
            raise UserError(f"{where}: holds the name {member.name}: a file's has 255 bytes at most")
        found.append((name, member.offset, member.length))
    names, offsets, lengths = zip(*found, strict=True) if found else ((b"",) * 0, (), ())
    facts = np.zeros(len(found), FACTS)
    for i, (_, offset, length) in enumerate(found):
        head = os.pread(descriptor, min(length, HEAD), offset)
        facts[i] = _inspect(descriptor, offset, length, head)
    return ImageEntries(np.array(names, "S"), np.array(offsets, np.int64), np.array(lengths, np.int64), facts)


def _inspect(descriptor: int, offset: int, length: int, head: bytes) -> image_header.ImageInfo:
    tail = os.pread(descriptor, min(length, BLOCK), offset + max(0, length - BLOCK))
    look = image_header.peek(head, tail) if length else image_header.ImageInfo(0, 0, image_header.CORRUPT)
    return look or image_header.inspect(os.pread(descriptor, length, offset))


def _scan_fast(descriptor: int, begin: int, end: int) -> list[ImageEntries] | None:
    """Walk a tar of nothing but plain headers; None where it is another one."""
    parts: list[ImageEntries] = []
    seen: set[bytes] = set()
    images = 0
    for blocks, offsets, lengths, last in _batches(descriptor, begin, end):
        if last and not (
            int(offsets[-1]) + BLOCK <= end and not blocks[-1, BLOCK : 3 * BLOCK].any()  # the end mark
        ):
            return None
        names = _names(blocks[:-1, BLOCK : 2 * BLOCK])
        if names is None or (len(names) and offsets[-2] + lengths[-1] > end):
            return None
        listed = names.tolist()
        seen.update(listed)
        images += len(listed)
        if len(seen) < images or not _all_images(listed):
            return None
        parts.append(ImageEntries(names, offsets[:-1], lengths, _facts(descriptor, blocks, offsets, lengths)))
    return parts


def _batches(descriptor: int, begin: int, end: int) -> Iterator[tuple[Array, Array, Array, bool]]:
    """Follow the sizes from header to header, checking nothing, up to the first that has none.

    Yields:
        blocks of shape [images + 1, bytes], the last of which is that of the header behind the images;
        where the data of each begin; the images' lengths; and whether no image follows.
    """
    buffer, blocks, sizes = _memory(AT_ONCE + 1)
    preadv = os.preadv
    first = at = begin
    row = 0
    lengths: list[int] = []
    while True:
        if at >= BLOCK:
            got = preadv(descriptor, blocks[row], at - BLOCK)
        else:  # nothing lies before the first header of a file
            got = preadv(descriptor, [blocks[row][0][BLOCK:]], at) + BLOCK
        if got < _READ:
            buffer[row, got:] = 0
        try:
            length = int(sizes[row].tobytes(), 8)
        except ValueError:
            length = -1
        last = length < 0 or at >= end
        if last or row == AT_ONCE:
            known = np.array(lengths, np.int64)
            places = np.concatenate([[0], np.cumsum(known + -known % BLOCK + BLOCK)]) + first + BLOCK
            yield buffer[: row + 1], places, known, last
            if last:
                return
            buffer[0] = buffer[row]
            first, row, lengths = at, 0, []
        lengths.append(length)
        at += BLOCK + length + -length % BLOCK
        row += 1


@functools.cache
def _memory(count: int) -> tuple[Array, list[list[memoryview]], list[memoryview]]:
    """Return the memory for `count` blocks, as preadv wants each, and where in each a member's size is.

    One for all batches of a process: fresh memory, and views of it, would cost as much as the reading.
    """
    buffer = np.zeros((count, _READ), np.uint8)
    blocks = [memoryview(block) for block in buffer]  # type: ignore[arg-type]
    return buffer, [[block] for block in blocks], [block[_SIZE] for block in blocks]


def _all_images(names: list[bytes]) -> bool:
    """Whether all names end as an image's does."""
    usual = b".JPEG"
    joined = b"/".join(names) + b"/"
    if joined.count(usual + b"/") == len(names):
        return True
    endings = {name.rpartition(b".")[2] for name in names}
    return all(f".{os.fsdecode(ending).lower()}" in IMAGES for ending in endings)


def _names(headers: Array) -> Array | None:
    """Return the names in `headers`, shape [images, 512]; None if one of them is not plain."""
    kind, ending = headers[:, 156], headers[:, 135]
    digits = headers[:, 148:154] - ord("0")  # of the checksum; below "0" wraps to more than 7
    if (
        headers[:, 345:].any()  # a prefix, or what some old tars kept there
        or not ((kind == 0) | (kind == ord("0"))).all()  # no file
        or not ((ending == 0) | (ending == ord(" "))).all()  # the size has not ended
        or headers[:, 154].any()
        or (digits > 7).any()
    ):
        return None
    sums = headers[:, :345].sum(1, dtype=np.uint32) - headers[:, 148:156].sum(1, dtype=np.uint32)
    names = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0]
    joined = b"".join(names.tolist())
    if (
        not (sums + 8 * ord(" ") == digits @ _WEIGHTS).all()  # in its own sum the checksum is spaces
        or b"/" in joined
        or b"\0" in joined  # something stands behind the end of a name
        or not headers[:, 0].all()
    ):
        return None
    return names


# What a marker is: a segment of known length, a frame header, possibly Exif; 0 is all that ends a walk.
_SEGMENT, _FRAME, _APP1 = 1, 2, 3
_KINDS = np.zeros(256, np.uint8)
_KINDS[0xC0:0xFF] = _SEGMENT
_KINDS[0xC0:0xD0] = _FRAME
_KINDS[[0xC4, 0xCC]] = _SEGMENT
_KINDS[[0xC8, *range(0xD0, 0xDB)]] = 0
_KINDS[0xE1] = _APP1
_MARKERS = 16  # in front of the frame header; more are left to `picture.glance`


def _facts(descriptor: int, blocks: Array, offsets: Array, lengths: Array) -> Array:
    """Look at all images of a batch at once; the same as `picture.glance`, for JPEGs of the usual form."""
    facts = np.zeros(len(lengths), FACTS)
    flat = blocks.reshape(-1)
    begins = np.arange(len(lengths)) * _READ + 2 * BLOCK
    ends = begins - 2 * BLOCK + _READ + (lengths - 1) % BLOCK  # the last byte, in the block that follows
    usual = (flat[begins] == 0xFF) & (flat[begins + 1] == 0xD8) & (lengths > 1)
    usual &= (flat[ends] == 0xD9) & (flat[ends - 1] == 0xFF) & (lengths % BLOCK != 1)
    rows, at = np.flatnonzero(usual), np.full(len(lengths), 2)
    settled = np.zeros(len(lengths), bool)
    for _ in range(_MARKERS):
        rows = rows[at[rows] + 10 <= np.minimum(lengths[rows], HEAD)]
        if not len(rows):
            break
        here = begins[rows] + at[rows]
        kinds = np.where(flat[here] == 0xFF, _KINDS[flat[here + 1]], 0)
        kinds[(kinds == _APP1) & (flat[here + 4] != ord("E"))] = _SEGMENT
        frame, on = kinds == _FRAME, kinds == _SEGMENT
        _read_frames(flat, here[frame], facts, rows[frame])
        settled[rows[frame]] = True
        here, rows = here[on], rows[on]
        at[rows] += 2 + (flat[here + 2].astype(np.int64) << 8 | flat[here + 3])
    settled &= (facts["width"] > 0) & (facts["height"] > 0)
    for i in np.flatnonzero(~settled).tolist():
        offset, length = int(offsets[i]), int(lengths[i])
        head = flat[begins[i] : begins[i] + min(length, HEAD)].tobytes()
        facts[i] = _inspect(descriptor, offset, length, head)
    return facts


def _read_frames(flat: Array, here: Array, facts: Array, rows: Array) -> None:
    facts["height"][rows] = flat[here + 5].astype(np.uint16) << 8 | flat[here + 6]
    facts["width"][rows] = flat[here + 7].astype(np.uint16) << 8 | flat[here + 8]
    components = flat[here + 9]
    marks = np.where(components == 1, image_header.GREY, np.where(components == 3, 0, image_header.CMYK))
    marks |= np.where(flat[here + 1] & 3 == 2, image_header.PROGRESSIVE, 0)
    facts["marks"][rows] = marks
