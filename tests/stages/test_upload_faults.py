"""Uploads and fetches with faults: failing servers and connections, bad credentials, full disks."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import servers
from faulty_s3 import KINDS, Faults, proxy, response
from relay import Relay
from remote_workspace import Workspace
from sample_dataset import file_of

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_upload
from hpc_imagenet.errors import UserError

OUTAGE = float(os.environ.get("HPC_IMAGENET_TEST_AWAY", "0.5"))  # s; from 5 on with the real retry waits

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(remote_workspace: Workspace) -> Workspace:
    return remote_workspace


@pytest.fixture
def faults(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    faults = Faults(seed=random.SystemRandom().randrange(10**6))
    print(f"seed {faults.seed}")
    with proxy(moto, faults) as endpoint:
        servers.credentials(monkeypatch, endpoint)
        yield faults


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


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
def test_only_missing_parts_are_sent_again(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.only = b"partNumber=2"
    faults.responses = [response("403", "ExpiredToken")] * 100
    with pytest.raises(UserError, match=r"the credentials have expired \(ExpiredToken\): renew them"):
        workspace.upload(bucket)
    assert versions.complete_versions(bucket, "digits") == []
    faults.responses, faults.request_lines = [], []
    with completions(monkeypatch) as requests:
        assert workspace.upload(bucket)["version"] == 1
    parts = [part for request in requests for part in request["MultipartUpload"]["Parts"]]
    sent = [line for line in faults.request_lines if b"PUT" in line and b"partNumber=" in line]
    # Amazon wants the checksum of each part; this server returns none for those that were sent now.
    assert len([part for part in parts if "ChecksumCRC32" in part]) == len(parts) - len(sent) > 0
    resent = [line for line in faults.request_lines if b"PUT" in line and b"partNumber=1&" in line]
    assert len(resent) < 3  # three shards have a first part
    workspace.assert_stored(bucket, tmp_path / "here")


@contextlib.contextmanager
def completions(
    monkeypatch: pytest.MonkeyPatch, refuses: Callable[[str], bool] = lambda _: False
) -> Iterator[list[dict[str, Any]]]:
    """Collect the parameters of all requests that complete a multipart upload; refuse some upload ids."""
    from botocore.client import BaseClient
    from botocore.exceptions import ClientError

    real, requests = BaseClient._make_api_call, []

    def call(self: Any, operation: str, params: dict[str, Any]) -> Any:
        if operation == "CompleteMultipartUpload":
            requests.append(params)
            if refuses(params["UploadId"]):
                error = {"Code": "InvalidRequest", "Message": "It was missing for part 1"}
                status = {"HTTPStatusCode": 400}
                raise ClientError({"Error": error, "ResponseMetadata": status}, operation)
        return real(self, operation, params)

    with monkeypatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", call)
        yield requests


@pytest.mark.usefixtures("quick")
def test_multipart_upload_that_cannot_be_completed_is_started_anew(
    workspace: Workspace,
    faults: Faults,
    moto: str,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults.only, faults.responses = b"partNumber=2", [response("403", "ExpiredToken")] * 100
    with pytest.raises(UserError, match="expired"):
        workspace.upload(bucket)
    faults.responses = []
    listed = servers.bucket_client(moto).list_multipart_uploads(Bucket="bucket")  # type: ignore[attr-defined]
    started = {upload["UploadId"] for upload in listed["Uploads"] if upload["Key"].endswith("train-0.tar")}
    assert started
    with completions(monkeypatch, started.__contains__):
        with pytest.raises(
            UserError,
            match=r"completing shards/train-0\.tar: InvalidRequest It was missing .*: run it again to",
        ):
            workspace.upload(bucket)
        assert workspace.upload(bucket)["version"] == 1
    workspace.assert_stored(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_parts_are_kept_while_the_server_is_overloaded(
    workspace: Workspace,
    faults: Faults,
    moto: str,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with completions(monkeypatch, lambda _: True), pytest.raises(UserError, match="InvalidRequest"):
        workspace.upload(bucket)
    client: Any = servers.bucket_client(moto)
    prefix = bucket.removeprefix("s3://bucket/")

    def parts() -> set[str]:
        uploads = client.list_multipart_uploads(Bucket="bucket", Prefix=prefix).get("Uploads", [])
        return {
            f"/{upload['Key']}?partNumber={part['PartNumber']}&uploadId={upload['UploadId']} "
            for upload in uploads
            for part in client.list_parts(
                Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"]
            ).get("Parts", [])
        }

    kept = parts()
    assert kept
    for fault in (("503", "SlowDown"), ("409", "OperationAborted"), ("403", "AccessDenied")):
        faults.only, faults.responses = b"POST", [response(*fault)] * 100
        with pytest.raises(UserError, match=fault[1]):
            workspace.upload(bucket)
        assert parts() >= kept
    faults.responses, faults.request_lines = [], []
    assert workspace.upload(bucket)["version"] == 1
    sent = {line for line in faults.request_lines if b"PUT" in line and b"partNumber=" in line}
    assert not [line for line in sent for part in kept if part.encode() in line]
    workspace.assert_stored(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_multipart_upload_of_another_file_of_that_name_is_replaced(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    faults.only, faults.responses = b"partNumber=2", [response("403", "ExpiredToken")] * 100
    with pytest.raises(UserError, match="expired"):
        workspace.upload(bucket)
    faults.responses = []
    # The same images in other shards: the first parts of the files are equal.
    first = workspace.dataset / workspace.manifest.shards[0].path
    data = first.read_bytes()
    first.unlink()
    first.write_bytes(data + bytes(512))
    shards = (file_of(first, workspace.manifest.shards[0].path), *workspace.manifest.shards[1:])
    workspace.manifest = replace(workspace.manifest, shards=shards)
    workspace.manifest.save(workspace.dataset)
    with pytest.raises(
        UserError, match=r"train-0\.tar has the hash of another file, for which its upload was"
    ):
        workspace.upload(bucket)
    assert versions.complete_versions(bucket, "digits") == []
    assert workspace.upload(bucket)["version"] == 1
    workspace.assert_stored(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_abandoned_multipart_uploads_are_removed(
    workspace: Workspace, faults: Faults, moto: str, bucket: str
) -> None:
    client = servers.bucket_client(moto)
    key = f"{bucket.removeprefix('s3://bucket/')}/digits/v1/shards/train-0.tar"
    metadata = {"hash": workspace.manifest.shards[0].hash}
    for _ in range(2):
        client.create_multipart_upload(Bucket="bucket", Key=key, Metadata=metadata)  # type: ignore[attr-defined]
    workspace.upload(bucket)
    left = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])  # type: ignore[attr-defined]
    assert [upload for upload in left if upload["Key"] == key] == []


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
