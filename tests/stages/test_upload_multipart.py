"""Uploads of large files to S3 that are interrupted: which parts are kept, and when an upload begins anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import servers
from faulty_s3 import Faults, response
from remote_workspace import Workspace
from sample_dataset import file_of

from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(remote_workspace: Workspace) -> Workspace:
    return remote_workspace


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


def interrupt(workspace: Workspace, faults: Faults, bucket: str) -> None:
    """Interrupt an upload after the first part of each large file."""
    faults.only, faults.responses = b"partNumber=2", [response("403", "ExpiredToken")] * 100
    with pytest.raises(UserError, match="expired"):
        workspace.upload(bucket)
    faults.responses = []


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
    interrupt(workspace, faults, bucket)
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
    failures = [("503", "SlowDown"), ("500", "InternalError"), ("409", "OperationAborted")]
    for fault in (*failures, ("403", "AccessDenied")):
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
@pytest.mark.parametrize(("status", "dropped"), [("500", True), ("503", False)])
def test_a_resumed_upload_is_dropped_if_the_server_fails_at_its_parts(
    workspace: Workspace, faults: Faults, moto: str, bucket: str, status: str, dropped: bool
) -> None:
    client: Any = servers.bucket_client(moto)

    def unfinished() -> set[str]:
        return {
            each["UploadId"] for each in client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        }

    before = unfinished()
    interrupt(workspace, faults, bucket)
    begun = unfinished() - before
    assert begun
    faults.responses = [response(status, "Failure")] * 100
    with pytest.raises(UserError, match=f"{status} Failure.*run it again"):
        workspace.upload(bucket)
    faults.responses = []
    assert (begun <= unfinished()) != dropped
    assert workspace.upload(bucket)["version"] == 1


@pytest.mark.usefixtures("quick")
def test_multipart_upload_of_another_file_of_that_name_is_replaced(
    workspace: Workspace, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    interrupt(workspace, faults, bucket)
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
