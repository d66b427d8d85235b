"""The cache of a node: what is in it is right, what is in use stays, what was not used for longest goes."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache import cache
from hpc_imagenet.datastore.node_cache.cache import CopyResult, NodeCache
from hpc_imagenet.errors import UserError

SIZE = 1 << 20


def data_of(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def file_of(number: int, size: int = SIZE) -> File:
    digest = hashlib.sha256(data_of(number, size)).hexdigest()
    return File(f"shards/{number}.tar", size, f"sha256:{digest}")


class Source:
    """Brings files by their numbers, and counts."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.proved: list[str] = []

    def fetch(self, file: File, path: Path) -> None:
        self.fetched.append(file.path)
        path.write_bytes(data_of(int(Path(file.path).stem), file.bytes))

    def prove(self, file: File, path: Path) -> bool:
        self.proved.append(file.path)
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == file.hash

    def bring(self, into: NodeCache, number: int) -> CopyResult:
        return into.get_or_fetch(file_of(number), self.fetch, self.prove)


def read(held: NodeCache, number: int) -> bytes | None:
    descriptor = held.open(file_of(number))
    if descriptor is None:
        return None
    try:
        return os.pread(descriptor, SIZE, 0)
    finally:
        os.close(descriptor)


def test_a_file_comes_once_and_the_next_job_has_it(tmp_path: Path) -> None:
    source, first = Source(), NodeCache(tmp_path)
    assert first.open(file_of(1)) is None
    assert source.bring(first, 1) is CopyResult.HERE
    assert read(first, 1) == data_of(1)
    assert source.bring(NodeCache(tmp_path), 1) is CopyResult.HERE
    assert (source.fetched, source.proved) == (["shards/1.tar"], [])
    assert first.folder.stat().st_mode & 0o777 == 0o700


def test_a_byte_that_was_changed_is_found_and_the_file_comes_again(tmp_path: Path) -> None:
    source, held = Source(), NodeCache(tmp_path)
    source.bring(held, 1)
    path = held.path(file_of(1))
    status = path.stat()
    with path.open("r+b") as writer:
        writer.seek(SIZE // 2)
        writer.write(bytes([data_of(1)[SIZE // 2] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if it had never been
    assert held.open(file_of(1)) is None
    assert source.bring(held, 1) is CopyResult.HERE
    assert source.proved == ["shards/1.tar"]
    assert source.fetched == ["shards/1.tar"] * 2
    assert read(held, 1) == data_of(1)


def test_what_was_proved_long_ago_is_read_again_but_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, held = Source(), NodeCache(tmp_path)
    source.bring(held, 1)
    monkeypatch.setattr(cache, "TRUST", 0.0)
    assert held.open(file_of(1)) is None
    source.bring(held, 1)
    assert (source.fetched, source.proved) == (["shards/1.tar"], ["shards/1.tar"])


def test_the_least_recently_used_goes_unless_it_is_in_use(tmp_path: Path) -> None:
    source, held = Source(), NodeCache(tmp_path, limit=3 * SIZE + SIZE // 2)
    for number in (1, 2, 3):
        assert source.bring(held, number) is CopyResult.HERE
        os.utime(held.path(file_of(number)).with_suffix(".json"), (number, number))
    first = held.open(file_of(1))  # used just now, and in use
    second = NodeCache(tmp_path).open(file_of(2))  # by another job, which says nothing to this one
    os.utime(held.path(file_of(2)).with_suffix(".json"), (2, 2))
    assert first is not None
    assert second is not None
    assert source.bring(held, 4) is CopyResult.HERE
    assert [read(held, number) is not None for number in (1, 2, 3, 4)] == [True, True, False, True]

    in_use = [held.open(file_of(4))]
    assert source.bring(held, 5) is CopyResult.FULL
    assert source.fetched.count("shards/5.tar") == 0
    for descriptor in (first, second, *in_use):
        assert descriptor is not None
        os.close(descriptor)
    assert source.bring(held, 5) is CopyResult.HERE


def test_nothing_is_evicted_in_vain(tmp_path: Path) -> None:
    source, held = Source(), NodeCache(tmp_path, limit=3 * SIZE + SIZE // 2)
    for number in (1, 2, 3):
        source.bring(held, number)
    assert held.get_or_fetch(file_of(9, 8 * SIZE), source.fetch, source.prove) is CopyResult.FULL
    assert all(read(held, number) for number in (1, 2, 3))


def test_another_process_that_brings_it_is_left_alone_until_it_dies(tmp_path: Path) -> None:
    ready, stay = multiprocessing.get_context("fork").Event(), tmp_path / "stay"
    stay.touch()

    def slow() -> None:
        def fetch(file: File, path: Path) -> None:
            path.with_name(f".{path.name}.part").write_bytes(b"half")
            ready.set()
            while stay.exists():
                time.sleep(0.01)

        NodeCache(tmp_path).get_or_fetch(file_of(1), fetch, lambda file, path: True)

    other = multiprocessing.get_context("fork").Process(target=slow)
    other.start()
    assert ready.wait(30)
    source, held = Source(), NodeCache(tmp_path)
    assert source.bring(held, 1) is CopyResult.BUSY
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    assert source.bring(held, 1) is CopyResult.HERE
    assert read(held, 1) == data_of(1)


def test_what_a_killed_copy_has_left_makes_room(tmp_path: Path) -> None:
    source, held = Source(), NodeCache(tmp_path, limit=2 * SIZE + SIZE // 2)
    source.bring(held, 1)
    part = held.path(file_of(2)).with_name(f".{held.path(file_of(2)).name}.part")
    part.write_bytes(data_of(2))
    with FileLock(part.with_suffix(".lock")):  # somebody is at work on it: the older one has to go
        assert source.bring(held, 3) is CopyResult.HERE
    assert part.exists()
    assert [read(held, number) is not None for number in (1, 3)] == [False, True]
    assert source.bring(held, 4) is CopyResult.HERE
    assert not part.exists()
    assert [read(held, number) is not None for number in (3, 4)] == [True, True]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"hpc_imagenet-{os.getuid()}").mkdir()
    (tmp_path / f"hpc_imagenet-{os.getuid()}").chmod(0o777)
    with pytest.raises(UserError, match="you alone can write"):
        NodeCache(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cluster\.scratch"):
        NodeCache(tmp_path / "file")
