import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.datastore import file_hash
from hpc_imagenet.datastore.file_hash import ALGORITHMS, digest_of, hash_bytes, hash_file, new_digest
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


@pytest.mark.parametrize("value", ["", "crc32:00", "SHA256:00", "sha256x:00"])
def test_unknown_algorithm_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="unknown hash"):
        digest_of(File("a", 1, value))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "none", File("none", 0, "blake3:"), lambda done: None)
