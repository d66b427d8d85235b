"""The node cache: verification, locking between processes, and eviction."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache import cache
from hpc_imagenet.datastore.node_cache.cache import CopyResult, NodeCache, cached_bytes
from hpc_imagenet.errors import UserError

SIZE = 1 << 20


def data_of(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def file_of(number: int, size: int = SIZE) -> File:
    digest = hashlib.sha256(data_of(number, size)).hexdigest()
    return File(f"shards/{number}.tar", size, f"sha256:{digest}")


class Source:
    """Fetches files by their numbers and records the calls."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.verified: list[str] = []

    def fetch(self, file: File, target: Path) -> None:
        self.fetched.append(file.path)
        target.write_bytes(data_of(int(Path(file.path).stem), file.bytes))

    def hash(self, path: Path, file: File) -> str:
        self.verified.append(file.path)
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"

    def close(self) -> None:
        pass

    def cache(self, node_cache: NodeCache, number: int) -> CopyResult:
        return node_cache.get_or_fetch(file_of(number), self)


def read(node_cache: NodeCache, number: int) -> bytes | None:
    descriptor = node_cache.open(file_of(number))
    if descriptor is None:
        return None
    try:
        return os.pread(descriptor, SIZE, 0)
    finally:
        os.close(descriptor)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that sets the clock to a number of hours after the start of the test."""
    begin = time.time()
    return lambda hours: monkeypatch.setattr(cache.time, "time", lambda: begin + 3600 * hours)


def test_a_file_is_fetched_once_and_reused_by_the_next_job(tmp_path: Path) -> None:
    source, first = Source(), NodeCache(tmp_path)
    assert first.open(file_of(1)) is None
    assert source.cache(first, 1) is CopyResult.CACHED
    assert read(first, 1) == data_of(1)
    assert source.cache(NodeCache(tmp_path), 1) is CopyResult.CACHED
    assert (source.fetched, source.verified) == (["shards/1.tar"], [])
    assert first.folder.stat().st_mode & 0o777 == 0o700


def test_a_modified_file_is_detected_and_fetched_again(tmp_path: Path) -> None:
    source, node_cache = Source(), NodeCache(tmp_path)
    source.cache(node_cache, 1)
    path = node_cache.path(file_of(1))
    status = path.stat()
    with path.open("r+b") as writer:
        writer.seek(SIZE // 2)
        writer.write(bytes([data_of(1)[SIZE // 2] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # hide the modification
    assert node_cache.open(file_of(1)) is None
    assert source.cache(node_cache, 1) is CopyResult.CACHED
    assert source.verified == ["shards/1.tar"]
    assert source.fetched == ["shards/1.tar"] * 2
    assert read(node_cache, 1) == data_of(1)


def test_a_file_verified_long_ago_is_hashed_again_but_not_fetched(
    tmp_path: Path, set_clock: Callable[[float], None]
) -> None:
    source, first = Source(), NodeCache(tmp_path)
    source.cache(first, 1)
    set_clock(25)
    later = NodeCache(tmp_path)
    assert later.open(file_of(1)) is None
    source.cache(later, 1)
    assert read(later, 1) == data_of(1)
    assert (source.fetched, source.verified) == (["shards/1.tar"], ["shards/1.tar"])


def test_a_file_verified_recently_at_the_start_of_a_job_is_opened_at_any_time(
    tmp_path: Path, set_clock: Callable[[float], None]
) -> None:
    Source().cache(NodeCache(tmp_path), 1)
    set_clock(22)
    source, copying, other = Source(), NodeCache(tmp_path), NodeCache(tmp_path)
    assert source.cache(copying, 1) is CopyResult.CACHED
    set_clock(25)
    assert read(other, 1) == data_of(1)
    assert source.verified == []
    set_clock(100)
    assert source.cache(copying, 2) is CopyResult.CACHED
    set_clock(99)  # the clock was set back
    assert read(other, 2) == data_of(2)


def test_a_task_that_starts_later_opens_what_the_copying_task_found_just_recent_enough(
    tmp_path: Path, set_clock: Callable[[float], None]
) -> None:
    Source().cache(NodeCache(tmp_path), 1)
    for hours in (22.5, 23.5):
        set_clock(hours)
        source = Source()
        assert source.cache(NodeCache(tmp_path), 1) is CopyResult.CACHED
        assert bool(source.verified) == (hours == 23.5)
        set_clock(hours + 0.9)
        assert read(NodeCache(tmp_path), 1) == data_of(1)


def test_least_recently_used_is_evicted_unless_in_use(tmp_path: Path) -> None:
    source, node_cache = Source(), NodeCache(tmp_path, limit=3 * SIZE + SIZE // 2)
    for number in (1, 2, 3):
        assert source.cache(node_cache, number) is CopyResult.CACHED
        os.utime(node_cache.path(file_of(number)).with_suffix(".json"), (number, number))
    first = node_cache.open(file_of(1))  # recently used and open
    second = NodeCache(tmp_path).open(file_of(2))  # opened by another job
    os.utime(node_cache.path(file_of(2)).with_suffix(".json"), (2, 2))
    assert first is not None
    assert second is not None
    assert source.cache(node_cache, 4) is CopyResult.CACHED
    assert [read(node_cache, number) is not None for number in (1, 2, 3, 4)] == [True, True, False, True]

    fourth = node_cache.open(file_of(4))
    assert source.cache(node_cache, 5) is CopyResult.FULL
    assert source.fetched.count("shards/5.tar") == 0
    for descriptor in (first, second, fourth):
        assert descriptor is not None
        os.close(descriptor)
    assert source.cache(node_cache, 5) is CopyResult.CACHED


def test_nothing_is_evicted_if_the_file_does_not_fit(tmp_path: Path) -> None:
    source, node_cache = Source(), NodeCache(tmp_path, limit=3 * SIZE + SIZE // 2)
    for number in (1, 2, 3):
        source.cache(node_cache, number)
    assert node_cache.get_or_fetch(file_of(9, 8 * SIZE), source) is CopyResult.FULL
    assert all(read(node_cache, number) for number in (1, 2, 3))


@pytest.mark.slow
def test_a_file_is_busy_while_another_process_fetches_it_until_that_dies(tmp_path: Path) -> None:
    ready, running = multiprocessing.get_context("fork").Event(), tmp_path / "running"
    running.touch()

    class SlowSource(Source):
        def fetch(self, file: File, target: Path) -> None:
            target.with_name(f".{target.name}.part").write_bytes(b"half")
            ready.set()
            while running.exists():
                time.sleep(0.01)

    other = multiprocessing.get_context("fork").Process(
        target=lambda: SlowSource().cache(NodeCache(tmp_path), 1)
    )
    other.start()
    assert ready.wait(30)
    source, node_cache = Source(), NodeCache(tmp_path)
    assert source.cache(node_cache, 1) is CopyResult.BUSY
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    assert source.cache(node_cache, 1) is CopyResult.CACHED
    assert read(node_cache, 1) == data_of(1)


def test_part_files_of_killed_fetches_are_evicted(tmp_path: Path) -> None:
    source, node_cache = Source(), NodeCache(tmp_path, limit=2 * SIZE + SIZE // 2)
    source.cache(node_cache, 1)
    part = node_cache.path(file_of(2)).with_name(f".{node_cache.path(file_of(2)).name}.part")
    part.write_bytes(data_of(2))
    with FileLock(part.with_suffix(".lock")):  # a running fetch: the older file is evicted instead
        assert source.cache(node_cache, 3) is CopyResult.CACHED
    assert part.exists()
    assert [read(node_cache, number) is not None for number in (1, 3)] == [False, True]
    assert source.cache(node_cache, 4) is CopyResult.CACHED
    assert not part.exists()
    assert [read(node_cache, number) is not None for number in (3, 4)] == [True, True]


def test_space_for_the_rest_of_files_that_others_fetch_is_not_free(tmp_path: Path) -> None:
    other, results = Source(), []

    class InterruptedSource(Source):
        def fetch(self, file: File, target: Path) -> None:
            part = target.with_name(f".{target.name}.part")
            part.write_bytes(b"1")
            for limit in (SIZE + SIZE // 2, 2 * SIZE + SIZE // 2):
                results.append(other.cache(NodeCache(tmp_path, limit), 2))
            part.replace(target)  # all is there, and not yet verified
            target.write_bytes(data_of(1))
            results.append(other.cache(NodeCache(tmp_path, 3 * SIZE + SIZE // 2), 3))
            target.replace(part)
            raise UserError("killed")

    with pytest.raises(UserError, match="killed"):
        InterruptedSource().cache(NodeCache(tmp_path), 1)
    assert results == [CopyResult.FULL, CopyResult.CACHED, CopyResult.CACHED]
    # What is left of a killed fetch is evicted, and waits for nothing.
    assert other.cache(NodeCache(tmp_path, 3 * SIZE + SIZE // 2), 4) is CopyResult.CACHED
    assert [read(NodeCache(tmp_path), number) is not None for number in (2, 3, 4)] == [True] * 3
    assert not list(NodeCache(tmp_path).folder.glob(".*.size"))
    assert not list(NodeCache(tmp_path).folder.glob(".*.part"))


def test_two_jobs_do_not_take_the_same_space(tmp_path: Path) -> None:
    source, node_cache = Source(), NodeCache(tmp_path)
    with FileLock(node_cache.folder / ".space.lock"):
        assert source.cache(node_cache, 1) is CopyResult.BUSY
    assert source.cache(node_cache, 1) is CopyResult.CACHED


@pytest.mark.parametrize(
    ("above", "made"), [(0o1777, 0o1777), (0o777, 0o1777), (0o2775, 0o3775), (0o775, 0o755), (0o755, 0o755)]
)
def test_a_missing_scratch_folder_is_as_open_as_the_one_above_it(
    tmp_path: Path, above: int, made: int
) -> None:
    tmp_path.chmod(above)
    before = os.umask(0o022)
    try:
        node_cache = NodeCache(tmp_path / "lab" / "imagenet")
    finally:
        os.umask(before)
    for folder in (tmp_path / "lab", tmp_path / "lab" / "imagenet"):
        assert folder.stat().st_mode & 0o7777 == made
    assert node_cache.folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "lab" / "imagenet").chmod(0o750)
    NodeCache(tmp_path / "lab" / "imagenet")  # what exists is left alone
    assert (tmp_path / "lab" / "imagenet").stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["lab"]


def test_a_missing_scratch_folder_named_by_a_variable_belongs_to_one_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_OR_USER", "alice")
    tmp_path.chmod(0o1777)
    before = os.umask(0o022)
    try:
        NodeCache(f"{tmp_path}/$JOB_OR_USER/imagenet")
    finally:
        os.umask(before)
    for folder in (tmp_path / "alice", tmp_path / "alice" / "imagenet"):
        assert folder.stat().st_mode & 0o7777 == 0o755


def test_a_folder_that_other_users_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"hpc_imagenet-{os.getuid()}").mkdir()
    (tmp_path / f"hpc_imagenet-{os.getuid()}").chmod(0o777)
    with pytest.raises(UserError, match=r"only you can write to, but its owner is .* and its mode 777"):
        NodeCache(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cluster\.scratch"):
        NodeCache(tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "opens"), [(errno.ENOSYS, True), (errno.ENOLCK, True), (errno.EAGAIN, False)]
)
def test_copies_on_a_file_system_without_locks_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, opens: bool
) -> None:
    node_cache = NodeCache(tmp_path)
    Source().cache(node_cache, 1)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert read(node_cache, 1) == (data_of(1) if opens else None)


def test_cached_bytes_counts_complete_copies_and_creates_nothing(tmp_path: Path) -> None:
    files = [File(f"{i}.tar", 10 * (i + 1), f"md5:{i}") for i in range(3)]
    assert cached_bytes(str(tmp_path / "none"), files) == 0
    assert not (tmp_path / "none").exists()
    folder = NodeCache(tmp_path).folder
    (folder / "md5-1").touch()
    (folder / ".md5-2.part").touch()
    assert cached_bytes(str(tmp_path), files) == 20
