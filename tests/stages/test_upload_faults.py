"""Uploads and fetches with faults: failing servers and connections, bad credentials, full disks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from faulty_s3 import KINDS, Faults, response
from relay import Relay
from remote_workspace import Workspace

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_upload
from hpc_imagenet.errors import UserError

OUTAGE = float(os.environ.get("HPC_IMAGENET_TEST_AWAY", "0.5"))  # s; from 5 on with the real retry waits

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(remote_workspace: Workspace) -> Workspace:
    return remote_workspace


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
def test_server_faults_are_retried(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path, kind: str
) -> None:
    faults.every, faults.kinds = 5, (kind,)
    if kind == "sum":
        faults.every, faults.only = 3, b"partNumber"
    if kind == "flip":  # a damaged file is fetched once more; damaged twice is an error
        faults.every, faults.only = 1, b"/shards/train-1.tar"
        assert workspace.upload(bucket)["version"] == 1
        with pytest.raises(UserError, match=r"train-1\.tar is damaged: its hash is"):
            workspace.command(bucket, "fetch", "digits", str(tmp_path / "here"))
        assert versions.complete_versions(str(tmp_path / "here"), "digits") == []
        assert faults.injected[kind] >= 2
        faults.every = 0
    assert workspace.upload(bucket)["version"] == 1
    workspace.assert_stored(bucket, tmp_path / "here")
    assert faults.injected[kind]
    faults.every = 0
    assert workspace.command(bucket, "verify", "digits") == 0


@pytest.mark.usefixtures("quick")
def test_file_damaged_once_in_transfer_is_fetched_again(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    workspace.upload(bucket)
    faults.every, faults.kinds, faults.only, faults.most = 1, ("flip",), b"/shards/train-1.tar", 1
    workspace.assert_stored(bucket, tmp_path / "here")
    assert faults.injected == {"flip": 1}


@pytest.mark.usefixtures("quick")
def test_truncated_headers_are_retried(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    workspace.upload(bucket)
    faults.only = b"HEAD"
    faults.responses = [
        b'HTTP/1.1 200 OK\r\nETag: "x"\r\n\r\n',
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
    ]
    assert workspace.command(bucket, "verify", "digits") == 0
    assert not faults.responses


def test_upload_survives_a_server_outage(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if OUTAGE < 5:
        request.getfixturevalue("quick")
    faults.outage = OUTAGE
    assert workspace.upload(bucket)["version"] == 1
    assert 0 < faults.unavailable_until < time.monotonic()
    workspace.assert_stored(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_persistent_server_error_creates_no_version(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    faults.responses = [response("503", "SlowDown")] * 100
    faults.only = b"shards/train-1.tar"
    with pytest.raises(
        UserError, match=r"failed 9 times in a row: the server replied 503 SlowDown; .*run it again"
    ) as caught:
        workspace.upload(bucket)
    assert "\n" not in str(caught.value)
    assert versions.complete_versions(bucket, "digits") == []
    faults.responses = []
    assert workspace.upload(bucket)["kept"] > 0
    workspace.assert_stored(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (("403", "AccessDenied"), r"is forbidden \(AccessDenied\): check the credentials"),
        (("403", "InvalidAccessKeyId"), r"is forbidden \(InvalidAccessKeyId\)"),
        (("400", "ExpiredToken"), r"the credentials have expired \(ExpiredToken\)"),
        (("404", "NoSuchBucket"), r"bucket bucket does not exist: create it first"),
        (("400", "BadDigest"), r"failed 9 times in a row: the server replied 400 BadDigest;"),
        (
            ("507", "InsufficientCapacity"),
            r"failed 9 times in a row: the server replied 507 InsufficientCapacity;",
        ),
    ],
)
def test_permanent_server_errors_are_reported(
    workspace: Workspace, faults: Faults, bucket: str, fault: tuple[str, str], line: str
) -> None:
    faults.only, faults.responses = b"PUT", [response(*fault)] * 100
    with pytest.raises(UserError, match=line) as caught:
        workspace.upload(bucket)
    assert "\n" not in str(caught.value)
    assert servers.SECRET not in str(caught.value)
    assert versions.complete_versions(bucket, "digits") == []


@pytest.mark.usefixtures("quick")
def test_full_bucket(
    workspace: Workspace, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "bucket").mkdir()
    with servers.rclone(small_disk) as endpoint:
        servers.credentials(monkeypatch, endpoint)
        with pytest.raises(UserError, match=r"^datastore\.url=s3://bucket/x: .*run it again") as caught:
            workspace.upload("s3://bucket/x")
        assert "\n" not in str(caught.value)
        assert versions.complete_versions("s3://bucket/x", "digits") == []
        subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
        for _ in range(4):
            # This server does not recover parts that it could not write: an attempt detects and drops them.
            with contextlib.suppress(UserError):
                workspace.upload("s3://bucket/x")
        assert versions.complete_versions("s3://bucket/x", "digits") == [1]
        workspace.assert_stored("s3://bucket/x", tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_full_disk_on_the_host(
    workspace: Workspace, host: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSYNC_RSH", host)
    url = f"there:{small_disk}"
    with pytest.raises(UserError, match="No space left"):
        workspace.upload(url)
    assert versions.complete_versions(url, "digits") == []
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    assert workspace.upload(url)["version"] == 1
    workspace.assert_stored(url, tmp_path / "here")


def test_upload_resumes_after_connection_errors(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if OUTAGE < 5:
        request.getfixturevalue("quick")
    (tmp_path / "sshd").mkdir()
    size = workspace.manifest.bytes
    with Relay().running() as relay, servers.sshd(tmp_path / "sshd", relay) as shell:
        monkeypatch.setenv("RSYNC_RSH", shell)
        relay.cut_at, relay.outage = [size // 3, size * 2 // 3], OUTAGE / 5
        assert workspace.upload(f"there:{tmp_path}/stores")["version"] == 1
        assert not relay.cut_at
        assert relay.bytes_up < 1.5 * size  # received data was not sent again
        workspace.assert_stored(f"there:{tmp_path}/stores", tmp_path / "here")
        workspace.replace_dataset("2nd")
        relay.cut_at, relay.outage = [relay.bytes_up + size // 2], OUTAGE * 100
        with pytest.raises(
            UserError, match=r"times in a row: .*; transferred data is kept: run it again"
        ) as caught:
            workspace.upload(f"there:{tmp_path}/stores")
        assert "\n" not in str(caught.value)
        relay.end_outage()
        assert versions.complete_versions(f"there:{tmp_path}/stores", "digits") == [1]
        assert workspace.upload(f"there:{tmp_path}/stores")["version"] == 2
        workspace.assert_stored(f"there:{tmp_path}/stores", tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_file_modified_while_it_is_read(
    workspace: Workspace, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "MEMORY", s3_upload.PART)  # read only one part ahead
    archive = workspace.dataset / workspace.manifest.shards[0].path
    monkeypatch.setattr(os, "link", refuse)
    backend = versions.open_backend(url)
    real = type(backend).send

    def send(self: object, items: object, path: str, reusable: object, progress: object) -> object:
        def modify(done: int, step: str) -> None:
            if done > 2_000_000:
                os.utime(archive)

        return real(self, items, path, reusable, modify)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(backend), "send", send)
        with pytest.raises(UserError, match=r"train-0\.tar changed after \+stage=process \(modified while"):
            workspace.upload(url)
    assert versions.complete_versions(url, "digits") == []
    assert workspace.upload(url)["version"] == 1
    assert workspace.command(url, "verify", "digits") == 0


def refuse(source: object, destination: object) -> None:
    raise OSError(18, "Invalid cross-device link")
