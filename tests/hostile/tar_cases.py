"""Hostile tars, as the archive of the validation images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from cases import Case, image, run_stages

from hpc_imagenet.io.tar_header import BLOCK, CHECKSUM, END, SIZE, TYPE

Change = Callable[[bytearray], None]


def tar(
    *files: tuple[str, bytes],
    form: int = tarfile.GNU_FORMAT,
    pax: dict[str, str] | None = None,
    end: bool = True,
) -> bytes:
    """Return a tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size, header.pax_headers = len(data), pax or {}
            archive.addfile(header, io.BytesIO(data))
        size = archive.offset
    return buffer.getvalue()[:size] + (END if end else b"")


def special(kind: bytes, link: str = "a.JPEG", name: str = "b.JPEG") -> bytes:
    """Return a tar whose second member is of another type."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        first = tarfile.TarInfo("a.JPEG")
        first.size = len(image(3))
        archive.addfile(first, io.BytesIO(image(3)))
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, link
        archive.addfile(header)
    return buffer.getvalue()


def header_with(change: Change, fix: bool = True, at: int = 0) -> bytes:
    """Return a tar of two images whose header at byte `at` is changed; `fix` corrects its checksum."""
    data = bytearray(tar(("a.JPEG", image(3)), ("b.JPEG", image(4))))
    header = data[at : at + BLOCK]
    change(header)
    if fix:
        header[CHECKSUM] = b" " * 8
        header[CHECKSUM] = b"%06o\0 " % sum(header)
    data[at : at + BLOCK] = header
    return bytes(data)


def put(place: slice | int, value: bytes) -> Change:
    """Return a change that writes bytes to a field."""

    def change(header: bytearray) -> None:
        begin = place if isinstance(place, int) else place.start
        header[begin : begin + len(value)] = value

    return change


def extension(kind: bytes, content: bytes) -> bytes:
    """Return a tar whose first member has an extension header with this content."""
    header = bytearray(tar(("x", content), end=False))
    header[TYPE : TYPE + 1] = kind
    header[CHECKSUM] = b" " * 8
    header[CHECKSUM] = b"%06o\0 " % sum(header[:BLOCK])
    return bytes(header) + tar(("a.JPEG", image(3)), ("b.JPEG", image(4)))


def record(key: str, value: str) -> bytes:
    """Return a pax record."""
    for length in range(len(key) + len(value), len(key) + len(value) + 12):
        text = f"{length} {key}={value}\n".encode()
        if len(text) == length:
            return text
    raise ValueError(key)


GOOD = ("a.JPEG", image(3)), ("b.JPEG", image(4))
WHOLE = tar(*GOOD)
LONG = "a" * 5000

_INPUTS: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "not a tar but an empty file"),
    ("zeros only", bytes(4096), "an empty archive"),
    ("one zero block", bytes(512), "its end marker (two zero blocks) is missing"),
    ("HTML page", b"<!DOCTYPE html><html>" + b" " * 2000, "is an HTML page, not an archive"),
    ("gzip of a tar", __import__("gzip").compress(WHOLE), "not a tar but a gzip file"),
    ("random bytes", bytes(range(1, 256)) * 20, "not a tar but a file of unknown format"),
    ("cut inside a member", WHOLE[:700], "truncated inside a.JPEG"),
    ("cut after a header", WHOLE[:512], "truncated inside a.JPEG"),
    ("cut between two members", tar(GOOD[0], end=False), "its end marker (two zero blocks) is missing"),
    (
        "one block of the end marker",
        tar(*GOOD, end=False) + bytes(512),
        "its end marker (two zero blocks) is",
    ),
    ("size of -1 in octal", header_with(put(SIZE, b"-0000000001\0")), "the size of a member is not a number"),
    ("size of -1 in base 256", header_with(put(SIZE, b"\xff" * 12)), "the size of a member is not a number"),
    ("size of 2^63 in base 256", header_with(put(SIZE, b"\x80\0\0\0\x80" + bytes(7))), "is not a number"),
    (
        "size of 2^62 in base 256",
        header_with(put(SIZE, b"\x80\0\0\0\x40" + bytes(7))),
        "truncated inside a.JPEG",
    ),
    ("size of 8 GiB in octal", header_with(put(SIZE, b"77777777777\0")), "truncated inside a.JPEG"),
    ("size without digits", header_with(put(SIZE, b"ninety-nine\0")), "the size of a member is not a number"),
    ("size of 0", header_with(put(SIZE, b"00000000000\0")), "damaged at byte 512: no valid tar header there"),
    ("wrong checksum", header_with(put(0, b"X"), fix=False), "no valid tar header there"),
    ("symbolic link", special(tarfile.SYMTYPE, "/etc/passwd"), "b.JPEG at byte 1536 is a symbolic link"),
    ("hard link", special(tarfile.LNKTYPE), "is a hard link; only regular files are supported"),
    ("character device", special(tarfile.CHRTYPE), "is a character device"),
    ("block device", special(tarfile.BLKTYPE), "is a block device"),
    ("pipe", special(tarfile.FIFOTYPE), "is a pipe"),
    ("unknown type Z", special(b"Z"), "has the unknown type 'Z'"),
    ("sparse file of GNU", special(b"S"), "is a sparse file, whose bytes are not contiguous"),
    (
        "sparse file of pax",
        tar(*GOOD, form=tarfile.PAX_FORMAT, pax={"GNU.sparse.major": "1"}),
        "is a sparse file",
    ),
    ("volume label of GNU", special(b"V", name="label"), "label at byte 1536 has the unknown type 'V'"),
    ("absolute path", tar(("/etc/a.JPEG", b"x")), "has an absolute path (/etc/a.JPEG)"),
    ("path upward", tar(("../../a.JPEG", b"x")), "would leave its folder (../../a.JPEG)"),
    ("path upward inside", tar(("x/../../a.JPEG", b"x")), "would leave its folder (x/../../a.JPEG)"),
    ("path upward by pax", extension(b"x", record("path", "../../a.JPEG")), "would leave its folder"),
    ("path upward by a long name", extension(b"L", b"../../a.JPEG\0"), "would leave its folder"),
    ("member without a name", header_with(put(0, bytes(100))), "has an absolute path (no name)"),
    ("same name twice", tar(GOOD[0], GOOD[0]), "two members are called a.JPEG"),
    ("same name twice, once as ./", tar(GOOD[0], ("./a.JPEG", image(4))), "two members are called a.JPEG"),
    (
        "same name in two folders",
        tar(("x/a.JPEG", image(3)), ("y/a.JPEG", image(4))),
        "two images have the same file",
    ),
    ("names that differ by case", tar(GOOD[0], ("A.jpeg", image(4))), "ok: 4 images"),
    ("name of 5,000 characters", tar((LONG + ".JPEG", b"x")), "…4,805 characters…"),
    ("name of 5,000 characters twice", tar((LONG, b"x"), (LONG, b"y")), "characters…"),
    (
        "name with escape sequences",
        tar(("\x1b[2J\x1b]0;x\x07.txt", b"x")),
        "contains .txt, which is not an image",
    ),
    ("name with a line end", tar(("a\nerror: all is well.txt", b"x")), "contains a error: all is well.txt"),
    ("name that is not UTF-8", header_with(put(0, b"\xff\xfe.JPEG\0")), "ok: 4 images"),
    ("name that reverses the text", tar(("a\u202egpj.txt", b"x")), "contains agpj.txt"),
    ("README beside the images", tar(*GOOD, ("README", b"x")), "contains README, which is not an image"),
    (
        "one image too many",
        tar(*GOOD, ("c.JPEG", image(5))),
        "3 images, but the ground truth of the development kit",
    ),
    ("pax record of a wrong length", extension(b"x", b"999 path=x\n"), "unreadable pax records"),
    ("pax record of 5,000 digits", extension(b"x", b"9" * 5000 + b" path=x\n"), "unreadable pax records"),
    ("pax size of 5,000 digits", extension(b"x", record("size", "9" * 5000)), "the pax size is not a number"),
    ("pax size of -1", extension(b"x", record("size", "-1")), "the pax size is not a number"),
    ("pax size of 10^18 - 1", extension(b"x", record("size", "9" * 18)), "truncated inside a.JPEG"),
    ("pax path of zero bytes", extension(b"x", record("path", "\0\0")), "has a zero byte"),
    ("pax path with a zero byte", extension(b"x", record("path", "a\0b.JPEG")), "has a zero byte (ab.JPEG)"),
    ("global pax path", extension(b"g", record("path", "same.JPEG")), "two members are called same.JPEG"),
    (
        "pax header at the end",
        tar(*GOOD, end=False) + extension(b"x", b"9 a=bcde\n")[:1024] + END,
        "without a member",
    ),
    ("long name of 2 MiB", extension(b"L", b"a" * (2 << 20)), "a name of 2097152 bytes"),
    (
        "long name that is cut",
        extension(b"L", b"a" * 3000)[:2000],
        "truncated at byte 2000, inside a long name",
    ),
    ("prefix field of ustar", header_with(put(345, b"/etc")), "ok: 4 images"),
    ("bytes after the end marker", WHOLE + b"x" * 5000, "ok: 4 images"),
    ("tar in a tar", tar(("inner.tar", WHOLE)), "contains inner.tar, which is not an image"),
    ("empty image", tar(GOOD[0], ("b.JPEG", b"")), "b.JPEG has 0 bytes"),
]


def _run(data: bytes) -> Callable[[Path], str]:
    return lambda folder: f"{run_stages(folder, {'val': data}, on_corrupt='skip')['images']} images"


def _run_train(data: bytes) -> Callable[[Path], str]:
    return lambda folder: f"{run_stages(folder, {'train': data}, on_corrupt='skip')['images']} images"


_TRAIN: list[tuple[str, bytes, str]] = [
    (
        "train: a class that is no tar",
        tar(("n001.tar", b"x" * 2000), ("n002.tar", WHOLE)),
        "n001.tar: not a tar",
    ),
    (
        "train: a class twice by case",
        tar(("n001.tar", WHOLE), ("N001.tar", WHOLE)),
        "class N001 is in the archive",
    ),
    ("train: a class in a folder upward", tar(("../n001.tar", WHOLE)), "would leave its folder"),
    (
        "train: a class that is cut",
        tar(("n001.tar", WHOLE[:900]), ("n002.tar", WHOLE)),
        "n001.tar: truncated",
    ),
    ("train: images instead of classes", WHOLE, "one tar per class is expected"),
    (
        "train: tar in tar in tar",
        tar(("n001.tar", tar(("n001.tar", WHOLE))), ("n002.tar", WHOLE)),
        "contains n001.tar",
    ),
    (
        "train: images of the same name in two classes",
        tar(("n001.tar", WHOLE), ("n002.tar", WHOLE)),
        "ok: 6 images",
    ),
]

CASES = [Case("tar", name, _run(data), expected) for name, data, expected in _INPUTS] + [
    Case("tar", name, _run_train(data), expected) for name, data, expected in _TRAIN
]
