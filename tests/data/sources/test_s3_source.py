"""An S3 bucket, served by rclone from a folder, as the source of archives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from run_stage import config_of, run_stage, stage_error

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.download.transfer import FIRST_REQUEST
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.sources.range_source import ContentChanged
from hpc_imagenet.data.sources.s3_source import S3Source
from hpc_imagenet.demo import digits
from hpc_imagenet.stages.work import download

FILES = (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("buckets") / "library" / "ILSVRC"
    digits.write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(source: Path) -> Iterator[str]:
    with servers.rclone(source.parents[1], "--dir-cache-time=0s") as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.credentials(monkeypatch, endpoint)


def test_download_from_a_bucket(tmp_path: Path, source: Path) -> None:
    config = config_of(tmp_path, "s3://library/ILSVRC")
    config.download.connections = 4
    size = sum((source / file).stat().st_size for file in FILES)
    result = run_stage(download, config)
    assert {key: result[key] for key in ("bytes", "files", "downloaded")} == {
        "bytes": size,
        "files": 3,
        "downloaded": size,
    }
    for file in FILES:
        archive = tmp_path / "archives/numbers" / file
        assert archive.read_bytes() == (source / file).read_bytes()
        loaded = receipt.load_receipt(archive)
        assert loaded
        assert (loaded.source, loaded.verified) == ("s3://library/ILSVRC", "md5sums")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or servers.SECRET.encode() not in path.read_bytes(), path


def test_resumes_a_partial_file_of_an_earlier_attempt(tmp_path: Path, source: Path) -> None:
    bucket = S3Source("s3://library/ILSVRC", 5, 1)
    target = tmp_path / "archives/numbers" / ilsvrc_writer.TRAIN
    target.parent.mkdir(parents=True)
    with bucket.open(ilsvrc_writer.TRAIN, 0, FIRST_REQUEST) as response:
        origin = response.origin
        data = b"".join(iter(lambda: response.read(1 << 20), b""))
    assert (len(data), response.ranged, response.end) == (FIRST_REQUEST, True, FIRST_REQUEST)
    with PartialFile(target) as part:
        part.restart(origin)
        part.write(0, data)
    size = sum((source / file).stat().st_size for file in FILES)
    assert (
        run_stage(download, config_of(tmp_path, "s3://library/ILSVRC"))["downloaded"] == size - FIRST_REQUEST
    )
    assert target.read_bytes() == (source / ilsvrc_writer.TRAIN).read_bytes()


def test_changed_object_raises_content_changed(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = source.parent / "changing"
    path.write_bytes(b"a" * 1000)
    bucket = S3Source("s3://library", 5, 1)
    with bucket.open("changing", 0, 10) as response:
        before = response.origin
    path.write_bytes(b"b" * 999)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ContentChanged),
        bucket.open("changing", 10, 20, before),
    ):
        pass
    path.unlink()


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("s3://library/nowhere", "s3://library/nowhere/ILSVRC2012_img_train.tar does not exist"),
        ("s3://no-such-bucket/x", "does not exist: check dataset.source"),
        ("s3://NO such bucket/x", "NO such bucket"),
    ],
)
def test_missing_object_or_bucket(tmp_path: Path, prefix: str, reason: str) -> None:
    assert reason in stage_error(download, config_of(tmp_path, prefix))


def test_wrong_or_missing_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-one")
    error = stage_error(download, config_of(tmp_path, "s3://library/ILSVRC"))
    assert "is forbidden" in error
    assert "wrong-one" not in error
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "credentials" in stage_error(download, config_of(tmp_path / "b", "s3://library/ILSVRC")).lower()


def test_endpoint_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = stage_error(download, config_of(tmp_path, "s3://library/ILSVRC"))
    assert "Could not connect to the endpoint URL" in error
    assert "download.retries" in error
