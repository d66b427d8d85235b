"""Hostile development kits: gzip and tar, the ground truth, the table of classes, MATLAB files."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cases import SYNSETS, Case, run_stages
from sample_folders import mat

from hpc_imagenet.data.ilsvrc.devkit import META, TRUTH
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset, encode_devkit

_KIT = encode_devkit(SYNSETS, [1, 2])
_PLAIN = gzip.decompress(_KIT)


def _part(name: str, plain: bytes = _PLAIN) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        (member,) = (member for member in archive if member.name.endswith(name))
        file = archive.extractfile(member)
        return file.read() if file else b""


_MAT = _part(META)
_THREE = (Synset(1, "n1", "a, b"), Synset(2, "n2", "c"), Synset(3, "n0", "d", (1, 2)))
# One byte of it makes scipy 1.17 read outside of its memory.
CRASH = bytearray(_part(META, gzip.decompress(encode_devkit(_THREE, [1, 2]))))
CRASH[1620] = 14


def kit(truth: bytes = b"1\n2\n", meta: bytes = _MAT, more: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """Return a development kit with these two files, and more members before them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in (*more, (f"kit/{META}", meta), (f"kit/{TRUTH}", truth)):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def bomb(megabytes: int, begin: bytes = b"") -> bytes:
    """Return a gzip file that unpacks to `begin` and zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    parts = [packer.compress(begin), *(packer.compress(bytes(1 << 20)) for _ in range(megabytes))]
    return b"".join([*parts, packer.flush()])


def header_of(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar header that claims `size` bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header.tobuf(tarfile.GNU_FORMAT)


def link_kit() -> bytes:
    """Return a kit whose ground truth is a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        header = tarfile.TarInfo(f"kit/{TRUTH}")
        header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(header)
    return buffer.getvalue()


def changed(data: bytes, at: int, new: bytes) -> bytes:
    """Return bytes of which some are replaced."""
    return data[:at] + new + data[at + len(new) :]


def synsets(*rows: tuple[Any, ...]) -> bytes:
    """Return a table of classes with these rows."""
    import numpy as np

    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    table = np.empty((len(rows), 1), [(name, "O") for name in fields])
    for number, row in enumerate(rows):
        table[number, 0] = (*row, *[0] * (len(fields) - len(row)))
    return mat(synsets=table)


_PACKED = struct.pack("<II", 15, 0x7FFFFFF0)  # a compressed element of 2 GB
_HDF5 = (
    b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n"
)

_INPUTS: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "not a gzip file but an empty file"),
    ("tar without gzip", _PLAIN, "not a gzip file but a tar"),
    ("HTML page", b"<html>" + b" " * 600, "is an HTML page"),
    ("zip file", b"PK\x03\x04" + bytes(600), "not a gzip file but"),
    ("cut gzip", _KIT[:-100], "damaged or truncated"),
    (
        "wrong checksum of gzip",
        changed(_KIT, len(_KIT) - 8, b"\0\0\0\0"),
        "damaged or truncated (CRC check failed",
    ),
    ("gzip with a damaged middle", changed(_KIT, len(_KIT) // 2, b"\xff" * 30), "damaged or truncated"),
    ("bytes after gzip", _KIT + b"x" * 100, "damaged or truncated"),
    ("gzip of nothing", gzip.compress(b""), "not a development kit"),
    ("gzip of text", gzip.compress(b"hello" * 500), "not a development kit"),
    ("bomb of 300 MiB", bomb(300), "more than 256 MiB when it is unpacked"),
    (
        "bomb as a file of the kit",
        bomb(300, header_of("kit/bomb", 1 << 33)),
        "more than 256 MiB when it is unpacked",
    ),
    (
        "bomb as the table of classes",
        bomb(20, header_of(f"kit/{META}", 20 << 20)),
        "meta.mat has 20971520 bytes",
    ),
    ("bomb as a name", bomb(20, header_of("x", 20 << 20, b"L")), "not a development kit"),
    ("no ground truth", encode_devkit(SYNSETS, [])[:0] + kit(truth=b""), "2 images, but the ground truth"),
    ("ground truth is a link", link_kit(), f"does not contain {META}"),
    (
        "another kit",
        gzip.compress(_PLAIN.replace(b"data/", b"atad/")),
        "does not contain data/meta.mat; is it",
    ),
    ("CRLF", kit(b"1\r\n2\r\n"), "ok: 4 images"),
    ("CR only", kit(b"1\r2\r"), "line 1 is '1\\r2', which is not the id of a class"),
    ("byte order mark", kit(b"\xef\xbb\xbf1\n2\n"), "line 1 is '���1', which is not the id of a class"),
    ("UTF-16", kit("1\n2\n".encode("utf-16")), "line 1 is"),
    ("empty lines", kit(b"\n1\n\n2\n\n"), "ok: 4 images"),
    ("one id too few", kit(b"1\n"), "2 images, but the ground truth of the development kit has 1 lines"),
    (
        "one id too many",
        kit(b"1\n2\n1\n"),
        "2 images, but the ground truth of the development kit has 3 lines",
    ),
    ("id 0", kit(b"0\n2\n"), "line 1 is '0', which is not the id of a class"),
    ("id -1", kit(b"-1\n2\n"), "line 1 is '-1'"),
    ("id 1.0", kit(b"1.0\n2\n"), "line 1 is '1.0'"),
    ("id of 5,000 digits", kit(b"9" * 5000 + b"\n2\n"), "line 1 is '9999999999999999999999999999"),
    ("id with escape sequences", kit(b"\x1b[2J\n2\n"), "line 1 is '\\x1b[2J'"),
    ("id after a control character", kit(b"\x1d1\n2\n"), "ok: 4 images"),
    ("id in other digits", kit("²\n2\n".encode()), "which is not the id of a class"),
    ("two tables of classes", kit(more=[(f"old/{META}", b"x")]), "ok: 4 images"),
    ("path upward in the kit", kit(more=[("../../x", b"x")]), "ok: 4 images"),
    ("table is empty", kit(meta=b""), "is not a readable MATLAB file"),
    ("table is text", kit(meta=b"hello" * 99), "is not a readable MATLAB file"),
    ("table of MATLAB 7.3", kit(meta=_HDF5), "in the format of MATLAB 7.3: save it with -v7"),
    ("table crashes scipy", kit(meta=bytes(CRASH)), "is not a readable MATLAB file (damaged"),
    ("table is cut", kit(meta=_MAT[:-20]), "is not a readable MATLAB file"),
    ("table claims 2 GB", kit(meta=_MAT[:128] + _PACKED + _MAT[136:]), "is not a readable MATLAB file"),
    ("table without synsets", kit(meta=mat(x=1)), "has no readable table `synsets` (KeyError('synsets'))"),
    ("synsets is a number", kit(meta=mat(synsets=5)), "has no readable table `synsets`"),
    ("synsets is a text", kit(meta=mat(synsets="abc")), "has no readable table `synsets`"),
    ("synsets with three columns", kit(meta=mat(synsets={"a": 1, "b": 2, "c": 3})), "has no readable table"),
    ("id is not a number", kit(meta=synsets((float("nan"), "n1", "x", "", 0))), "has no readable table"),
    ("id is infinite", kit(meta=synsets((float("inf"), "n1", "x", "", 0))), "has no readable table"),
    (
        "id occurs twice",
        kit(meta=synsets((1, "n1", "x", "", 0), (1, "n2", "y", "", 0))),
        "occurs twice in data/meta.mat",
    ),
    ("wnid occurs twice", kit(meta=synsets((1, "n1", "x", "", 0), (2, "n1", "y", "", 0))), "occurs twice"),
    (
        "wnid leads upward",
        encode_devkit([Synset(1, "../x", "x")], [1]),
        "has a class with the invalid wnid '../x'",
    ),
    ("wnid is hidden", encode_devkit([Synset(1, ".x", "x")], [1]), "has a class with the invalid wnid '.x'"),
    ("wnid with a line end", encode_devkit([Synset(1, "n\n1", "x")], [1]), "with the invalid wnid 'n\\n1'"),
    ("no class without children", encode_devkit([Synset(1, "n1", "x", (2,))], [1]), "has no class"),
    (
        "a class too many",
        encode_devkit([*SYNSETS, Synset(3, "n3", "x")], [1, 2]),
        "n3 is in the development kit but",
    ),
]


def _run(data: bytes) -> Callable[[Path], str]:
    return lambda folder: f"{run_stages(folder, {'devkit': data})['images']} images"


CASES = [Case("devkit", name, _run(data), expected) for name, data, expected in _INPUTS]
