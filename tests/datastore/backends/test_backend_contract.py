"""Contract tests of `StorageBackend`: a folder, two S3 servers and a host behind ssh."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import servers

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_backend, s3_upload
from hpc_imagenet.datastore.backends.storage_backend import Reusable, StorageBackend, UploadFile, UploadStats
from hpc_imagenet.datastore.file_hash import ALGORITHMS, new_digest
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

KINDS = ["folder", "rclone", "moto", "ssh", "ssh, b3sum"]
LATE = Reusable(manifest_time=4e9)  # later than any file, so that sources are not hashed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Kind of backend, and its endpoint or RSYNC_RSH."""
    with servers.storage_server(
        request.param, tmp_path_factory.mktemp(request.param.replace(", ", "-"))
    ) as access:
        yield request.param, access


@pytest.fixture
def backend(server: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StorageBackend:
    kind, access = server
    if kind.startswith("ssh"):
        monkeypatch.setenv("RSYNC_RSH", access)
        return versions.open_backend(f"there:{tmp_path}/stores with 'odd names")
    if kind == "folder":
        return versions.open_backend(str(tmp_path / "stores"))
    servers.credentials(monkeypatch, access)
    monkeypatch.setattr(s3_upload, "MAX_SINGLE", 1 << 20)
    monkeypatch.setattr(s3_upload, "PART", 5 << 20)  # the minimum of S3
    return versions.open_backend(f"s3://bucket/{tmp_path.name}/stores")


def make_item(source: Path, data: bytes, path: str = "", algorithm: str = "blake3") -> UploadFile:
    source.write_bytes(data)
    digest = new_digest(algorithm)
    digest.update(data)
    value = digest.hexdigest()
    return UploadFile(source, File(path or f"shards/{source.name}", len(data), f"{algorithm}:{value}"))


def send(
    backend: StorageBackend, items: list[UploadFile], path: str = "a/v1", reusable: Reusable = LATE
) -> UploadStats:
    reported: list[int] = []
    stats = backend.send(items, path, reusable, lambda done, step: reported.append(done))
    assert reported == sorted(reported)
    assert reported[-1] == stats.total == sum(item.file.bytes for item in items)
    return stats


def test_versions_and_small_files(backend: StorageBackend) -> None:
    assert backend.versions() == backend.versions("a") == []
    assert backend.read(["a/v1/manifest.json"]) == {}
    assert backend.claim("a/v1", "upload.json", b"one\n")
    assert not backend.claim("a/v1", "upload.json", b"two\n")
    assert backend.claim("a/v2", "upload.json", b"two\n")
    assert backend.claim("b/v10", "upload.json", b"ten\n")
    assert sorted(backend.versions("a")) == ["a/v1", "a/v2"]
    assert sorted(backend.versions()) == ["a/v1", "a/v2", "b/v10"]
    paths = ["a/v1/upload.json", "a/v2/upload.json", "a/v3/upload.json", "a/v1/nothing"]
    assert backend.read(paths) == {paths[0]: b"one\n", paths[1]: b"two\n"}
    assert backend.create("a/v1/manifest.json", b"whole")
    assert not backend.create("a/v1/manifest.json", b"other")
    assert backend.read(["a/v1/manifest.json"]) == {"a/v1/manifest.json": b"whole"}
    stored = backend.files("a/v1")
    assert {name: file.bytes for name, file in stored.items()} == {"manifest.json": 5, "upload.json": 4}
    backend.remove(["a/v1/upload.json", "a/v1/never"])
    assert set(backend.files("a/v1")) == {"manifest.json"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_upload_keep_and_fetch_files(backend: StorageBackend, tmp_path: Path, algorithm: str) -> None:
    backend.claim("a/v1", "upload.json", b"{}")
    sizes = {"0.tar": 12_345_678, "1.tar": 1 << 20, "2.tar": 1, "ä ö.tar": 4_000_000}
    items = [make_item(tmp_path / name, os.urandom(size), "", algorithm) for name, size in sizes.items()]
    items.append(make_item(tmp_path / "meta.bin", b"abc", "meta.bin", algorithm))
    total = sum(item.file.bytes for item in items)
    assert send(backend, items[:2]) == UploadStats(copied=sum(item.file.bytes for item in items[:2]))
    stats = send(backend, items)
    assert stats.total == total
    assert stats.kept >= items[1].file.bytes
    assert send(backend, items).kept >= sum(item.file.bytes for item in items if item.file.bytes <= 1 << 20)
    assert {name: file.bytes for name, file in backend.files("a/v1").items() if name != "upload.json"} == {
        item.file.path: item.file.bytes for item in items
    }
    for item in items:
        path, target = f"a/v1/{item.file.path}", tmp_path / "fetched"
        assert backend.hash(path, item.file, lambda done: None) == item.file.hash
        backend.fetch(path, item.file, target, lambda done: None)
        assert target.read_bytes() == item.source.read_bytes()
    assert backend.hash("a/v1/never", items[0].file, lambda done: None) is None
    with pytest.raises(UserError, match="never"):
        backend.fetch("a/v1/never", items[0].file, tmp_path / "never", lambda done: None)


def test_files_of_an_older_version_are_reused(backend: StorageBackend, tmp_path: Path) -> None:
    item = make_item(tmp_path / "0.tar", os.urandom(3_000_000))
    backend.claim("a/v1", "upload.json", b"{}")
    send(backend, [item])
    older = {File("", item.file.bytes, item.file.hash): [f"a/v1/{item.file.path}"]}
    backend.claim("a/v2", "upload.json", b"{}")
    renamed = replace(item, file=replace(item.file, path="shards/new.tar"))
    stats = send(backend, [renamed], "a/v2", Reusable(4e9, older))
    assert stats == UploadStats(reused=item.file.bytes)
    assert backend.hash("a/v2/shards/new.tar", item.file, lambda done: None) == item.file.hash
    backend.delete_all("a/v1", "upload.json")  # the new version does not depend on the old one
    assert set(backend.files("a/v1")) == {"upload.json"}
    assert backend.hash("a/v2/shards/new.tar", item.file, lambda done: None) == item.file.hash


def test_changed_source_is_refused_and_not_stored(backend: StorageBackend, tmp_path: Path) -> None:
    backend.claim("a/v1", "upload.json", b"{}")
    for size in (1000, 12_000_000):
        item = make_item(tmp_path / f"{size}.tar", os.urandom(size))
        data = bytearray(item.source.read_bytes())
        data[size // 2] ^= 1
        item.source.write_bytes(data)
        with pytest.raises(UserError, match=r"tar changed after \+stage=process \(different content\)"):
            send(backend, [item])
        with item.source.open("ab") as file:
            file.write(b"x")
        with pytest.raises(UserError, match=rf"\({size + 1} bytes instead of {size}\)"):
            send(backend, [item])
        item.source.unlink()
        with pytest.raises(UserError, match=r"tar is missing: run \+stage=download and \+stage=process"):
            send(backend, [item])
    assert set(backend.files("a/v1")) == {"upload.json"}


def test_stored_file_with_other_bytes_is_replaced(backend: StorageBackend, tmp_path: Path) -> None:
    backend.claim("a/v1", "upload.json", b"{}")
    send(backend, [make_item(tmp_path / "0.tar", os.urandom(70_000))])
    item = make_item(tmp_path / "0.tar", os.urandom(70_000))
    stats = send(backend, [item])
    assert (stats.copied, stats.kept) == (70_000, 0)
    assert backend.hash("a/v1/shards/0.tar", item.file, lambda done: None) == item.file.hash


def test_changed_source_that_equals_the_stored_file_is_refused(
    backend: StorageBackend, tmp_path: Path
) -> None:
    backend.claim("a/v1", "upload.json", b"{}")
    listed = make_item(tmp_path / "0.tar", os.urandom(70_000))
    send(backend, [make_item(tmp_path / "0.tar", os.urandom(70_000))])
    with pytest.raises(UserError, match="changed after"):
        send(backend, [replace(listed, source=tmp_path / "0.tar")])


def test_fetch_resumes_and_replaces_damaged_partial_files(backend: StorageBackend, tmp_path: Path) -> None:
    backend.claim("a/v1", "upload.json", b"{}")
    item = make_item(tmp_path / "0.tar", os.urandom(20_000_000))
    send(backend, [item])
    target, part = tmp_path / "there.tar", tmp_path / ".there.tar.part"
    data = item.source.read_bytes()
    for left in (data[:7_000_000], b"x" + data[1:7_000_000], data + b"more"):
        part.write_bytes(left)
        backend.fetch(f"a/v1/{item.file.path}", item.file, target, lambda done: None)
        assert target.read_bytes() == data
        assert not part.exists()
    target.unlink()
    wrong = replace(item.file, hash="blake3:" + "0" * 64)
    with pytest.raises(UserError, match="is damaged: its hash is"):
        backend.fetch(f"a/v1/{item.file.path}", wrong, target, lambda done: None)
    assert not target.exists()


def test_partial_files_are_removed(backend: StorageBackend, server: tuple[str, str]) -> None:
    backend.claim("a/v1", "upload.json", b"{}")
    backend.create("a/v1/shards.txt", b"x")
    backend.create("a/v1/.manifest.json.1234.tmp", b"half")
    if backend.folder:
        (backend.folder / "a/v1/.fetched.tmp/shards").mkdir(parents=True)
        (backend.folder / "a/v1/.fetched.tmp/shards/.0.tar.5678.tmp").write_bytes(b"half")
    backend.remove_partial("a/v1")
    kept = {"upload.json", "shards.txt"}
    if server[0] in ("rclone", "moto"):  # S3 backends use no temporary names
        kept.add(".manifest.json.1234.tmp")
    assert set(backend.files("a/v1")) == kept


def test_one_of_several_concurrent_claims_succeeds(backend: StorageBackend) -> None:
    winners: list[int] = []

    def claim(number: int) -> None:
        if backend.claim("a/v1", "upload.json", b"of %d" % number):
            winners.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(backend, s3_backend.S3Backend) and not backend._client.conditional_writes:
        pytest.skip("the server has no conditional writes; uploads detect the conflict when they commit")
    assert len(winners) == 1
    assert backend.read(["a/v1/upload.json"]) == {"a/v1/upload.json": b"of %d" % winners[0]}
