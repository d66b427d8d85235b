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
from hpc_imagenet.data.tar.tar_reader import Member, members
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import BLOCK

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


def read_members(data: bytes, begin: int = 0, end: int | None = None) -> list[Member]:
    descriptor = os.memfd_create("tar")
    try:
        os.write(descriptor, data)
        return list(members(descriptor, begin, len(data) if end is None else end, "x.tar"))
    finally:
        os.close(descriptor)


def error_of(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read_members(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def headers(data: bytes) -> list[int]:
    """Return the byte offset of each header block, including extension headers."""
    positions, position = [], 0
    while data[position : position + BLOCK].strip(b"\0"):
        positions.append(position)
        size = int(data[position + 124 : position + 135], 8)
        position += BLOCK + size + -size % BLOCK
    return positions


part = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=120)
path = (
    st.lists(part.filter(lambda text: text not in (".", "..")), min_size=1, max_size=4)
    .map("/".join)
    .filter(lambda text: len(text.encode()) < 400)
)
files = st.lists(st.tuples(path, st.binary(max_size=1500)), max_size=6, unique_by=lambda file: file[0])


@pytest.mark.slow
@given(files=files, form=st.sampled_from(["gnu", "pax"]), front=st.integers(0, 3))
def test_members_equal_those_of_tarfile(files: list[tuple[str, bytes]], form: str, front: int) -> None:
    inner = build(files, form)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        expected = [Member(m.name, m.offset_data, m.size) for m in archive]
    assert read_members(inner) == expected
    assert [inner[m.offset : m.offset + m.length] for m in read_members(inner)] == [data for _, data in files]
    # The same tar nested inside another file.
    skip = front * BLOCK
    moved = read_members(b"x" * skip + inner + b"y" * 700, skip, skip + len(inner))
    assert moved == [m._replace(offset=m.offset + skip) for m in expected]


@pytest.mark.slow
@given(st.lists(st.text("abc/é", min_size=1, max_size=200), max_size=5), st.binary(max_size=600))
def test_members_of_ustar_equal_those_of_tarfile(names: list[str], data: bytes) -> None:
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
    assert [m.name for m in read_members(archive)] == kept
    assert all(archive[m.offset : m.offset + m.length] == data for m in read_members(archive))


def test_ustar_name_prefix() -> None:
    name = "d" * 90 + "/" + "f" * 90
    data = build([(name, b"z")], "ustar")
    assert data[345:346] == b"d", "the name was not split, so the test is void"
    assert read_members(data) == [Member(name, BLOCK, 1)]


def test_base_256_sizes() -> None:
    data = bytearray(build([("a.JPEG", b"12345")]))
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    assert read_members(with_checksum(data)) == [Member("a.JPEG", BLOCK, 5)]


def test_pax_sizes_and_global_records() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "é"}
    ) as archive:
        header = tarfile.TarInfo("a.JPEG")
        header.pax_headers = {"size": "5"}
        header.size = 5
        archive.addfile(header, io.BytesIO(b"12345"))
    data = bytearray(buffer.getvalue())
    position = headers(bytes(data))[-1]
    data[position + 124 : position + 136] = b"0" * 11 + b"\0"  # only the pax record has the size
    assert read_members(with_checksum(data, position)) == [Member("a.JPEG", position + BLOCK, 5)]


def test_directories_and_dot_prefixes_are_skipped() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("./", tarfile.DIRTYPE), ("./d/", tarfile.AREGTYPE), ("./d/a", tarfile.REGTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            archive.addfile(header)
    assert [m.name for m in read_members(buffer.getvalue())] == ["d/a"]


def test_signed_checksums_of_old_tars() -> None:
    data = bytearray(build([("é", b"1")]))
    plain = bytes(data[:148]) + b" " * 8 + bytes(data[156:BLOCK])
    signed = sum(byte - 256 if byte > 127 else byte for byte in plain)
    assert signed != sum(plain)
    data[148:156] = b"%06o\0 " % signed
    assert read_members(bytes(data)) == [Member("é", BLOCK, 1)]


def with_checksum(data: bytearray, position: int = 0) -> bytes:
    data[position + 148 : position + 156] = b" " * 8
    data[position + 148 : position + 156] = b"%06o\0 " % sum(data[position : position + BLOCK])
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_truncation_anywhere_is_reported(form: str) -> None:
    whole = build([("a" * 150, b"1" * 700), ("b", b"2" * 512), ("c", b"")], form)
    end = len(whole.rstrip(b"\0"))
    end += -end % BLOCK + 2 * BLOCK  # just past the end marker; tarfile pads further
    assert len(read_members(whole[:end])) == 3
    for length in range(end):
        message = error_of(whole[:length])
        assert "truncated" in message or "not a tar" in message, (length, message)
        assert ("not a tar" in message) == (length < BLOCK), (length, message)


def test_flipped_header_bit_is_reported() -> None:
    data = build([("a.JPEG", b"1" * 700), ("b.JPEG", b"2")])
    second = headers(data)[1]
    for byte in range(0, 260, 7):
        damaged = bytearray(data)
        damaged[second + byte] ^= 4
        assert f"damaged at byte {second}" in error_of(bytes(damaged)), byte
    damaged = bytearray(data)
    damaged[3] ^= 4
    assert "damaged at byte 0" in error_of(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>" + b" " * 1000, "an HTML page"),
        (b"\n<HTML>" + b" " * 1000, "an HTML page"),
        (b"\x1f\x8b" + b"x" * 1000, "a gzip file"),
        (b"PK\x03\x04" + b"x" * 1000, "a zip file"),
        (b'<?xml version="1.0"?><Error>' + b" " * 1000, "an XML document"),
        (b"x" * 5000, "a file of unknown format"),
        (b"\xff\xd8\xff\xe0" + b"x" * 1000, "a JPEG image"),
    ],
)
def test_non_tar_error_describes_the_content(data: bytes, description: str) -> None:
    assert f"not a tar but {description}" in error_of(data)
    with pytest.raises(UserError, match=description):
        tar_reader.check_first_block(data[:BLOCK], "x.tar")


@pytest.mark.parametrize(
    ("make", "message"),
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
def test_links_devices_and_unsafe_paths_are_rejected(make: Callable[[], bytes], message: str) -> None:
    assert message in error_of(make())


def test_names_with_dots_are_accepted() -> None:
    assert [m.name for m in read_members(build([("a..b", b""), ("..c", b""), ("d/...", b"")]))] == [
        "a..b",
        "..c",
        "d/...",
    ]


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(build([(f"{i}.JPEG", b"x" * 100_000) for i in range(10)]))
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or pread(fd, size, offset))
    with path.open("rb") as file:
        assert len(list(members(file.fileno(), 0, path.stat().st_size, "x"))) == 10
    assert sum(read) == 12 * BLOCK
