"""Tar scan: name, byte offset, length and header facts of every image in a flat tar, 2 kB read per image.

One `pread` covers the tar header, the last bytes of the previous image and the first bytes of the next one.
ImageNet needs 1.28 million of them, so there are two scans. `_scan_fast` handles the common tar (only plain
ustar or GNU file headers, no folders): it follows the sizes and checks hundreds of headers at once in numpy.
Every other tar, including a damaged one, goes to `tar_reader.members`, the only source of error messages.
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
from hpc_imagenet.data.images.jpeg_header import EOI, SOI
from hpc_imagenet.data.tar.tar_reader import members
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import BLOCK, SIZE, plain_names

# The extensions that torchvision's ImageFolder accepts: any other file would shift the val labels.
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_IMAGE_BYTES = (1 << 32) - 1  # bytes of an image: the limit of the index format
BATCH_IMAGES = 512  # images per batch: 1 MB of blocks, which fits in a core's cache

_READ = BLOCK + BLOCK + HEAD  # end of the previous image, tar header, start of the image
_SIZE = slice(BLOCK + SIZE.start, BLOCK + SIZE.stop - 1)  # octal digits of the size field in what is read

Array = npt.NDArray[Any]


class ImageEntries(NamedTuple):
    """The images of a tar in archive order; each array has shape [images]."""

    names: Array  # bytes: file names without folders
    offsets: Array  # i8: byte offset in the file that contains the tar
    lengths: Array  # i8: bytes
    facts: Array  # dtype FACTS


def find_images(
    descriptor: int, begin: int, end: int, where: str, any_extension: bool = False
) -> ImageEntries:
    """Find the images of the tar in bytes [begin, end) of an open file.

    Args:
        descriptor: file descriptor of an open file.
        begin: byte offset of the tar in the file.
        end: byte offset just past the tar.
        where: name of the tar in error messages.
        any_extension: whether every file is an image, whatever its extension.

    Raises:
        UserError: see `tar_reader.members`; also if the tar is empty or contains a file that is not an image.
    """
    batches = _scan_fast(descriptor, begin, end, any_extension)
    if batches is None:
        batches = [_scan_any(descriptor, begin, end, where, any_extension)]
    found = ImageEntries(*(np.concatenate(columns) for columns in zip(*batches, strict=True)))
    if not len(found.names):
        raise UserError(f"{where}: an empty archive")
    for i in np.flatnonzero((found.lengths < 1) | (found.lengths > MAX_IMAGE_BYTES)).tolist():
        name = os.fsdecode(found.names[i])
        raise UserError(
            f"{where}: {name} has {found.lengths[i]} bytes; an image must have 1 to {MAX_IMAGE_BYTES} bytes"
        )
    return found


def _scan_any(descriptor: int, begin: int, end: int, where: str, any_extension: bool) -> ImageEntries:
    """Scan a tar of any format with `tar_reader.members`."""
    found = []
    for member in members(descriptor, begin, end, where):
        if not (any_extension or member.name.lower().endswith(IMAGES)):
            raise UserError(f"{where}: contains {member.name}, which is not an image ({' '.join(IMAGES)})")
        name = os.fsencode(posixpath.basename(member.name))
        if len(name) > 255:
            raise UserError(f"{where}: the file name {member.name} is longer than 255 bytes")
        found.append((name, member.offset, member.length))
    names, offsets, lengths = zip(*found, strict=True) if found else ((b"",) * 0, (), ())
    facts = np.zeros(len(found), FACTS)
    for i, (_, offset, length) in enumerate(found):
        head = os.pread(descriptor, min(length, HEAD), offset)
        facts[i] = _inspect(descriptor, offset, length, head)
    return ImageEntries(np.array(names, "S"), np.array(offsets, np.int64), np.array(lengths, np.int64), facts)


def _inspect(descriptor: int, offset: int, length: int, head: bytes) -> image_header.ImageInfo:
    tail = os.pread(descriptor, min(length, BLOCK), offset + max(0, length - BLOCK))
    info = image_header.peek(head, tail) if length else image_header.ImageInfo(0, 0, image_header.CORRUPT)
    return info or image_header.inspect(os.pread(descriptor, length, offset))


def _scan_fast(descriptor: int, begin: int, end: int, any_extension: bool) -> list[ImageEntries] | None:
    """Scan a tar that has only plain file headers; return None for any other tar."""
    batches: list[ImageEntries] = []
    seen: set[bytes] = set()
    images = 0
    for blocks, offsets, lengths, is_last in _batches(descriptor, begin, end):
        if is_last and not (
            int(offsets[-1]) + BLOCK <= end and not blocks[-1, BLOCK : 3 * BLOCK].any()  # the end marker
        ):
            return None
        names = plain_names(blocks[:-1, BLOCK : 2 * BLOCK])
        if names is None or (len(names) and offsets[-2] + lengths[-1] > end):
            return None
        batch_names = names.tolist()
        seen.update(batch_names)
        images += len(batch_names)
        if len(seen) < images or not (any_extension or _all_image_names(batch_names)):
            return None
        batches.append(
            ImageEntries(names, offsets[:-1], lengths, _batch_facts(descriptor, blocks, offsets, lengths))
        )
    return batches


def _batches(descriptor: int, begin: int, end: int) -> Iterator[tuple[Array, Array, Array, bool]]:
    """Step from header to header by their size fields, without checks, until a header has no valid size.

    Yields:
        blocks of shape [images + 1, bytes], the last one for the header after the images; byte offsets of
        the data after each header, shape [images + 1]; byte lengths of the images, shape [images]; whether
        this is the last batch.
    """
    buffer, blocks, sizes = _read_buffers(BATCH_IMAGES + 1)
    preadv = os.preadv
    batch_begin = position = begin
    row = 0
    lengths: list[int] = []
    while True:
        if position >= BLOCK:
            got = preadv(descriptor, blocks[row], position - BLOCK)
        else:  # a header at byte 0 has no block before it
            got = preadv(descriptor, [blocks[row][0][BLOCK:]], position) + BLOCK
        if got < _READ:
            buffer[row, got:] = 0
        try:
            length = int(sizes[row].tobytes(), 8)
        except ValueError:
            length = -1
        is_last = length < 0 or position >= end
        if is_last or row == BATCH_IMAGES:
            batch_lengths = np.array(lengths, np.int64)
            ends = np.cumsum(batch_lengths + -batch_lengths % BLOCK + BLOCK)
            offsets = np.concatenate([[0], ends]) + batch_begin + BLOCK
            yield buffer[: row + 1], offsets, batch_lengths, is_last
            if is_last:
                return
            buffer[0] = buffer[row]
            batch_begin, row, lengths = position, 0, []
        lengths.append(length)
        position += BLOCK + length + -length % BLOCK
        row += 1


@functools.cache
def _read_buffers(count: int) -> tuple[Array, list[list[memoryview]], list[memoryview]]:
    """Return a buffer of `count` blocks, the buffer list of each for preadv, and a view of each size field.

    Cached, because allocating the memory and its views for each batch would cost as much as the reads.
    """
    buffer = np.zeros((count, _READ), np.uint8)
    blocks = [memoryview(block) for block in buffer]  # type: ignore[arg-type]
    return buffer, [[block] for block in blocks], [block[_SIZE] for block in blocks]


def _all_image_names(names: list[bytes]) -> bool:
    """Whether all names have an image extension."""
    common = b".JPEG"
    joined = b"/".join(names) + b"/"
    if joined.count(common + b"/") == len(names):
        return True
    endings = {name.rpartition(b".")[2] for name in names}
    return all(f".{os.fsdecode(ending).lower()}" in IMAGES for ending in endings)


def _batch_facts(descriptor: int, blocks: Array, offsets: Array, lengths: Array) -> Array:
    """Return the header facts of the images of a batch.

    The headers of plain JPEGs are parsed all at once, those of other images one by one.
    """
    flat = blocks.reshape(-1)
    begins = np.arange(len(lengths)) * _READ + 2 * BLOCK
    ends = begins - 2 * BLOCK + _READ + (lengths - 1) % BLOCK  # the last byte, in the next block
    is_jpeg = (flat[begins] == SOI[0]) & (flat[begins + 1] == SOI[1]) & (lengths > 1)
    is_jpeg &= (flat[ends] == EOI[1]) & (flat[ends - 1] == EOI[0]) & (lengths % BLOCK != 1)
    facts = image_header.peek_many(flat, begins, np.where(is_jpeg, np.minimum(lengths, HEAD), 0))
    for i in np.flatnonzero(facts["width"] == 0).tolist():
        offset, length = int(offsets[i]), int(lengths[i])
        head = flat[begins[i] : begins[i] + min(length, HEAD)].tobytes()
        facts[i] = _inspect(descriptor, offset, length, head)
    return facts
