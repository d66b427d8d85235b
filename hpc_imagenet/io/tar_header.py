"""Tar headers: the layout of their fields, for the modules that read or write tars.

A tar is a sequence of blocks of 512 bytes. Each member is a header block and its data, filled with zeros up
to a multiple of 512; two zero blocks are the end marker.
Source: POSIX pax(1) "ustar Interchange Format", and GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import tarfile
from zlib import adler32

import numpy as np
import numpy.typing as npt

BLOCK = 512  # bytes
ZERO_BLOCK = bytes(BLOCK)
END = bytes(2 * BLOCK)  # the end marker

# Fields of a header, and the bytes of types and formats.
NAME, SIZE, CHECKSUM, PREFIX = slice(0, 100), slice(124, 136), slice(148, 156), slice(345, 500)
TYPE = 156
_LONG_NAME = b"L"[0]  # type of a GNU header whose data is the name of the next member
_MAGIC = slice(257, 263)
_POSIX = b"ustar\0"  # only this format has a name prefix
_OCTAL = 8 ** np.arange(5, -1, -1)  # weights of the six digits of a checksum


def has_valid_checksum(header: bytes) -> bool:
    """Whether a block has the checksum of a header."""
    # The low half of Adler-32 is 1 + the sum of the bytes, mod 65521: 20 times faster than sum(header).
    # The checksum is computed with its own field filled with eight spaces.
    try:
        stored = int(header[CHECKSUM].split(b"\0", 1)[0], 8)
    except ValueError:
        return False
    plain = header[:148] + b"        " + header[156:]
    if (stored + 1) % 65521 == adler32(plain) & 0xFFFF:
        return True
    # Some old tars summed signed characters.
    return stored == sum(plain) - 256 * sum(byte > 127 for byte in plain)


def member_name(header: bytes) -> bytes:
    """Return the name in a header; longer names than a header can hold are cut, or stored elsewhere."""
    name = header[NAME].split(b"\0", 1)[0]
    if header[_MAGIC] == _POSIX and header[PREFIX.start]:
        return header[PREFIX].split(b"\0", 1)[0] + b"/" + name
    return name


def name_before(blocks: bytes) -> bytes:
    """Return the name of a member from the blocks before its data.

    Args:
        blocks: the last three blocks before the data, or fewer at the start of a tar. A GNU long-name header
            and its text are the first two; a name of more than 511 bytes is cut.
    """
    name = member_name(blocks[-BLOCK:])
    if len(blocks) == 3 * BLOCK and blocks[TYPE] == _LONG_NAME and has_valid_checksum(blocks[:BLOCK]):
        long_name = blocks[BLOCK : 2 * BLOCK].split(b"\0", 1)[0]
        if len(name) == NAME.stop and long_name.startswith(name):
            return long_name
    return name


def member_size(header: bytes) -> int:
    """Return the number of data bytes in a header.

    Raises:
        ValueError: the field is not a number.
    """
    field = header[SIZE]
    # GNU base-256: if the top bit is set, the rest is a big-endian number.
    if field >= b"\x80":
        size = int.from_bytes(field[1:], "big") + ((field[0] & 0x7F) << 88)
    else:
        size = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    if not 0 <= size < 1 << 63:
        raise ValueError("the size is out of range")
    return size


def plain_names(headers: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_] | None:
    """Return the names in many headers at once, or None if a header is not that of a plain file.

    A plain file has no folder, a name of at most 100 bytes, and a valid checksum.

    Args:
        headers: shape [members, 512].
    """
    kind, size_end = headers[:, TYPE], headers[:, SIZE.stop - 1]
    checksum = headers[:, CHECKSUM]
    digits = checksum[:, :6] - ord("0")  # below "0" wraps to more than 7
    if (
        headers[:, PREFIX.start :].any()  # a name prefix, or data that some old tars store there
        or not ((kind == 0) | (kind == ord("0"))).all()  # not a regular file
        or not ((size_end == 0) | (size_end == ord(" "))).all()  # the size field is not terminated
        or checksum[:, 6].any()
        or (digits > 7).any()
    ):
        return None
    sums = headers[:, : PREFIX.start].sum(1, dtype=np.uint32) - checksum.sum(1, dtype=np.uint32)
    names: npt.NDArray[np.bytes_] = np.ascontiguousarray(headers[:, NAME]).view("S100")[:, 0]
    joined = b"".join(names.tolist())
    if (
        not (sums + 8 * ord(" ") == digits @ _OCTAL).all()  # the checksum counts its own field as spaces
        or b"/" in joined
        or b"\0" in joined  # bytes after the end of a name
        or not headers[:, 0].all()
    ):
        return None
    return names


def member_header(name: str, size: int) -> bytes:
    """Return the header of a file of `size` bytes: mode 0644, no owner, modification time 0.

    A name longer than 100 bytes gets a GNU long-name header first, so that the result has several blocks.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    # The same bytes as `TarInfo.tobuf` makes, ten times faster: a shard has two headers per image.
    digits = b"%011o" % size
    return b"%b%b%b%b%06o%b" % (
        encoded.ljust(100, b"\0"),
        _TEMPLATE[100:124],
        digits,
        _TEMPLATE[135:148],
        _TEMPLATE_SUM + sum(encoded) + sum(digits),
        _TEMPLATE[154:],
    )


def tar_member(name: str, data: bytes) -> bytes:
    """Return a tar member: header, data, and zeros up to a multiple of the block size."""
    return member_header(name, len(data)) + data + bytes(-len(data) % BLOCK)


_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.GNU_FORMAT)
# Sum of the template bytes without name, size (eleven digits) and checksum (which counts as eight spaces).
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[124:135]) - sum(_TEMPLATE[CHECKSUM]) + 8 * ord(" ")
