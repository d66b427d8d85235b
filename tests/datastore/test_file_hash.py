import errno
import hashlib
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.datastore import file_hash
from hpc_imagenet.datastore.file_hash import (
    ALGORITHMS,
    copy_and_hash,
    digest_of,
    hash_bytes,
    hash_file,
    new_digest,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError


def test_new_files_are_hashed_with_blake3() -> None:
    # The first test vector of the specification: the empty input.
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert hash_bytes(b"") == f"blake3:{empty}"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.binary(max_size=5000), block=st.integers(1, 6000))
def test_file_has_the_hash_of_its_bytes_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory, algorithm: str, data: bytes, block: int
) -> None:
    path = tmp_path_factory.mktemp("hashed") / "file"
    path.write_bytes(data)
    whole = new_digest(algorithm)
    whole.update(data)
    if algorithm != "blake3":
        assert whole.hexdigest() == hashlib.new(algorithm, data).hexdigest()
    reported = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_hash, "BLOCK", block)
        found = hash_file(path, File("file", len(data), f"{algorithm}:?"), reported.append)
    assert found == f"{algorithm}:{whole.hexdigest()}"
    assert reported[-1] == len(data)


def _refuse(*_: int) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def _copy_once() -> Callable[..., int]:
    kernel, calls = os.copy_file_range, count()
    return lambda *words: kernel(*words) if next(calls) == 0 else _refuse()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["copies", "refuses", "copies one block"])
@given(data=st.binary(max_size=5000), block=st.integers(100, 6000))
def test_copy_has_the_bytes_and_their_hash_whatever_the_kernel_copies(
    tmp_path_factory: pytest.TempPathFactory, kernel: str, data: bytes, block: int
) -> None:
    source, target = (tmp_path_factory.mktemp("copied") / name for name in ("source", "target"))
    source.write_bytes(data)
    reported = [0]
    copy, copied = os.copy_file_range, [0]

    def count_bytes(*words: int) -> int:
        copied.append(copy(*words))
        return copied[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_hash, "BLOCK", block)
        patch.setattr(os, "copy_file_range", count_bytes)
        if kernel != "copies":
            patch.setattr(os, "copy_file_range", _refuse if kernel == "refuses" else _copy_once())
        with source.open("rb", buffering=0) as reader, target.open("w+b") as writer:
            found = copy_and_hash(reader, writer, File("file", len(data), "blake3:?"), reported.append)
    assert target.read_bytes() == data
    assert found == hash_bytes(data)
    expected = {"copies": len(data), "refuses": 0, "copies one block": min(block, len(data))}
    assert sum(copied) == expected[kernel]
    assert reported[-1] == len(data)
    assert reported == sorted(reported)


def test_full_disk_ends_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(b"data")
    monkeypatch.setattr(os, "copy_file_range", full)
    with (
        (tmp_path / "source").open("rb", buffering=0) as reader,
        (tmp_path / "target").open("w+b") as writer,
        pytest.raises(OSError, match="No space left"),
    ):
        copy_and_hash(reader, writer, File("file", 4, "blake3:?"), lambda done: None)


@pytest.mark.parametrize("value", ["", "crc32:00", "SHA256:00", "sha256x:00"])
def test_unknown_algorithm_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="unknown hash"):
        digest_of(File("a", 1, value))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "none", File("none", 0, "blake3:"), lambda done: None)
