"""download_and_verify with a function that writes the bytes, in place of a server."""

from __future__ import annotations

import hashlib
import logging
import random
from pathlib import Path

import pytest

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.download.verified_download import download_and_verify
from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import tar_member

FILE = "x.tar"
DATA = tar_member("image.JPEG", random.Random(1).randbytes(50_000)) + bytes(1024)
MD5 = hashlib.md5(DATA).hexdigest()


def origin(url: str) -> Origin:
    return Origin(url, '"1"', None, len(DATA), ranges=True)


def download(target: Path, url: str = "https://a/x.tar", md5: str = MD5) -> int:
    """Download DATA; bytes that the partial file has already are not written again."""

    def fill(part: PartialFile) -> int:
        if part.origin is None:
            part.restart(origin(url))
        missing = list(part.gaps())
        for begin, end in missing:
            part.write(begin, DATA[begin:end])
        return sum(end - begin for begin, end in missing)

    expected = ExpectedArchive("dataset.archives.train", FILE, False, md5=md5, md5_source="md5sums")
    return download_and_verify(expected, target, url, "https://a/", fill, lambda done: None)


def interrupt(target: Path, url: str) -> None:
    """Leave the first 1000 bytes of an interrupted download from `url`."""
    with PartialFile(target) as part:
        part.restart(origin(url))
        part.write(0, DATA[:1000])


def test_verified_file_has_a_receipt_and_leaves_no_partial_file(tmp_path: Path) -> None:
    assert download(tmp_path / FILE) == len(DATA)
    assert (tmp_path / FILE).read_bytes() == DATA
    found = receipt.load_receipt(tmp_path / FILE)
    assert isinstance(found, receipt.Receipt)
    assert (found.md5, found.source, found.verified) == (MD5, "https://a/", "md5sums")
    assert {path.name for path in tmp_path.iterdir()} == {FILE, f"{FILE}.receipt.json"}


def test_only_the_missing_bytes_of_the_same_url_are_written(tmp_path: Path) -> None:
    interrupt(tmp_path / FILE, "https://a/x.tar")
    assert download(tmp_path / FILE) == len(DATA) - 1000
    assert (tmp_path / FILE).read_bytes() == DATA


def test_bytes_of_another_url_are_discarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(tmp_path / FILE, "https://b/x.tar")
    with caplog.at_level(logging.WARNING):
        assert download(tmp_path / FILE) == len(DATA)
    assert "restarting the download: x.tar.part has bytes from https://b/x.tar" in caplog.text
    assert (tmp_path / FILE).read_bytes() == DATA


def test_file_with_another_md5_is_kept_as_bad_without_a_receipt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0" * 32):
        download(tmp_path / FILE, md5="0" * 32)
    assert [path.name for path in tmp_path.iterdir()] == [f"{FILE}.bad"]
