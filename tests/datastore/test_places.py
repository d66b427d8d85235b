"""What every place of datastores promises, held against a folder, two servers of S3 and an sshd."""

from __future__ import annotations

import hashlib
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
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

KINDS = ["folder", "rclone", "moto", "ssh"]
LATE = Reusable(written=4e9)  # a manifest of then vouches for every file of now

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def where(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Kind of place, and the endpoint or RSYNC_RSH."""
    with servers.place(request.param, tmp_path_factory.mktemp(request.param)) as how:
        yield request.param, how


@pytest.fixture
def place(where: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StorageBackend:
    kind, how = where
    if kind == "ssh":
        monkeypatch.setenv("RSYNC_RSH", how)
        return versions.open_backend(f"there:{tmp_path}/stores with 'odd names")
    if kind == "folder":
        return versions.open_backend(str(tmp_path / "stores"))
    servers.credentials(monkeypatch, how)
    monkeypatch.setattr(s3_upload, "WHOLE", 1 << 20)
    monkeypatch.setattr(s3_upload, "PART", 5 << 20)  # the least that S3 takes
    return versions.open_backend(f"s3://bucket/{tmp_path.name}/stores")


def piece(source: Path, data: bytes, path: str = "", algorithm: str = "sha256") -> UploadFile:
    source.write_bytes(data)
    value = hashlib.new(algorithm, data).hexdigest()
    return UploadFile(source, File(path or f"shards/{source.name}", len(data), f"{algorithm}:{value}"))


def send(
    place: StorageBackend, pieces: list[UploadFile], path: str = "a/v1", known: Reusable = LATE
) -> UploadStats:
    told: list[int] = []
    sent = place.send(pieces, path, known, lambda done, note: told.append(done))
    assert told == sorted(told)
    assert told[-1] == sent.total == sum(each.file.bytes for each in pieces)
    return sent


def test_versions_and_small_files(place: StorageBackend) -> None:
    assert place.versions() == place.versions("a") == []
    assert place.read(["a/v1/manifest.json"]) == {}
    assert place.claim("a/v1", "upload.json", b"one\n")
    assert not place.claim("a/v1", "upload.json", b"two\n")
    assert place.claim("a/v2", "upload.json", b"two\n")
    assert place.claim("b/v10", "upload.json", b"ten\n")
    assert sorted(place.versions("a")) == ["a/v1", "a/v2"]
    assert sorted(place.versions()) == ["a/v1", "a/v2", "b/v10"]
    paths = ["a/v1/upload.json", "a/v2/upload.json", "a/v3/upload.json", "a/v1/nothing"]
    assert place.read(paths) == {paths[0]: b"one\n", paths[1]: b"two\n"}
    assert place.create("a/v1/manifest.json", b"whole")
    assert not place.create("a/v1/manifest.json", b"other")
    assert place.read(["a/v1/manifest.json"]) == {"a/v1/manifest.json": b"whole"}
    stored = place.files("a/v1")
    assert {name: found.bytes for name, found in stored.items()} == {"manifest.json": 5, "upload.json": 4}
    place.remove(["a/v1/upload.json", "a/v1/never"])
    assert set(place.files("a/v1")) == {"manifest.json"}


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_files_arrive_whole_and_are_kept(place: StorageBackend, tmp_path: Path, algorithm: str) -> None:
    place.claim("a/v1", "upload.json", b"{}")
    sizes = {"0.tar": 12_345_678, "1.tar": 1 << 20, "2.tar": 1, "ä ö.tar": 4_000_000}
    pieces = [piece(tmp_path / name, os.urandom(size), "", algorithm) for name, size in sizes.items()]
    pieces.append(piece(tmp_path / "meta.bin", b"abc", "meta.bin", algorithm))
    total = sum(each.file.bytes for each in pieces)
    assert send(place, pieces[:2]) == UploadStats(copied=sum(each.file.bytes for each in pieces[:2]))
    again = send(place, pieces)
    assert again.total == total
    assert again.kept >= pieces[1].file.bytes
    assert send(place, pieces).kept >= sum(each.file.bytes for each in pieces if each.file.bytes <= 1 << 20)
    assert {name: found.bytes for name, found in place.files("a/v1").items() if name != "upload.json"} == {
        each.file.path: each.file.bytes for each in pieces
    }
    for each in pieces:
        path, target = f"a/v1/{each.file.path}", tmp_path / "fetched"
        assert place.hash(path, each.file, lambda done: None) == each.file.hash
        place.fetch(path, each.file, target, lambda done: None)
        assert target.read_bytes() == each.source.read_bytes()
    assert place.hash("a/v1/never", pieces[0].file, lambda done: None) is None
    with pytest.raises(UserError, match="never"):
        place.fetch("a/v1/never", pieces[0].file, tmp_path / "never", lambda done: None)


def test_an_older_version_spares_the_way(place: StorageBackend, tmp_path: Path) -> None:
    one = piece(tmp_path / "0.tar", os.urandom(3_000_000))
    place.claim("a/v1", "upload.json", b"{}")
    send(place, [one])
    older = {File("", one.file.bytes, one.file.hash): [f"a/v1/{one.file.path}"]}
    place.claim("a/v2", "upload.json", b"{}")
    renamed = replace(one, file=replace(one.file, path="shards/new.tar"))
    sent = send(place, [renamed], "a/v2", Reusable(4e9, older))
    assert sent == UploadStats(reused=one.file.bytes)
    assert place.hash("a/v2/shards/new.tar", one.file, lambda done: None) == one.file.hash
    place.delete_all("a/v1", "upload.json")  # it does not hang on the old one
    assert set(place.files("a/v1")) == {"upload.json"}
    assert place.hash("a/v2/shards/new.tar", one.file, lambda done: None) == one.file.hash


def test_other_bytes_are_refused_and_do_not_appear(place: StorageBackend, tmp_path: Path) -> None:
    place.claim("a/v1", "upload.json", b"{}")
    for size in (1000, 12_000_000):
        one = piece(tmp_path / f"{size}.tar", os.urandom(size))
        data = bytearray(one.source.read_bytes())
        data[size // 2] ^= 1
        one.source.write_bytes(data)
        with pytest.raises(UserError, match=r"tar is not what \+stage=process saw \(other bytes\)"):
            send(place, [one])
        with one.source.open("ab") as file:
            file.write(b"x")
        with pytest.raises(UserError, match=rf"\({size + 1} bytes instead of {size}\)"):
            send(place, [one])
        one.source.unlink()
        with pytest.raises(UserError, match=r"tar is missing: \+stage=download and \+stage=process make it"):
            send(place, [one])
    assert set(place.files("a/v1")) == {"upload.json"}


def test_a_fetch_goes_on_and_mends_what_is_wrong(place: StorageBackend, tmp_path: Path) -> None:
    place.claim("a/v1", "upload.json", b"{}")
    one = piece(tmp_path / "0.tar", os.urandom(20_000_000))
    send(place, [one])
    target, part = tmp_path / "there.tar", tmp_path / ".there.tar.part"
    data = one.source.read_bytes()
    for left in (data[:7_000_000], b"x" + data[1:7_000_000], data + b"more"):
        part.write_bytes(left)
        place.fetch(f"a/v1/{one.file.path}", one.file, target, lambda done: None)
        assert target.read_bytes() == data
        assert not part.exists()
    target.unlink()
    wrong = replace(one.file, hash="sha256:" + "0" * 64)
    with pytest.raises(UserError, match="other bytes than when it was made"):
        place.fetch(f"a/v1/{one.file.path}", wrong, target, lambda done: None)
    assert not target.exists()


def test_what_was_left_half_sent_is_tidied(place: StorageBackend, where: tuple[str, str]) -> None:
    place.claim("a/v1", "upload.json", b"{}")
    place.create("a/v1/shards.txt", b"x")
    place.create("a/v1/.manifest.json.1234.tmp", b"half")
    if place.folder:
        (place.folder / "a/v1/.fetched.tmp/shards").mkdir(parents=True)
        (place.folder / "a/v1/.fetched.tmp/shards/.0.tar.5678.tmp").write_bytes(b"half")
    place.remove_partial("a/v1")
    kept = {"upload.json", "shards.txt"}
    if where[0] in ("rclone", "moto"):  # where nothing has such a name on its way
        kept.add(".manifest.json.1234.tmp")
    assert set(place.files("a/v1")) == kept


def test_one_of_several_gets_a_number(place: StorageBackend) -> None:
    won: list[int] = []

    def take(number: int) -> None:
        if place.claim("a/v1", "upload.json", b"of %d" % number):
            won.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(place, s3_backend.S3Backend) and not place._server.conditional:
        pytest.skip("the server has no conditional writes; uploads find out when they commit")
    assert len(won) == 1
    assert place.read(["a/v1/upload.json"]) == {"a/v1/upload.json": b"of %d" % won[0]}
