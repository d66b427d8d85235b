from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_images import encoded, jpeg

from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.tar import tar_scan
from hpc_imagenet.data.tar.tar_scan import ImageEntries
from hpc_imagenet.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BITS = random.Random(5)
IMAGES = [
    *(jpeg(BITS, length) for length in (0, 1000, 1024, 1025, 3000, 9000, 70_000)),
    *(
        encoded(image_format, mode)
        for image_format, mode in (("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("BMP", "RGB"))
    ),
    encoded(progressive=True),
    encoded(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    encoded(size=(64, 64))[:400],
    b"x",
]


def build(files: Sequence[tuple[str, bytes]], tar_format: str = "gnu") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[tar_format]) as archive:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def find(data: bytes, begin: int = 0, end: int | None = None) -> ImageEntries:
    descriptor = os.memfd_create("tar")
    try:
        os.write(descriptor, data)
        return tar_scan.find_images(descriptor, begin, len(data) if end is None else end, "x.tar")
    finally:
        os.close(descriptor)


def same(one: ImageEntries, other: ImageEntries) -> bool:
    return all(np.array_equal(*columns) for columns in zip(one, other, strict=True))


name = st.text("abcé.", min_size=1, max_size=60).map(lambda stem: f"x{stem}.JPEG")
files = st.lists(
    st.tuples(name, st.sampled_from(IMAGES)), min_size=1, max_size=9, unique_by=lambda file: file[0]
)


@pytest.mark.slow
@settings(deadline=None)
@given(
    files=files,
    tar_format=st.sampled_from(sorted(FORMATS)),
    front=st.integers(0, 2),
    batch_images=st.sampled_from([2, 512]),
)
def test_scan_equals_tarfile_and_inspect(
    files: list[tuple[str, bytes]], tar_format: str, front: int, batch_images: int
) -> None:
    inner = build(files, tar_format)
    skip = front * 512
    with mock.patch.object(tar_scan, "BATCH_IMAGES", batch_images):
        found = find(b"x" * skip + inner + b"y" * 700, skip, skip + len(inner))
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        assert found.names.tolist() == [os.fsencode(member.name) for member in archive]
        assert (found.offsets - skip).tolist() == [member.offset_data for member in archive]
        assert found.lengths.tolist() == [member.size for member in archive]
    assert [image_header.ImageInfo(*facts) for facts in found.facts.tolist()] == [
        image_header.inspect(d) for _, d in files
    ]


@pytest.mark.parametrize("tar_format", sorted(FORMATS))
def test_plain_tar_uses_the_fast_scan(tar_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build([(f"n1_{i}.JPEG", image) for i, image in enumerate(IMAGES)], tar_format)
    with mock.patch.object(tar_scan, "_scan_fast", return_value=None):
        slow = find(data)
    monkeypatch.setattr(tar_scan, "_scan_any", lambda *_: pytest.fail("the fast scan was not used"))
    assert same(find(data), slow)


@pytest.mark.parametrize(
    "files",
    [
        [("d/a.JPEG", IMAGES[0]), ("d/b.JPEG", IMAGES[1])],
        [("./a.JPEG", IMAGES[0])],
        [("é" * 80 + ".JPEG", IMAGES[0])],
        [("a.JPEG", IMAGES[0]), ("b" * 90 + ".JPEG", IMAGES[1])],
    ],
)
@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_folders_and_long_names_are_accepted(files: list[tuple[str, bytes]], tar_format: str) -> None:
    found = find(build(files, tar_format))
    assert found.names.tolist() == [os.fsencode(name.rsplit("/", 1)[-1]) for name, _ in files]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "an empty archive"),
        ([("a.txt", b"x")], "a.txt, which is not an image"),
        ([("a.JPEG", b"x"), ("a.JPEG", b"y")], "two members are called a.JPEG"),
        ([("a.JPEG", b"")], "a.JPEG has 0 bytes"),
        ([("../a.JPEG", b"x")], "would leave its folder"),
        ([("/a.JPEG", b"x")], "absolute path"),
        ([("a" * 251 + ".JPEG", b"x")], "longer than 255 bytes"),
    ],
)
def test_unsafe_or_non_image_members_are_rejected(files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(build(files))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_links_and_devices_are_rejected(kind: bytes, message: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        header = tarfile.TarInfo("good.JPEG")
        header.size = len(IMAGES[0])
        archive.addfile(header, io.BytesIO(IMAGES[0]))
        header = tarfile.TarInfo("a.JPEG")
        header.type, header.linkname = kind, "good.JPEG"
        archive.addfile(header)
    with pytest.raises(UserError, match=f"a.JPEG at byte [0-9]+ is {message}"):
        find(buffer.getvalue())


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_fast_scan_gives_the_errors_of_the_full_scan(draw: st.DataObject) -> None:
    data = bytearray(build([(f"n1_{i}.JPEG", image) for i, image in enumerate(IMAGES[:6])]))
    damage = draw.draw(st.sampled_from(["truncate", "byte", "end"]))
    if damage == "truncate":
        del data[draw.draw(st.integers(0, len(data) - 1)) :]
    elif damage == "byte":
        headers = [0]
        for image in IMAGES[:5]:
            headers.append(headers[-1] + 512 + len(image) + -len(image) % 512)
        data[draw.draw(st.sampled_from(headers)) + draw.draw(st.integers(0, 511))] = draw.draw(
            st.integers(0, 255)
        )
    else:
        end = draw.draw(st.integers(0, len(data)))
        assert scan_result(bytes(data), end) == scan_result(bytes(data), end, full_scan=True)
        return
    assert scan_result(bytes(data)) == scan_result(bytes(data), full_scan=True)


def scan_result(data: bytes, end: int | None = None, full_scan: bool = False) -> object:
    with mock.patch.object(tar_scan, "_scan_fast", return_value=None) if full_scan else mock.MagicMock():
        try:
            found = find(data, 0, end)
        except UserError as error:
            return str(error)
    return [column.tolist() for column in found]
