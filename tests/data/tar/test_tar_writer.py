from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_imagenet.data.tar import tar_writer
from hpc_imagenet.data.tar.tar_writer import TarWriter
from hpc_imagenet.io.tar_header import member_header

names = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=120)


@pytest.mark.slow
@given(names.filter(lambda name: not name.endswith("/")), st.integers(0, 8**11 + 3))
def test_member_headers_equal_those_of_tarfile(name: str, length: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = length
    assert member_header(name, length) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=3000), st.booleans()), max_size=5),
    st.sampled_from([512, 700, 1 << 20]),
)
def test_written_tar_is_readable_by_tarfile(files: list[tuple[str, bytes, bool]], buffer: int) -> None:
    original_buffer, tar_writer._BUFFER = tar_writer._BUFFER, buffer
    target, source = io.BytesIO(), os.memfd_create("source")
    descriptor = os.memfd_create("tar")
    try:
        with open(descriptor, "w+b", closefd=False) as file, TarWriter(file) as tar:
            offsets = []
            for name, data, copied in files:
                if copied:
                    os.pwrite(source, b"..." + data, 0)
                    offsets.append(tar.copy(name.rstrip("/") or "x", source, 3, len(data)))
                else:
                    offsets.append(tar.add(name.rstrip("/") or "x", data))
        target.write(os.pread(descriptor, 1 << 20, 0))
    finally:
        tar_writer._BUFFER = original_buffer
        os.close(source)
        os.close(descriptor)
    tar_bytes = target.getvalue()
    assert tar.size == len(tar_bytes)
    assert tar.hash == f"blake3:{blake3(tar_bytes).hexdigest()}"
    target.seek(0)
    with tarfile.open(fileobj=target) as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [n.rstrip("/") or "x" for n, _, _ in files]
        assert [m.offset_data for m in members] == offsets
    for (_, data, _), offset in zip(files, offsets, strict=True):
        assert tar_bytes[offset : offset + len(data)] == data
    assert tar_bytes == written_by_tarfile([(name, data) for name, data, _ in files])


def written_by_tarfile(files: list[tuple[str, bytes]]) -> bytes:
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name.rstrip("/") or "x")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset + 1024  # tarfile adds zeros up to a multiple of 10,240 bytes
    return expected.getvalue()[:end]


def test_written_tar_is_readable_by_gnu_tar(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file, TarWriter(file) as tar:
        tar.add("n1/a.JPEG", b"image")
        tar.add("n1/a.cls", b"7")
    subprocess.run(["tar", "xf", "x.tar"], cwd=tmp_path, check=True)
    assert (tmp_path / "n1" / "a.JPEG").read_bytes() == b"image"
    assert (tmp_path / "n1" / "a.cls").read_text() == "7"


def test_copy_past_the_end_of_the_source_raises_eof_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "short", os.O_RDONLY)
    with pytest.raises(EOFError), (tmp_path / "x").open("wb") as file, TarWriter(file) as tar:
        tar.copy("a", descriptor, 1, 5)
    os.close(descriptor)


def test_full_disk_raises_os_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left"),
        Path("/dev/full").open("wb", buffering=0) as file,
        TarWriter(file) as tar,
    ):
        tar.add("a", bytes(9 << 20))
