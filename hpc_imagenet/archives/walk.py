"""Every image of one flat tar: its name, address, size and oddities, at one `pread` of 4 kB an image.

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

from hpc_imagenet.archives import picture
from hpc_imagenet.archives.picture import FACTS, HEAD
from hpc_imagenet.archives.tar import BLOCK, members
from hpc_imagenet.errors import UserError

# What torchvision's ImageFolder takes for an image: a file of another kind would shift the labels of val.
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MOST = (1 << 32) - 1  # bytes of an image: what an index holds
AT_ONCE = 512  # images: 2 MB of blocks, which stay in a core's cache

_READ = BLOCK + BLOCK + HEAD  # the end of the image before, the header, the beginning of the image
_SIZE = slice(BLOCK + 124, BLOCK + 135)  # of the member, in octal digits
_WEIGHTS = 8 ** np.arange(5, -1, -1)

Array = npt.NDArray[Any]


class Found(NamedTuple):
    """The images of a tar, in its order; each array of shape [images]."""

    names: Array  # bytes: file names without folders
    offsets: Array  # i8: of the first byte, in the file that holds the tar
    lengths: Array  # i8: bytes
    facts: Array  # dtype FACTS


def find(descriptor: int, begin: int, end: int, where: str) -> Found:
    """Find the images of the tar in bytes [begin, end) of an open file.

    Args:
        descriptor: an open file.
        begin: its byte where the tar begins.
        end: the byte behind the tar's last.
        where: what an error calls the tar.

    Raises:
        UserError: as `tar.members`; no image in it, or something that is none.
    """
    parts = _plain(descriptor, begin, end)
    if parts is None:
        parts = [_careful(descriptor, begin, end, where)]
    found = Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if not len(found.names):
        raise UserError(f"{where}: an empty archive")
    for i in np.flatnonzero((found.lengths < 1) | (found.lengths > MOST)).tolist():
        name = os.fsdecode(found.names[i])
        raise UserError(f"{where}: {name} has {found.lengths[i]} bytes: an image has 1 to {MOST}")
    return found


def _careful(descriptor: int, begin: int, end: int, where: str) -> Found:
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
        facts[i] = _settle(descriptor, offset, length, head)
    return Found(np.array(names, "S"), np.array(offsets, np.int64), np.array(lengths, np.int64), facts)


def _settle(descriptor: int, offset: int, length: int, head: bytes) -> picture.Look:
    tail = os.pread(descriptor, min(length, BLOCK), offset + max(0, length - BLOCK))
    look = picture.glance(head, tail) if length else picture.Look(0, 0, picture.CORRUPT)
    return look or picture.examine(os.pread(descriptor, length, offset))


def _plain(descriptor: int, begin: int, end: int) -> list[Found] | None:
    """Walk a tar of nothing but plain headers; None where it is another one."""
    parts: list[Found] = []
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
        endings = {name.rpartition(b".")[2] for name in listed}
        if len(seen) < images or not all(f".{os.fsdecode(one).lower()}" in IMAGES for one in endings):
            return None
        parts.append(Found(names, offsets[:-1], lengths, _facts(descriptor, blocks, offsets, lengths)))
    return parts


def _batches(descriptor: int, begin: int, end: int) -> Iterator[tuple[Array, Array, Array, bool]]:
    """Follow the sizes from header to header, checking nothing, up to the first that has none.

    Yields:
        blocks of shape [images + 1, bytes], the last of which is that of the header behind the images;
        where the data of each begin; the images' lengths; and whether no image follows.
    """
    buffer, rows = _memory(AT_ONCE + 1)
    preadv = os.preadv
    at, row = begin, 0
    places: list[int] = []
    lengths: list[int] = []
    while True:
        skip = BLOCK if at < BLOCK else 0  # nothing lies before the first header of a file
        got = preadv(descriptor, [rows[row][skip:] if skip else rows[row]], at - BLOCK + skip) + skip
        if got < _READ:
            rows[row][got:] = bytes(_READ - got)
        places.append(at + BLOCK)
        try:
            length = int(bytes(rows[row][_SIZE]), 8)
        except ValueError:
            length = -1
        last = length < 0 or at >= end
        if last or row == AT_ONCE:
            yield buffer[: row + 1], np.array(places, np.int64), np.array(lengths, np.int64), last
            if last:
                return
            buffer[0] = buffer[row]
            row, places, lengths = 0, places[-1:], []
        lengths.append(length)
        at += BLOCK + length + -length % BLOCK
        row += 1


@functools.cache
def _memory(blocks: int) -> tuple[Array, list[memoryview]]:
    """Return one buffer for all batches of a process: fresh memory would cost as much as the reading."""
    buffer = np.zeros((blocks, _READ), np.uint8)
    return buffer, [memoryview(row) for row in buffer]  # type: ignore[arg-type]


def _names(headers: Array) -> Array | None:
    """Return the names in `headers`, shape [images, 512]; None if one of them is not plain."""
    sums = headers.sum(1, dtype=np.int64) - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    digits = headers[:, 148:154].astype(np.int64) - ord("0")
    names = headers[:, :100]
    used = names != 0
    plain = (
        ((headers[:, 156] == 0) | (headers[:, 156] == ord("0")))  # a file
        & (headers[:, 345] == 0)  # no prefix
        & ((headers[:, 135] == 0) | (headers[:, 135] == ord(" ")))  # the size has ended
        & (headers[:, 154] == 0)
        & ((digits >= 0) & (digits < 8)).all(1)
        & (sums == digits @ _WEIGHTS)
        & used[:, 0]
        & (used[:, :-1] >= used[:, 1:]).all(1)  # nothing behind the first NUL
        & (names != ord("/")).all(1)
    )
    return np.ascontiguousarray(names).view("S100")[:, 0] if plain.all() else None


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
        facts[i] = _settle(descriptor, offset, length, head)
    return facts


def _read_frames(flat: Array, here: Array, facts: Array, rows: Array) -> None:
    facts["height"][rows] = flat[here + 5].astype(np.uint16) << 8 | flat[here + 6]
    facts["width"][rows] = flat[here + 7].astype(np.uint16) << 8 | flat[here + 8]
    components = flat[here + 9]
    marks = np.where(components == 1, picture.GREY, np.where(components == 3, 0, picture.CMYK))
    marks |= np.where(flat[here + 1] & 3 == 2, picture.PROGRESSIVE, 0)
    facts["marks"][rows] = marks
