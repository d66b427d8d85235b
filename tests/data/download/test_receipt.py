from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.receipt import Receipt


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(b"12345")
    receipt.write_receipt(path, "0" * 32, "http://x", "md5sums", path.stat())
    return path


def test_receipt_is_invalid_after_a_change_of_size_or_mtime(archive: Path) -> None:
    assert receipt.load_receipt(archive) == Receipt(
        5, "0" * 32, archive.stat().st_mtime_ns, "http://x", "md5sums"
    )
    stat = archive.stat()
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert receipt.load_receipt(archive) is None
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert receipt.load_receipt(archive) is not None
    archive.write_bytes(b"123456")
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert receipt.load_receipt(archive) is None


def test_only_a_known_other_state_of_the_same_origin_is_outdated(archive: Path) -> None:
    receipt.remove_outdated(archive, "http://x", "2")
    receipt.write_receipt(archive, "0" * 32, "/data", "", archive.stat(), "1")
    receipt.remove_outdated(archive, "/data", "1")
    receipt.remove_outdated(archive, "http://x", "2")
    assert archive.exists()
    receipt.remove_outdated(archive, "/data", "2")
    assert not list(archive.parent.iterdir())


def test_missing_or_invalid_receipt_is_reported_as_missing(archive: Path) -> None:
    assert receipt.missing_receipts(archive.parent, ["x.tar", "y.tar"]) == ["y.tar"]
    receipt_path = archive.with_name("x.tar.receipt.json")
    for invalid in ("{", "{}", '{"bytes": 5}', "[]"):
        receipt_path.write_text(invalid)
        assert receipt.missing_receipts(archive.parent, ["x.tar"]) == ["x.tar"], invalid
    receipt_path.unlink()
    assert receipt.load_receipt(archive) is None
    archive.unlink()
    assert receipt.load_receipt(archive) is None


def test_import_of_receipt_is_fast() -> None:
    heavy = {"numpy", "scipy", "torch", "urllib3"}
    code = "import sys, hpc_imagenet.data.download.receipt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not heavy & set(loaded.split())
