import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.datastore import file_hash
from hpc_imagenet.datastore.backends import folder_backend
from hpc_imagenet.datastore.backends.folder_backend import FolderBackend
from hpc_imagenet.datastore.backends.storage_backend import (
    ProgressCallback,
    Reusable,
    UploadFile,
    UploadStats,
    explain_os_errors,
)
from hpc_imagenet.datastore.file_hash import ALGORITHMS, new_digest
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

FUTURE = 4e9  # manifest time later than any file, so that sources are not hashed


def ignore(done: int, step: str) -> None:
    pass


def send(
    items: list[UploadFile], target: Path, manifest_time: float, progress: ProgressCallback
) -> UploadStats:
    return FolderBackend(target.parent).send(items, target.name, Reusable(manifest_time), progress)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "v1").mkdir()
    return tmp_path / "v1"


@pytest.fixture
def item(tmp_path: Path) -> UploadFile:
    return make_item(tmp_path / "a.tar", b"x" * 10_000, "md5")


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, destination: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)


def make_item(source: Path, data: bytes, algorithm: str = "blake3", link: bool = True) -> UploadFile:
    source.write_bytes(data)
    digest = new_digest(algorithm)
    digest.update(data)
    value = digest.hexdigest()
    return UploadFile(source, File(f"shards/{source.name}", len(data), f"{algorithm}:{value}"), link)


@pytest.mark.parametrize("mode", [0o644, 0o664, 0o400])
def test_hard_link_keeps_the_mode(item: UploadFile, target: Path, mode: int) -> None:
    item.source.chmod(mode)
    assert send([item], target, FUTURE, ignore) == UploadStats(linked=10_000)
    stored = target / "shards" / "a.tar"
    assert stored.samefile(item.source)
    assert stat.S_IMODE(stored.stat().st_mode) == mode  # the file may have other hard links


def test_symbolic_link_source_is_followed(item: UploadFile, target: Path, tmp_path: Path) -> None:
    symlink = tmp_path / "symlink.tar"
    symlink.symlink_to(item.source)
    send([UploadFile(symlink, item.file, link=True)], target, FUTURE, ignore)
    stored = target / "shards" / "a.tar"
    assert not stored.is_symlink()
    assert stored.samefile(item.source)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("no_links")
def test_copy_is_a_separate_read_only_file(tmp_path: Path, target: Path, algorithm: str) -> None:
    item = make_item(tmp_path / "a.tar", os.urandom(10_000), algorithm)
    assert send([item], target, FUTURE, ignore) == UploadStats(copied=10_000)
    stored = target / "shards" / "a.tar"
    assert stored.read_bytes() == item.source.read_bytes()
    assert not stored.samefile(item.source)
    assert stat.S_IMODE(stored.stat().st_mode) & 0o222 == 0
    assert stat.S_IMODE(item.source.stat().st_mode) & 0o200  # unchanged


def test_file_with_link_false_is_copied(tmp_path: Path, target: Path) -> None:
    item = make_item(tmp_path / "meta.bin", b"abc", link=False)
    assert send([item], target, FUTURE, ignore) == UploadStats(copied=3)


def test_existing_file_is_kept(target: Path, item: UploadFile, no_links: None) -> None:
    send([item], target, FUTURE, ignore)
    stored = target / "shards" / "a.tar"
    before = stored.stat()
    (target / "shards" / ".a.tar.x1.tmp").write_bytes(b"x" * 5_000)
    assert send([item], target, FUTURE, ignore) == UploadStats(kept=10_000)
    assert (stored.stat().st_ino, stored.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in (target / "shards").iterdir()] == ["a.tar"]


def test_uploads_in_other_parts_remove_the_temporary_files_of_one_that_ends_nevertheless(
    target: Path, item: UploadFile, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, others = folder_backend.copy_and_hash, []

    def copy(*arguments: Any) -> str:
        if len(others) < 2:
            others.append(len(others))
            assert send([item], target, FUTURE, ignore).total == 10_000
            (target / item.file.path).unlink()
        return real(*arguments)

    monkeypatch.setattr(folder_backend, "copy_and_hash", copy)
    assert send([item], target, FUTURE, ignore) == UploadStats(copied=10_000)
    assert len(others) == 2
    assert [path.name for path in (target / "shards").iterdir()] == ["a.tar"]


@pytest.mark.parametrize("bad", [b"", b"x" * 9_999, b"y" * 10_000])
def test_damaged_existing_file_is_replaced(
    target: Path, item: UploadFile, bad: bytes, no_links: None
) -> None:
    stored = target / "shards" / "a.tar"
    stored.parent.mkdir()
    stored.write_bytes(bad)
    assert send([item], target, FUTURE, ignore) == UploadStats(copied=10_000)
    assert stored.read_bytes() == item.source.read_bytes()


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("data", [b"x" * 9_999, b"x" * 10_001, b"", b"x" * 9_999 + b"y"])
def test_changed_source_is_refused(target: Path, item: UploadFile, data: bytes, link: bool) -> None:
    modified = item.source.stat().st_mtime
    item.source.write_bytes(data)
    os.utime(item.source, (modified + 1, modified + 1))
    item = UploadFile(item.source, item.file, link)
    with pytest.raises(UserError, match=r"a\.tar changed after \+stage=process"):
        send([item], target, modified, ignore)
    assert files(target) == []


def test_touched_source_with_same_bytes_is_linked(target: Path, item: UploadFile) -> None:
    modified = item.source.stat().st_mtime
    os.utime(item.source, (modified + 1, modified + 1))
    assert send([item], target, modified, ignore).linked == 10_000


def test_missing_source_is_reported(target: Path, item: UploadFile) -> None:
    item.source.unlink()
    with pytest.raises(UserError, match=r"a\.tar is missing: run \+stage=download and \+stage=process"):
        send([item], target, FUTURE, ignore)


@pytest.mark.parametrize("change", ["append", "rewrite"])
def test_source_modified_while_read_is_refused(
    target: Path, item: UploadFile, change: str, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hash, "BLOCK", 1_000)

    def modify(done: int, step: str) -> None:
        if done == 5_000:  # "rewrite" leaves the bytes unchanged: only the modification time differs
            with item.source.open("ab" if change == "append" else "r+b") as file:
                file.write(b"x")
            os.utime(item.source)

    with pytest.raises(UserError, match=r"a\.tar changed after .* \(modified while it was read\)"):
        send([item], target, FUTURE, modify)
    assert files(target) == []


def test_unknown_hash_algorithm_is_refused(target: Path, item: UploadFile) -> None:
    other = UploadFile(item.source, File("a.tar", 10_000, "crc:1"))
    with pytest.raises(
        UserError, match=r"unknown hash 'crc:1' in the manifest: this version has blake3:…, sha256:…, md5:…"
    ):
        send([other], target, FUTURE, ignore)


def test_progress_counts_every_byte_once(
    tmp_path: Path, target: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hash, "BLOCK", 100)
    items = [make_item(tmp_path / f"{i}.tar", bytes([i]) * 1_000) for i in range(3)]
    send(items[:1], target, FUTURE, ignore)
    reported: list[int] = []
    send(items, target, FUTURE, lambda done, step: reported.append(done))
    assert reported == [*range(100, 3_001, 100), 3_000]


def test_fetch_names_the_file_or_folder_that_is_missing(target: Path, item: UploadFile) -> None:
    send([item], target, FUTURE, ignore)
    backend, gone = FolderBackend(target.parent), target / "gone" / "a.tar"
    with pytest.raises(FileNotFoundError, match=r"gone/\.a\.tar\.part"):
        backend.fetch(f"v1/{item.file.path}", item.file, gone, lambda done: None)
    with pytest.raises(UserError, match=r"v1/none\.tar is missing$"):
        backend.fetch("v1/none.tar", item.file, target / "a.tar", lambda done: None)


def test_free_space_is_checked_before_copying(
    target: Path, item: UploadFile, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(target)

    class AlmostFull:
        f_frsize = real.f_frsize
        f_bavail = 9_999 // real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: AlmostFull)
    with pytest.raises(
        UserError, match=r"datastore\.url: .*v1: not enough free space for the upload: it needs [\d,]+ bytes"
    ):
        send([item], target, FUTURE, ignore)
    assert files(target) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_upload_resumes_after_the_disk_was_full(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [make_item(tmp_path / f"{i}.tar", os.urandom(600_000)) for i in range(2)]
    with pytest.raises(UserError, match=r"not enough free space for the upload: it needs [\d,]+ bytes"):
        send(items, small_disk, FUTURE, ignore)
    # Another job takes the free space after the check.
    monkeypatch.setattr(folder_backend, "require_free_space", lambda *_, **__: None)
    line = r"datastore\.url: no space left in /store: free some, then run it again"
    with pytest.raises(UserError, match=line), explain_os_errors("datastore.url", Path("/store")):
        send(items, small_disk, FUTURE, ignore)
    stored = files(small_disk)  # two copies at a time: one had enough space, or neither
    assert set(stored) < {"shards/0.tar", "shards/1.tar"}
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    kept = 600_000 * len(stored)
    assert send(items, small_disk, FUTURE, ignore) == UploadStats(copied=1_200_000 - kept, kept=kept)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_or_quota_leaves_no_partial_file(
    number: int, target: Path, item: UploadFile, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match="no space left in /store"),
        explain_os_errors("datastore.url", Path("/store")),
    ):
        send([item], target, FUTURE, ignore)
    assert files(target) == []


def test_impossible_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = tmp_path / "file" / "a"
    line = r"^datastore\.url: cannot read or write .*file/a: .*: Not a directory"
    with pytest.raises(UserError, match=line), explain_os_errors("datastore.url", store):
        store.mkdir(parents=True)


def test_other_os_errors_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"), explain_os_errors("datastore.url", tmp_path):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.slow
def test_lock_is_released_when_its_holder_dies(tmp_path: Path) -> None:
    waited: list[bool] = []
    code = f"""
import pathlib, time
from hpc_imagenet.datastore.backends.folder_backend import FolderBackend
with FolderBackend(pathlib.Path({str(tmp_path)!r})).lock("upload.lock", print):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"locked\n"

        def wait() -> None:
            waited.append(True)
            threading.Timer(0.3, holder.kill).start()

        with FolderBackend(tmp_path).lock("upload.lock", wait):
            assert waited == [True]
            assert holder.wait(timeout=60) == -9


def files(target: Path) -> list[str]:
    return sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
