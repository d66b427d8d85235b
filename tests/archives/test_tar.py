from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.data.tar import tar_reader
from hpc_imagenet.data.tar.tar_reader import BLOCK, Member, members
from hpc_imagenet.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def build(files: list[tuple[str, bytes]], form: str = "gnu", **fields: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as archive:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            for field, value in fields.items():
                setattr(header, field, value)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def walk(data: bytes, begin: int = 0, end: int | None = None) -> list[Member]:
    descriptor = os.memfd_create("tar")
    try:
        os.write(descriptor, data)
        return list(members(descriptor, begin, len(data) if end is None else end, "x.tar"))
    finally:
        os.close(descriptor)


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        walk(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def headers(data: bytes) -> list[int]:
    """Where each header block begins, extension headers too."""
    places, at = [], 0
    while data[at : at + BLOCK].strip(b"\0"):
        places.append(at)
        size = int(data[at + 124 : at + 135], 8)
        at += BLOCK + size + -size % BLOCK
    return places


part = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=120)
path = (
    st.lists(part.filter(lambda text: text not in (".", "..")), min_size=1, max_size=4)
    .map("/".join)
    .filter(lambda text: len(text.encode()) < 400)
)
files = st.lists(st.tuples(path, st.binary(max_size=1500)), max_size=6, unique_by=lambda file: file[0])


@given(files=files, form=st.sampled_from(["gnu", "pax"]), front=st.integers(0, 3))
def test_finds_what_tarfile_finds(files: list[tuple[str, bytes]], form: str, front: int) -> None:
    inner = build(files, form)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        expected = [Member(m.name, m.offset_data, m.size) for m in archive]
    assert walk(inner) == expected
    assert [inner[m.offset : m.offset + m.length] for m in walk(inner)] == [data for _, data in files]
    # The same tar in the middle of a file.
    skip = front * BLOCK
    moved = walk(b"x" * skip + inner + b"y" * 700, skip, skip + len(inner))
    assert moved == [m._replace(offset=m.offset + skip) for m in expected]


@given(st.lists(st.text("abc/é", min_size=1, max_size=200), max_size=5), st.binary(max_size=600))
def test_finds_what_tarfile_finds_in_ustar(names: list[str], data: bytes) -> None:
    kept = []
    for name in names:
        clean = "/".join(part for part in name.split("/") if part)
        try:
            build([(clean, data)], "ustar")
        except ValueError:  # too long to be split into prefix and name
            continue
        if clean and clean not in kept:
            kept.append(clean)
    archive = build([(name, data) for name in kept], "ustar")
    assert [m.name for m in walk(archive)] == kept
    assert all(archive[m.offset : m.offset + m.length] == data for m in walk(archive))


def test_takes_the_prefix_of_ustar() -> None:
    name = "d" * 90 + "/" + "f" * 90
    data = build([(name, b"z")], "ustar")
    assert data[345:346] == b"d", "the name was not split: this test tests nothing"
    assert walk(data) == [Member(name, BLOCK, 1)]


def test_takes_base_256_sizes() -> None:
    data = bytearray(build([("a.JPEG", b"12345")]))
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    assert walk(resummed(data)) == [Member("a.JPEG", BLOCK, 5)]


def test_takes_pax_sizes_and_global_records() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "é"}
    ) as archive:
        header = tarfile.TarInfo("a.JPEG")
        header.pax_headers = {"size": "5"}
        header.size = 5
        archive.addfile(header, io.BytesIO(b"12345"))
    data = bytearray(buffer.getvalue())
    at = headers(bytes(data))[-1]
    data[at + 124 : at + 136] = b"0" * 11 + b"\0"  # only the pax record knows the size
    assert walk(resummed(data, at)) == [Member("a.JPEG", at + BLOCK, 5)]


def test_passes_over_directories_and_dots() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("./", tarfile.DIRTYPE), ("./d/", tarfile.AREGTYPE), ("./d/a", tarfile.REGTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            archive.addfile(header)
    assert [m.name for m in walk(buffer.getvalue())] == ["d/a"]


def test_signed_checksums_of_old_tars() -> None:
    data = bytearray(build([("é", b"1")]))
    plain = bytes(data[:148]) + b" " * 8 + bytes(data[156:BLOCK])
    signed = sum(byte - 256 if byte > 127 else byte for byte in plain)
    assert signed != sum(plain)
    data[148:156] = b"%06o\0 " % signed
    assert walk(bytes(data)) == [Member("é", BLOCK, 1)]


def resummed(data: bytearray, at: int = 0) -> bytes:
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
    return bytes(data)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_cut_anywhere_is_told(form: str) -> None:
    whole = build([("a" * 150, b"1" * 700), ("b", b"2" * 512), ("c", b"")], form)
    end = len(whole.rstrip(b"\0"))
    end += -end % BLOCK + 2 * BLOCK  # behind the end mark; tarfile pads further
    assert len(walk(whole[:end])) == 3
    for cut in range(end):
        assert "truncated" in (told := refusal(whole[:cut])) or "not a tar" in told, (cut, told)
        assert ("not a tar" in told) == (cut < BLOCK), (cut, told)


def test_a_flipped_bit_in_a_header_is_told() -> None:
    data = build([("a.JPEG", b"1" * 700), ("b.JPEG", b"2")])
    second = headers(data)[1]
    for byte in range(0, 260, 7):
        damaged = bytearray(data)
        damaged[second + byte] ^= 4
        assert f"damaged at byte {second}" in refusal(bytes(damaged)), byte
    damaged = bytearray(data)
    damaged[3] ^= 4
    assert "damaged at byte 0" in refusal(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>" + b" " * 1000, "an HTML page"),
        (b"\n<HTML>" + b" " * 1000, "an HTML page"),
        (b"\x1f\x8b" + b"x" * 1000, "a gzip file"),
        (b"PK\x03\x04" + b"x" * 1000, "a zip file"),
        (b'<?xml version="1.0"?><Error>' + b" " * 1000, "an XML document"),
        (b"x" * 5000, "a file of no known format"),
        (b"\xff\xd8\xff\xe0" + b"x" * 1000, "a JPEG image"),
    ],
)
def test_names_what_came_instead_of_a_tar(data: bytes, words: str) -> None:
    assert f"not a tar but {words}" in refusal(data)
    with pytest.raises(UserError, match=words):
        tar_reader.check_first_block(data[:BLOCK], "x.tar")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build([("../a", b"1")]), "leave its folder"),
        (lambda: build([("a/../../b", b"1")]), "leave its folder"),
        (lambda: build([("/etc/passwd", b"1")]), "absolute path"),
        (lambda: build([("a", b"")], type=tarfile.SYMTYPE, linkname="b"), "a symbolic link"),
        (lambda: build([("a", b"")], type=tarfile.LNKTYPE, linkname="b"), "a hard link"),
        (lambda: build([("a", b"")], type=tarfile.SYMTYPE, linkname="b" * 200), "a symbolic link"),
        (lambda: build([("a", b"")], type=tarfile.CHRTYPE), "a character device"),
        (lambda: build([("a", b"")], type=tarfile.BLKTYPE), "a block device"),
        (lambda: build([("a", b"")], type=tarfile.FIFOTYPE), "a pipe"),
        (lambda: build([("a", b"")], "pax", pax_headers={"GNU.sparse.major": "1"}), "a sparse file"),
        (lambda: build([("a", b"1"), ("b", b"2"), ("a", b"3")]), "two members are called a"),
        (lambda: build([("a", b"1"), ("./a", b"3")]), "two members are called a"),
        (lambda: build([("a", b"1")], type=b"Z"), "unknown type 'Z'"),
    ],
)
def test_refuses_what_no_archive_of_images_has(make: Callable[[], bytes], words: str) -> None:
    assert words in refusal(make())


def test_ordinary_names_with_dots_pass() -> None:
    assert [m.name for m in walk(build([("a..b", b""), ("..c", b""), ("d/...", b"")]))] == [
        "a..b",
        "..c",
        "d/...",
    ]


def test_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(build([(f"{i}.JPEG", b"x" * 100_000) for i in range(10)]))
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))
    with path.open("rb") as file:
        assert len(list(members(file.fileno(), 0, path.stat().st_size, "x"))) == 10
    assert sum(read) == 12 * BLOCK
