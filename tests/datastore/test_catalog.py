"""Fetch into a folder that has something already, versions of other users, and deleting on a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from other_users import unprivileged
from sample_dataset import file_of

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.backends.folder_backend import FolderBackend
from hpc_imagenet.datastore.catalog import CatalogEntry
from hpc_imagenet.datastore.manifest import Manifest
from hpc_imagenet.errors import UserError


def write_version(folder: Path, number: int, data: bytes = b"images") -> Path:
    """Write a complete version of `digits` with one shard; return its folder."""
    version = folder / "digits" / f"v{number}"
    (version / "shards").mkdir(parents=True)
    (version / "shards/0.tar").write_bytes(data)
    shard = file_of(version / "shards/0.tar", "shards/0.tar", "blake3")
    Manifest("digits", data.hex(), "2026", (), (shard,), {}).save(version)
    return version


def fetch(source: Path, target: Path, check: bool = True) -> Path:
    backend = FolderBackend(source)
    entry = catalog.find_version(backend, "digits@v1")
    return catalog.fetch_version(backend, entry, target, 1, lambda done, step: None, check)


def entry_of(folder: Path, number: int) -> CatalogEntry:
    return next(e for e in catalog.list_versions(FolderBackend(folder), "digits") if e.number == number)


def test_fetch_again_replaces_damaged_files_of_the_copy(tmp_path: Path) -> None:
    write_version(tmp_path / "source", 1)
    copy = fetch(tmp_path / "source", tmp_path / "copy")
    shard = copy / "shards/0.tar"
    shard.chmod(0o644)
    shard.write_bytes(b"damage")
    assert fetch(tmp_path / "source", tmp_path / "copy", check=False) == copy
    assert shard.read_bytes() == b"damage"
    assert fetch(tmp_path / "source", tmp_path / "copy") == copy
    assert (shard.read_bytes(), shard.stat().st_mode & 0o222) == (b"images", 0)
    assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", "shards"]


def test_a_version_is_found_in_the_backend_that_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(tmp_path, 1)
    monkeypatch.delattr(versions, "open_backend")  # for a bucket it takes a second
    assert catalog.find_version(FolderBackend(tmp_path), "digits").reference == "digits@v1"


def test_fetch_into_a_folder_whose_name_looks_like_a_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(tmp_path / "source", 1)
    monkeypatch.chdir(tmp_path)
    assert (fetch(Path("source"), Path("backup:2026")) / "manifest.json").exists()


def test_fetch_of_a_number_that_the_folder_used_already(tmp_path: Path) -> None:
    write_version(tmp_path / "source", 1)
    write_version(tmp_path / "other", 1, b"other images")
    fetch(tmp_path / "source", tmp_path / "copy")
    catalog.delete_version(FolderBackend(tmp_path / "copy"), entry_of(tmp_path / "copy", 1))
    for folder, state in (("copy", "was deleted"), ("other", "exists")):
        line = (
            f"datastore digits@v1 {state}; versions never change: "
            f"fetch it to another folder than {tmp_path / folder}"
        )
        with pytest.raises(UserError, match=f"^{line}$"):
            fetch(tmp_path / "source", tmp_path / folder)


def test_a_damaged_copy_is_hashed_once_and_needs_space_for_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FolderBackend(tmp_path / "source")
    write_version(tmp_path / "source", 1)
    entry, done = catalog.find_version(backend, "digits@v1"), [0]
    shard = fetch(tmp_path / "source", tmp_path / "copy") / "shards/0.tar"
    shard.unlink()
    shard.write_bytes(b"damage")
    with monkeypatch.context() as full:
        full.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 1, 9, 0, 0, 9, 9, 9, 0, 255)))
        with pytest.raises(UserError, match="free space for digits@v1: it needs 6 bytes"):
            fetch(tmp_path / "source", tmp_path / "copy")
    catalog.fetch_version(backend, entry, tmp_path / "copy", 1, lambda count, step: done.append(count))
    assert done[-1] == 2 * len(b"damage")  # hashed, then fetched


def test_an_interrupted_fetch_of_other_shards_is_no_part_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(tmp_path / "source", 1)
    copy = tmp_path / "copy/digits/v1"
    (copy / "shards").mkdir(parents=True)
    (copy / "shards/old.tar").write_bytes(b"the same images in another shard")
    (copy / versions.CLAIM).write_text(json.dumps({"content": b"images".hex()}))
    with monkeypatch.context() as full:
        full.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 1, 9, 0, 0, 9, 9, 9, 0, 255)))
        with pytest.raises(UserError, match="free space for digits@v1: it needs 6 bytes"):
            fetch(tmp_path / "source", tmp_path / "copy")
    assert fetch(tmp_path / "source", tmp_path / "copy") == copy
    assert sorted(path.name for path in copy.rglob("*")) == ["0.tar", "manifest.json", "shards"]


@pytest.mark.parametrize("locked", ["digits/v2", "digits/v2/manifest.json"])
def test_an_unreadable_version_of_another_user_hides_no_other(
    public_path: Path, locked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_version(public_path, 1)
    folder, url = write_version(public_path, 2, b"other images"), str(public_path)
    (public_path / locked).chmod(0)
    backend = FolderBackend(public_path)
    try:
        with unprivileged():
            assert [versions.open_version(Datastore("digits", url)).number for _ in "12"] == [1, 1]
            (warning,) = capsys.readouterr().err.splitlines()
            assert warning.startswith("warning: datastore digits@v2 cannot be read: have its owner, ")
            assert warning.endswith(f", run chmod -R g+rX {folder}; until then v1 is the newest")
            assert [entry.state for entry in catalog.list_versions(backend)] == ["complete", "unreadable"]
            assert len(versions.existing_files(backend, "digits")) == 1
            line = rf"^datastore digits@v2 cannot be read: have its owner, \S+, run chmod -R g\+rX {folder}$"
            with pytest.raises(UserError, match=line):
                versions.open_version(Datastore("digits@v2", url))
            with pytest.raises(UserError, match="digits@v3 does not exist; complete: v1"):
                versions.open_version(Datastore("digits@v3", url))
        assert not capsys.readouterr().err
        (public_path / "digits/v1/manifest.json").unlink()
        with unprivileged(), pytest.raises(UserError, match="digits@v2 cannot be read"):
            versions.open_version(Datastore("digits", url))
    finally:
        (public_path / locked).chmod(0o700)


def test_an_unreadable_datastore_of_another_user_is_not_listed(public_path: Path) -> None:
    write_version(public_path, 1)
    (public_path / "theirs/v1").mkdir(parents=True)
    (public_path / "theirs").chmod(0)
    backend = FolderBackend(public_path)
    try:
        with unprivileged():
            assert [entry.reference for entry in catalog.list_versions(backend)] == ["digits@v1"]
            with pytest.raises(PermissionError):
                backend.versions("theirs")
    finally:
        (public_path / "theirs").chmod(0o700)


def test_prune_waits_for_the_uploads_of_parts(tmp_path: Path) -> None:
    backend = FolderBackend(tmp_path)
    versions.claim_version(backend, Datastore("digits", str(tmp_path)), "content", {})
    entry = entry_of(tmp_path, 1)
    with (
        backend.lock("digits/v1/upload-1-of-2.lock", lambda: None),
        pytest.raises(UserError, match="digits@v1: an upload to it is running"),
        catalog.exclusive(backend, entry),
    ):
        pass
    with catalog.exclusive(backend, entry):
        catalog.delete_version(backend, entry)


def test_a_version_is_deleted_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = write_version(tmp_path, 1), os.fsync

    def full_until_deleted(descriptor: int) -> None:
        if (folder / "shards").exists():
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_until_deleted)
    catalog.delete_version(FolderBackend(tmp_path), entry_of(tmp_path, 1))
    assert [path.name for path in folder.iterdir()] == [versions.DELETED]
