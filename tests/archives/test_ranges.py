"""Several connections for one file: `Fetch` against real servers, and who gets which bytes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import random
import tempfile
import threading
import time
from pathlib import Path

import pytest
from faulty_server import Faults, faulty, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_imagenet.data.download import downloader, range_scheduler
from hpc_imagenet.data.download.downloader import LOOK, Downloader
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.download.range_scheduler import RangeScheduler
from hpc_imagenet.data.download.rate_limit import RateLimiter
from hpc_imagenet.data.download.streaming_hash import StreamingHash
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.data.sources.virtual_tar import tar_member
from hpc_imagenet.errors import UserError

FILE = "x.tar"
SIZE = 6_000_000
WANT = ExpectedArchive("dataset.archives.train", FILE, False)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / FILE).write_bytes(tar_member("image.JPEG", random.Random(1).randbytes(SIZE)) + bytes(1024))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "LEAST", 300_000)
    monkeypatch.setattr(downloader, "READ", 40_000)
    monkeypatch.setattr(range_scheduler, "LEAST", 50_000)


def source(url: str, connections: int, timeout: float = 5.0, **kwargs: float) -> Downloader:
    remote = HttpSource(url, timeout, connections, HttpCredentials(url))
    return Downloader(remote, 5, timeout, connections=connections, **kwargs)  # type: ignore[arg-type]


def assert_same(target: Path, served: Path) -> None:
    assert target.read_bytes() == (served / FILE).read_bytes()
    assert sorted(path.name for path in target.parent.iterdir()) == [FILE, f"{FILE}.receipt.json"]


def test_side_by_side(served: Path, target: Path) -> None:
    faults, told = Faults(pause=0.02, piece=1 << 15), list[int]()
    with serving(served, faulty(faults)) as url:
        assert source(url, 5).fetch(WANT, target, told.append) >= target.stat().st_size
    assert_same(target, served)
    assert faults.busiest >= 5  # a connection that lost its rest to another lingers a little
    assert told == sorted(told)
    begins = [int((said or "=0-").split("=")[1].split("-")[0]) for _, _, said in faults.seen]
    assert len(begins) > 10
    assert max(begins[:6]) <= LOOK + 5 * 300_000, "the first bytes are not the first to be fetched"


def test_one_stream_where_there_are_no_ranges(served: Path, target: Path) -> None:
    faults = Faults(ranges=False)
    with serving(served, faulty(faults)) as url:
        assert source(url, 5).fetch(WANT, target, lambda done: None) == target.stat().st_size
    assert_same(target, served)
    assert len(faults.seen) == 1


def test_broken_connections_cost_no_byte_that_came(served: Path, target: Path) -> None:
    moments = random.Random(7)
    faults = Faults(drops=[1 << 30, *(moments.randrange(200_000) for _ in range(12))], pause=0.002)
    with serving(served, faulty(faults)) as url:
        http = source(url, 4)
        http.sleep = lambda seconds: None
        http.fetch(WANT, target, lambda done: None)
    assert not faults.drops
    assert_same(target, served)


def test_a_server_that_takes_fewer_connections(
    served: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults(most=2, pause=0.004, piece=1 << 14)
    with serving(served, faulty(faults)) as url:
        http = source(url, 6)
        http.sleep = lambda seconds: time.sleep(0.02)
        http.fetch(WANT, target, lambda done: None)
    assert_same(target, served)
    assert "goes on with 2 connections" in caplog.text
    assert "goes on with 1 connections" not in caplog.text


def test_a_stall_is_fetched_by_another_connection(served: Path, target: Path) -> None:
    faults = Faults(stalls=[0, 3.0])
    with serving(served, faulty(faults)) as url:
        http = source(url, 3, timeout=0.3)
        http.sleep = lambda seconds: None
        http.fetch(WANT, target, lambda done: None)
    assert_same(target, served)


def test_a_trickle_counts_as_broken(
    served: Path, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(downloader, "SLOWEST", 10_000_000)
    faults = Faults(pause=0.05)

    def hurry(done: int) -> None:
        faults.pause = 0.0 if "bytes in 0 s" in caplog.text else 0.05

    with serving(served, faulty(faults)) as url, caplog.at_level(logging.WARNING):
        http = source(url, 2, timeout=0.2)
        http.sleep = lambda seconds: None
        http.fetch(WANT, target, hurry)
    assert_same(target, served)
    assert "bytes in 0 s" in caplog.text


def test_retry_after_holds_for_all_connections(served: Path, target: Path) -> None:
    faults = Faults()
    slept: list[tuple[str, float]] = []
    with serving(served, faulty(faults)) as url:
        http = source(url, 3)
        http.sleep = lambda seconds: slept.append((threading.current_thread().name, seconds))
        faults.statuses = []
        # The first request settles what can be done; the next one is refused.
        real, asked = http.remote.open, list[int]()

        def ask(*args: object) -> object:
            asked.append(1)
            faults.statuses = [(429, {"Retry-After": "7"})] if len(asked) == 2 else faults.statuses
            return real(*args)  # type: ignore[arg-type]

        http.remote.open = ask  # type: ignore[method-assign, assignment]
        http.fetch(WANT, target, lambda done: None)
    assert_same(target, served)
    assert 7 in [seconds for _, seconds in slept]
    assert all(seconds <= 7 for _, seconds in slept)


def test_all_begins_anew_when_the_file_changes(
    served: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults(etags=[*"aaab"], pause=0.002)
    with serving(served, faulty(faults)) as url:
        http = source(url, 4)
        http.sleep = lambda seconds: None
        http.fetch(WANT, target, lambda done: None)
    assert_same(target, served)
    assert "has changed on the server; beginning anew" in caplog.text


def test_a_login_that_ends_on_the_way_costs_nothing(served: Path, target: Path) -> None:
    faults = Faults(pause=0.005, piece=1 << 15)
    with serving(served, faulty(faults)) as url:

        def end(done: int) -> None:
            faults.html = "untyped" if done > SIZE // 3 else ""

        with pytest.raises(UserError, match="is an HTML page"):
            source(url, 3).fetch(WANT, target, end)
        faults.html = ""
        assert source(url, 3).fetch(WANT, target, lambda done: None) < SIZE * 0.8
    assert_same(target, served)


def test_the_limit_is_kept(served: Path, target: Path) -> None:
    slept: list[float] = []
    with serving(served) as url:
        http = source(url, 4)
        http.pace = RateLimiter(1e5, slept.append)
        http.fetch(WANT, target, lambda done: None)
    assert_same(target, served)
    # Nobody really sleeps: the waits pile up to those of all bytes at 0.1 MB/s.
    assert max(slept) == pytest.approx(SIZE / 1e5, rel=0.25)


def test_what_came_before_is_read_once_and_not_fetched(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[1 << 30, 1_000_000]))) as url:
        with pytest.raises(UserError):
            Downloader(HttpSource(url, 5, 1, HttpCredentials(url)), -1, 5).fetch(
                WANT, target, lambda done: None
            )
        assert source(url, 4).fetch(WANT, target, lambda done: None) < SIZE - 900_000
    assert_same(target, served)


Spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=30)


@given(Spans)
@settings(max_examples=60, deadline=None)
def test_a_part_knows_which_bytes_it_has(spans: list[tuple[int, int]]) -> None:
    origin = Origin("x", '"1"', None, 80, ranges=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with PartialFile(folder / "f") as part:
            part.begin(origin)
            has = [False] * 80
            for begin, length in spans:
                part.write(begin, b"x" * length)
                has[begin : begin + length] = [True] * length
                assert part.has(begin, begin + length)
            assert part.size == sum(has)
            assert part.contiguous_size == [*has, False].index(False)
            missing = [i for a, b in part.gaps() for i in range(a, b)]
            assert missing == [i for i in range(80) if not has[i]]
            for begin in range(80):
                assert part.has(begin, begin + 1) == has[begin]
        with PartialFile(folder / "f") as again:  # from its note
            assert again.size == (sum(has) if any(has) else 0)
            assert (again.origin == origin) == any(has)


def test_claims_never_overlap_and_cover_all(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "f") as part:
        part.begin(Origin("x", '"1"', None, 1_000_000, ranges=True))
        part.write(300_000, bytes(100_000))
        shared = RangeScheduler(part, 3)
        claims = [shared.take(250_000) for _ in range(5)]
        spans = [(claim.begin, claim.end) for claim in claims if claim]
        assert spans[:2] == [(0, 250_000), (250_000, 300_000)]
        taken = sorted(spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
        # Nothing is free any more: the next one takes half of what another has before it.
        half = shared.take(250_000)
        assert half
        assert any(claim and claim.end == half.begin for claim in claims)
        assert half.end - half.begin >= 50_000


def test_the_follower_begins_anew_with_the_part(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(500_000)
    with PartialFile(tmp_path / "f") as part:
        part.begin(Origin("x", '"1"', None, len(data), ranges=True))
        with StreamingHash(part) as follower:
            part.write(0, b"something else")
            follower.result(lambda: None)
            part.begin(Origin("x", '"2"', None, len(data), ranges=True))
            part.write(250_000, data[250_000:])
            part.write(0, data[:250_000])
            assert follower.result(lambda: None) == hashlib.md5(data).hexdigest()


def test_a_part_is_taken_up_only_with_a_note_that_fits(tmp_path: Path) -> None:
    def left(note: str) -> int:
        (tmp_path / "f.part").write_bytes(bytes(LOOK))
        (tmp_path / "f.part.json").write_text(note)
        with PartialFile(tmp_path / "f") as part:
            return part.size

    assert left('{"url": "x", "total": 99999, "spans": [[0, 10], [20, 30]]}') == 20
    for note in (
        "",
        "{}",
        "[]",
        '{"url": "x"}',
        '{"url": "x", "spans": [[0, 99999]]}',
        '{"spans": [[0, 9]]}',
    ):
        assert left(note) == 0, note
        assert (tmp_path / "f.part").stat().st_size == 0
