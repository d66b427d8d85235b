"""Uploads to all kinds of backends, and the command `datastores` on them, without faults."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import servers
import sh
from remote_workspace import Workspace
from sample_dataset import file_of

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_upload, ssh_backend, ssh_connection
from hpc_imagenet.datastore.backends.s3_client import S3Client
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.work import upload

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(remote_workspace: Workspace) -> Workspace:
    return remote_workspace


def test_upload_list_verify_fetch_and_delete(
    workspace: Workspace, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = workspace.upload(url)
    assert (result["datastore"], result["images"]) == ("digits@v1", 24)
    assert result["kept"] == result["reused"] == 0
    second = workspace.upload(url)
    assert (second["version"], second["kept"]) == (1, workspace.manifest.bytes)
    workspace.replace_dataset("2nd")
    assert workspace.upload(url)["datastore"] == "digits@v2"
    assert versions.complete_versions(url, "digits") == [1, 2]
    capsys.readouterr()
    assert workspace.command(url) == 0
    table = capsys.readouterr().out
    assert "digits@v1  complete      24  0.01" in table
    assert "digits@v2" in table
    assert workspace.command(url, "verify", "digits@v2") == 0
    assert "digits@v2 is intact: 0.019 GB read" in capsys.readouterr().out
    workspace.assert_stored(url, tmp_path / "here")
    assert workspace.command(url, "delete", "digits@v2", "--yes") == 0
    assert versions.complete_versions(url, "digits") == [1]
    assert workspace.command(url, "prune", "--yes", "--days=0") == 0
    assert workspace.upload(url)["datastore"] == "digits@v3"  # v2 was deleted: not used again


def test_verify_finds_damaged_and_missing_files(
    workspace: Workspace, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.upload(url)
    backend = versions.open_backend(url)
    backend.remove(["digits/v1/meta.bin"])
    backend.create("digits/v1/meta.bin", b"x" * 99)
    backend.remove(["digits/v1/val.npy"])
    assert workspace.command(url, "verify", "digits") == 1
    output = capsys.readouterr().out
    assert "meta.bin is damaged: its hash is " in output
    assert "val.npy is missing" in output


def test_upload_resumed_with_other_shards_of_the_same_images_leaves_no_old_ones(
    workspace: Workspace, url: str, tmp_path: Path
) -> None:
    workspace.upload(url)
    make_partial(url, workspace.manifest.content)
    first, *others = workspace.manifest.shards
    path = workspace.dataset / first.path
    renamed = path.rename(path.with_name("first.tar"))
    shard = replace(first, path=first.path.replace(path.name, renamed.name))
    workspace.manifest = replace(workspace.manifest, shards=(shard, *others))
    workspace.manifest.save(workspace.dataset)
    others = {"README", "shards/.train-0.tar.x7Yz"}  # a user's note, and what rsync writes for another upload
    backend = versions.open_backend(url)
    for name in others:
        backend.create(f"digits/v1/{name}", b"x")
    assert workspace.upload(url)["version"] == 1
    stored = backend.files("digits/v1").keys()
    assert others == stored - {"manifest.json"} - {file.path for file in version_files(workspace)}
    backend.remove([f"digits/v1/{name}" for name in others])
    workspace.assert_stored(url, tmp_path / "here")


def version_files(workspace: Workspace) -> list[File]:
    """Return the files of the workspace's dataset, with their paths in a version."""
    return list(upload.version_layout(workspace.manifest).all_files())


def other_files(tmp_path: Path) -> Workspace:
    """Return a workspace with the same images, but another file beside them."""
    workspace = Workspace(tmp_path / "other")
    path = workspace.dataset / "meta.bin"
    path.write_bytes(b"x" * path.stat().st_size)
    files = (file_of(path, path.name, "blake3"),)
    workspace.manifest = replace(workspace.manifest, files=files)
    workspace.manifest.save(workspace.dataset)
    return workspace


def make_partial(url: str, content: str) -> None:
    """Make an interrupted upload of a complete version, which has stored all files."""
    backend = versions.open_backend(url)
    backend.remove(["digits/v1/manifest.json"])
    backend.create("digits/v1/upload.json", json.dumps({"content": content}).encode())


@contextlib.contextmanager
def completed_after(
    monkeypatch: pytest.MonkeyPatch, of: Any, name: str, other: Workspace, url: str
) -> Iterator[None]:
    """Let another upload complete its version once after the first call of a function."""
    real, lock = getattr(of, name), threading.Lock()

    def complete(*arguments: Any) -> Any:
        found = real(*arguments)
        with lock:
            if getattr(of, name) is complete:
                monkeypatch.setattr(of, name, real)
                other.upload(url)
        return found

    monkeypatch.setattr(of, name, complete)
    yield
    assert getattr(of, name) is real


@pytest.mark.parametrize("url", ["moto", "rclone", "host"], indirect=True)
def test_upload_changes_no_version_that_another_completes_meanwhile(
    workspace: Workspace, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_files(tmp_path)
    other.upload(url)
    make_partial(url, other.manifest.content)
    of, name = (ssh_backend.SshBackend, "_hashes") if url.startswith("there") else (s3_upload, "list_uploads")
    error = "v1 was completed by another upload of the same images during this"
    with completed_after(monkeypatch, of, name, other, url), pytest.raises(UserError, match=error):
        workspace.upload(url)  # the files were listed before
    assert workspace.command(url, "verify", "digits") == 0
    assert workspace.upload(url)["version"] == 1
    assert workspace.command(url, "verify", "digits") == 0


@pytest.mark.parametrize("url", ["moto", "host"], indirect=True)
def test_older_files_do_not_replace_those_of_a_version_that_another_upload_completes(
    workspace: Workspace, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.upload(url)
    other = other_files(tmp_path)
    for each in (workspace, other):
        each.manifest = replace(each.manifest, content="2nd")
        each.manifest.save(each.dataset)
    of, name = (ssh_backend.SshBackend, "_hashes") if url.startswith("there") else (S3Client, "has_hash")
    error = "v2 was completed by another upload of the same images during this"
    with completed_after(monkeypatch, of, name, other, url), pytest.raises(UserError, match=error):
        workspace.upload(url)  # an older file was found, but not yet linked or copied
    assert workspace.command(url, "verify", "digits@v2") == 0


@pytest.mark.parametrize("url", ["host"], indirect=True)
@pytest.mark.parametrize("code", [255, 23])  # a lost connection, after which rsync is repeated; another error
@pytest.mark.usefixtures("quick")
def test_rsync_does_not_resume_in_a_version_that_another_upload_completes(
    workspace: Workspace, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    other, real = other_files(tmp_path), ssh_connection.SshConnection._retry

    def retry(self: Any, step: str, call: Any, *progress: Any) -> Any:
        def failing(out: Any) -> Any:
            if step == "sending" and ssh_connection.SshConnection._retry is retry:
                monkeypatch.setattr(ssh_connection.SshConnection, "_retry", real)
                assert other.upload(url)["version"] == 1
                raise getattr(sh, f"ErrorReturnCode_{code}")("rsync", b"", b"failed")
            return call(out)

        return real(self, step, failing, *progress)

    monkeypatch.setattr(ssh_connection.SshConnection, "_retry", retry)
    with pytest.raises(UserError, match=r"v1 was completed by another upload of the same images during this"):
        workspace.upload(url)
    assert workspace.command(url, "verify", "digits") == 0


@pytest.mark.parametrize("url", ["moto", "host"], indirect=True)
def test_upload_that_replaced_a_file_of_a_complete_version_fails(
    workspace: Workspace, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, other = versions.open_backend(url), other_files(tmp_path)
    real = type(backend).send

    def send(*arguments: Any) -> Any:
        stats = real(*arguments)
        monkeypatch.setattr(type(backend), "send", real)
        assert other.upload(url)["version"] == 1
        backend.remove(["digits/v1/meta.bin"])
        assert backend.create("digits/v1/meta.bin", (workspace.dataset / "meta.bin").read_bytes())
        return stats

    monkeypatch.setattr(type(backend), "send", send)
    line = (
        r"v1/meta\.bin was overwritten by another upload .*: delete it with datastores delete digits@v1 and"
    )
    with pytest.raises(UserError, match=line):
        workspace.upload(url)


@pytest.mark.parametrize("url", ["moto", "rclone", "host"], indirect=True)
def test_version_is_not_completed_with_a_file_of_another_upload(
    workspace: Workspace, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, other = versions.open_backend(url), other_files(tmp_path)
    real = type(backend).send

    def send(*arguments: Any) -> Any:
        stats = real(*arguments)
        backend.remove(["digits/v1/meta.bin"])
        assert backend.create("digits/v1/meta.bin", (other.dataset / "meta.bin").read_bytes())
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(type(backend), "send", send)
        with pytest.raises(
            UserError, match=r"v1/meta\.bin was overwritten by another upload of the same images"
        ):
            workspace.upload(url)
    assert versions.complete_versions(url, "digits") == []
    assert workspace.upload(url)["version"] == 1
    assert workspace.command(url, "verify", "digits") == 0


def test_parts_upload_and_a_last_job_commits(workspace: Workspace, url: str) -> None:
    parts = [workspace.upload(url, part=part, parts=3) for part in range(3)]
    assert sum(part["bytes"] for part in parts) == workspace.manifest.bytes
    assert all(part["copied"] + part["linked"] == part["bytes"] > 0 for part in parts)
    assert versions.complete_versions(url, "digits") == []
    whole = workspace.upload(url, parts=3)
    assert (whole["version"], whole["copied"]) == (1, 0)
    assert set(versions.open_backend(url).files("digits/v1")) == {
        "manifest.json",
        *(file.path for file in upload.version_layout(workspace.manifest).all_files()),
    }


def test_concurrent_uploads_of_the_same_dataset(workspace: Workspace, url: str, tmp_path: Path) -> None:
    results = run_concurrently(lambda: workspace.upload(url), lambda: workspace.upload(url))
    print(results)
    refused = [result for result in results if isinstance(result, UserError)]
    for error in refused:  # this server does not replace objects atomically
        assert "run it again" in str(error)
        assert "rclone" in os.environ["PYTEST_CURRENT_TEST"]
    assert len(refused) < 2
    assert workspace.upload(url)["version"] == 1
    workspace.assert_stored(url, tmp_path / "here")


def test_concurrent_uploads_of_different_datasets(workspace: Workspace, url: str, tmp_path: Path) -> None:
    first = workspace.manifest
    workspace.replace_dataset("other", name="other")
    results = run_concurrently(lambda: workspace.upload(url), lambda: workspace.upload(url, dataset="other"))
    refused = [result for result in results if isinstance(result, UserError)]
    for error in refused:  # this server has no conditional writes
        assert "run it again" in str(error)
        assert "rclone" in os.environ["PYTEST_CURRENT_TEST"]
    numbers = [workspace.upload(url, dataset=name)["version"] for name in ("digits", "other")]
    assert len(set(numbers)) == 2
    assert sorted(versions.complete_versions(url, "digits")) == sorted(numbers)
    assert workspace.command(url, "verify", f"digits@v{numbers[0]}") == 0
    assert workspace.command(url, "verify", f"digits@v{numbers[1]}") == 0
    assert first.content != workspace.manifest.content


def run_concurrently(*tasks: Any) -> list[Any]:
    """Run each task in a thread; return their results or UserErrors."""
    done: list[Any] = [None] * len(tasks)

    def work(number: int) -> None:
        try:
            done[number] = tasks[number]()
        except UserError as error:
            done[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


@pytest.mark.parametrize("url", ["moto", "rclone", "folder"], indirect=True)  # ssh: see the next test
def test_interrupted_fetch_resumes(
    workspace: Workspace, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.upload(url)
    backend, target = type(versions.open_backend(url)), tmp_path / "here"
    real, fetched = backend.fetch, []

    def interrupt(self: Any, path: str, *rest: Any) -> None:
        if len(fetched) == 2:
            raise KeyboardInterrupt
        fetched.append(path)
        real(self, path, *rest)

    monkeypatch.setattr(backend, "fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        workspace.command(url, "fetch", "digits", str(target))
    assert versions.complete_versions(str(target), "digits") == []
    resumed: list[str] = []
    monkeypatch.setattr(
        backend, "fetch", lambda self, path, *rest: (resumed.append(path), real(self, path, *rest))
    )
    workspace.assert_stored(url, target)
    assert not set(resumed) & set(fetched)


def test_interrupted_rsync_fetch_resumes(
    workspace: Workspace, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSYNC_RSH", host)
    url, target = f"there:{tmp_path}/stores", tmp_path / "here"
    workspace.upload(url)
    part = target / "digits" / "v1" / ssh_backend.FETCHED
    truncated, altered = (part / shard.path for shard in upload.version_layout(workspace.manifest).shards[:2])
    real, transferred = ssh_connection.SshConnection.rsync, []

    def run(self: ssh_connection.SshConnection, step: str, arguments: list[str], *progress: object) -> None:
        reported = [0]
        real(self, step, arguments, reported.append)
        transferred.append(max(reported))
        if not resuming:
            raise KeyboardInterrupt

    resuming = False
    monkeypatch.setattr(ssh_connection.SshConnection, "rsync", run)
    with pytest.raises(KeyboardInterrupt):
        workspace.command(url, "fetch", "digits", str(target))
    assert versions.complete_versions(str(target), "digits") == []
    assert transferred[0] >= sum(shard.bytes for shard in workspace.manifest.shards)
    data = truncated.read_bytes()
    truncated.write_bytes(b"x" + data[1 : len(data) // 2])  # truncated, and damaged at its beginning
    modified = altered.stat().st_mtime_ns
    altered.write_bytes(b"x" + altered.read_bytes()[1:])  # damaged in a way that rsync does not detect
    os.utime(altered, ns=(modified, modified))
    resuming = True
    size = altered.stat().st_size
    workspace.assert_stored(url, target)
    assert transferred[1:] == [len(data), size]  # one repaired, one fetched anew, no other files
    assert not part.exists()


def test_conflicting_claims_without_conditional_writes(
    workspace: Workspace, rclone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later claim wins; the earlier upload detects it when it commits, and creates no version."""
    servers.credentials(monkeypatch, rclone)
    url = f"s3://bucket/{tmp_path.name}"
    real = versions.VersionClaim.commit

    def commit(claim: versions.VersionClaim, manifest: Any) -> None:
        claim.backend.remove([f"{claim.path}/upload.json"])
        claim.backend.create(f"{claim.path}/upload.json", b'{"content": "other"}')
        real(claim, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(versions.VersionClaim, "commit", commit)
        with pytest.raises(UserError, match="claimed by another upload, during this upload: run it again"):
            workspace.upload(url)
    assert versions.complete_versions(url, "digits") == []
    assert workspace.upload(url)["version"] == 2


def test_unknown_host_is_reported(workspace: Workspace, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSYNC_RSH", host)
    with pytest.raises(UserError, match=r"^datastore\.url=unknown\.invalid:/x: ssh: .*resolve"):
        workspace.upload("unknown.invalid:/x")
