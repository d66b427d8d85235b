import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_imagenet.datastore.backends import folder_backend, storage_backend
from hpc_imagenet.datastore.backends.folder_backend import FolderBackend
from hpc_imagenet.datastore.backends.storage_backend import (
    Reusable,
    Tell,
    UploadFile,
    UploadStats,
    explain_os_errors,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

FUTURE = 4e9  # a manifest of then vouches for every file of now


def silent(done: int, note: str) -> None:
    pass


def send(pieces: list[UploadFile], target: Path, written: float, tell: Tell, **known: object) -> UploadStats:
    return FolderBackend(target.parent).send(pieces, target.name, Reusable(written, **known), tell)  # type: ignore[arg-type]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "v1").mkdir()
    return tmp_path / "v1"


@pytest.fixture
def piece(tmp_path: Path) -> UploadFile:
    return make_piece(tmp_path / "a.tar", b"x" * 10_000, "md5")


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, destination: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)


def make_piece(source: Path, data: bytes, algorithm: str = "sha256", link: bool = True) -> UploadFile:
    source.write_bytes(data)
    found = hashlib.new(algorithm, data).hexdigest()
    return UploadFile(source, File(f"shards/{source.name}", len(data), f"{algorithm}:{found}"), link)


@pytest.mark.parametrize("mode", [0o644, 0o664, 0o400])
def test_a_link_is_the_same_file_and_keeps_its_mode(piece: UploadFile, target: Path, mode: int) -> None:
    piece.source.chmod(mode)
    assert send([piece], target, FUTURE, silent) == UploadStats(linked=10_000)
    there = target / "shards" / "a.tar"
    assert there.samefile(piece.source)
    assert stat.S_IMODE(there.stat().st_mode) == mode  # it may have names that are none of our business


def test_a_symbolic_link_is_followed(piece: UploadFile, target: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.tar"
    named.symlink_to(piece.source)
    send([UploadFile(named, piece.file, link=True)], target, FUTURE, silent)
    there = target / "shards" / "a.tar"
    assert not there.is_symlink()
    assert there.samefile(piece.source)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.usefixtures("no_links")
def test_a_copy_is_another_file_and_read_only(tmp_path: Path, target: Path, algorithm: str) -> None:
    piece = make_piece(tmp_path / "a.tar", os.urandom(10_000), algorithm)
    assert send([piece], target, FUTURE, silent) == UploadStats(copied=10_000)
    there = target / "shards" / "a.tar"
    assert there.read_bytes() == piece.source.read_bytes()
    assert not there.samefile(piece.source)
    assert stat.S_IMODE(there.stat().st_mode) & 0o222 == 0
    assert stat.S_IMODE(piece.source.stat().st_mode) & 0o200  # the source stays as it was


def test_what_may_not_be_linked_is_copied(tmp_path: Path, target: Path) -> None:
    piece = make_piece(tmp_path / "meta.bin", b"abc", link=False)
    assert send([piece], target, FUTURE, silent) == UploadStats(copied=3)


def test_what_is_there_is_kept(target: Path, piece: UploadFile, no_links: None) -> None:
    send([piece], target, FUTURE, silent)
    there = target / "shards" / "a.tar"
    before = there.stat()
    (target / "shards" / ".a.tar.x1.tmp").write_bytes(b"x" * 5_000)
    assert send([piece], target, FUTURE, silent) == UploadStats(kept=10_000)
    assert (there.stat().st_ino, there.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in (target / "shards").iterdir()] == ["a.tar"]


@pytest.mark.parametrize("bad", [b"", b"x" * 9_999, b"y" * 10_000])
def test_what_is_there_and_wrong_is_sent_again(
    target: Path, piece: UploadFile, bad: bytes, no_links: None
) -> None:
    there = target / "shards" / "a.tar"
    there.parent.mkdir()
    there.write_bytes(bad)
    assert send([piece], target, FUTURE, silent) == UploadStats(copied=10_000)
    assert there.read_bytes() == piece.source.read_bytes()


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("data", [b"x" * 9_999, b"x" * 10_001, b"", b"x" * 9_999 + b"y"])
def test_a_source_that_changed_is_refused(target: Path, piece: UploadFile, data: bytes, link: bool) -> None:
    written = piece.source.stat().st_mtime
    piece.source.write_bytes(data)
    os.utime(piece.source, (written + 1, written + 1))
    piece = UploadFile(piece.source, piece.file, link)
    with pytest.raises(UserError, match=r"a\.tar is not what \+stage=process saw"):
        send([piece], target, written, silent)
    assert files(target) == []


def test_a_source_that_was_only_touched_is_taken(target: Path, piece: UploadFile) -> None:
    written = piece.source.stat().st_mtime
    os.utime(piece.source, (written + 1, written + 1))
    assert send([piece], target, written, silent).linked == 10_000


def test_a_source_that_is_gone_is_told(target: Path, piece: UploadFile) -> None:
    piece.source.unlink()
    with pytest.raises(UserError, match=r"a\.tar is missing: \+stage=download and \+stage=process"):
        send([piece], target, FUTURE, silent)


@pytest.mark.parametrize("change", ["append", "rewrite"])
def test_a_source_written_to_while_it_is_read_is_refused(
    target: Path, piece: UploadFile, change: str, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_backend, "BLOCK", 1_000)

    def tell(done: int, note: str) -> None:
        if done == 5_000:  # the same bytes where "rewrite": only the time gives it away
            with piece.source.open("ab" if change == "append" else "r+b") as file:
                file.write(b"x")
            os.utime(piece.source)

    with pytest.raises(UserError, match=r"a\.tar is not what .* \(written to while it was read\)"):
        send([piece], target, FUTURE, tell)
    assert files(target) == []


def test_an_unknown_hash_is_refused(target: Path, piece: UploadFile) -> None:
    odd = UploadFile(piece.source, File("a.tar", 10_000, "crc:1"))
    with pytest.raises(UserError, match=r"'crc:1' as its hash, not md5:… or sha256:…"):
        send([odd], target, FUTURE, silent)


def test_progress_counts_every_byte_once(
    tmp_path: Path, target: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_backend, "BLOCK", 100)
    pieces = [make_piece(tmp_path / f"{i}.tar", bytes([i]) * 1_000) for i in range(3)]
    send(pieces[:1], target, FUTURE, silent)
    told: list[int] = []
    send(pieces, target, FUTURE, lambda done, note: told.append(done))
    assert told == [*range(100, 3_001, 100), 3_000]


def test_room_is_checked_before_anything_is_copied(
    target: Path, piece: UploadFile, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(target)

    class Small:
        f_frsize = real.f_frsize
        f_bavail = 9_999 // real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(UserError, match=r"datastore\.url: .*v1 needs 0\.000 GB more, but 0\.000 GB are free"):
        send([piece], target, FUTURE, silent)
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


def test_a_disk_that_fills_up_is_told_and_goes_on_later(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [make_piece(tmp_path / f"{i}.tar", os.urandom(600_000)) for i in range(2)]
    with pytest.raises(UserError, match=r"needs .* GB more"):
        send(pieces, small_disk, FUTURE, silent)
    # Another job takes the room after the check.
    monkeypatch.setattr(folder_backend, "check_room", lambda *_: None)
    line = r"datastore\.url: no space left in /store; free some and ask again"
    with pytest.raises(UserError, match=line), explain_os_errors("datastore.url", Path("/store")):
        send(pieces, small_disk, FUTURE, silent)
    there = files(small_disk)  # both are copied at a time: whichever had the room, or neither
    assert set(there) < {"shards/0.tar", "shards/1.tar"}
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    kept = 600_000 * len(there)
    assert send(pieces, small_disk, FUTURE, silent) == UploadStats(copied=1_200_000 - kept, kept=kept)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_leaves_no_half(
    number: int, target: Path, piece: UploadFile, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match="no space left in /store"),
        explain_os_errors("datastore.url", Path("/store")),
    ):
        send([piece], target, FUTURE, silent)
    assert files(target) == []


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = tmp_path / "file" / "a"
    line = r"^datastore\.url: cannot fill .*file/a: .*: Not a directory"
    with pytest.raises(UserError, match=line), explain_os_errors("datastore.url", store):
        store.mkdir(parents=True)


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"), explain_os_errors("datastore.url", tmp_path):
        raise OSError(errno.EIO, "Input/output error")


def test_a_dead_holder_gives_its_turn_back(tmp_path: Path) -> None:
    waited: list[bool] = []
    code = f"""
import pathlib, time
from hpc_imagenet.datastore.folder import Folder
with Folder(pathlib.Path({str(tmp_path)!r})).turn("upload.lock", print):
    print("mine", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"mine\n"

        def wait() -> None:
            waited.append(True)
            threading.Timer(0.3, holder.kill).start()

        with FolderBackend(tmp_path).lock("upload.lock", wait):
            assert waited == [True]
            assert holder.wait(timeout=60) == -9


def files(target: Path) -> list[str]:
    return sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
