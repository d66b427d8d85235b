"""Downloads over several connections: servers with faults, scheduling of ranges, partial files."""

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

from hpc_imagenet.data.download.downloader import Downloader
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.download.range_scheduler import RangeScheduler, TransferSizes
from hpc_imagenet.data.download.rate_limit import RateLimiter
from hpc_imagenet.data.download.streaming_hash import StreamingHash
from hpc_imagenet.data.download.transfer import FIRST_REQUEST
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import tar_member

FILE = "x.tar"
SIZE = 6_000_000
SIZES = TransferSizes(min_range=300_000, min_steal=50_000, read=40_000)
EXPECTED = ExpectedArchive("dataset.archives.train", FILE, False)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / FILE).write_bytes(tar_member("image.JPEG", random.Random(1).randbytes(SIZE)) + bytes(1024))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / FILE


def new_downloader(url: str, connections: int, timeout: float = 5.0, **kwargs: float) -> Downloader:
    source = HttpSource(url, timeout, connections, HttpCredentials(url))
    return Downloader(source, 5, timeout, connections=connections, sizes=SIZES, **kwargs)  # type: ignore[arg-type]


def assert_complete(target: Path, served: Path) -> None:
    assert target.read_bytes() == (served / FILE).read_bytes()
    assert sorted(path.name for path in target.parent.iterdir()) == [FILE, f"{FILE}.receipt.json"]


@pytest.mark.slow
def test_parallel_ranges_start_at_the_beginning(served: Path, target: Path) -> None:
    faults, progress = Faults(pause=0.02, chunk_size=1 << 15), list[int]()
    with serving(served, faulty(faults)) as url:
        assert new_downloader(url, 5).fetch(EXPECTED, target, progress.append) >= target.stat().st_size
    assert_complete(target, served)
    assert faults.peak_concurrent >= 5  # more: a connection whose rest was stolen is closed a little later
    assert progress == sorted(progress)
    begins = [int((header or "=0-").split("=")[1].split("-")[0]) for _, _, header in faults.requests]
    assert len(begins) > 10
    assert max(begins[:6]) <= FIRST_REQUEST + 5 * 300_000, "the first requests are not for the first bytes"


def test_single_stream_from_a_server_without_ranges(served: Path, target: Path) -> None:
    faults = Faults(ranges=False)
    with serving(served, faulty(faults)) as url:
        assert new_downloader(url, 5).fetch(EXPECTED, target, lambda done: None) == target.stat().st_size
    assert_complete(target, served)
    assert len(faults.requests) == 1


@pytest.mark.slow
def test_broken_connections_are_resumed_in_parallel(served: Path, target: Path) -> None:
    rng = random.Random(7)
    faults = Faults(drops=[1 << 30, *(rng.randrange(200_000) for _ in range(12))], pause=0.002)
    with serving(served, faulty(faults)) as url:
        loader = new_downloader(url, 4)
        loader.sleep = lambda seconds: None
        loader.fetch(EXPECTED, target, lambda done: None)
    assert not faults.drops
    assert_complete(target, served)


@pytest.mark.slow
def test_connections_are_retired_if_the_server_accepts_fewer(
    served: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults(max_concurrent=2, pause=0.004, chunk_size=1 << 14)
    with serving(served, faulty(faults)) as url:
        loader = new_downloader(url, 6)
        loader.sleep = lambda seconds: time.sleep(0.02)
        loader.fetch(EXPECTED, target, lambda done: None)
    assert_complete(target, served)
    assert "continuing with 2 connection(s)" in caplog.text
    assert "continuing with 1 connection(s)" not in caplog.text


def test_stalled_range_is_fetched_by_another_connection(served: Path, target: Path) -> None:
    faults = Faults(stalls=[0, 3.0])
    with serving(served, faulty(faults)) as url:
        loader = new_downloader(url, 3, timeout=0.3)
        loader.sleep = lambda seconds: None
        loader.fetch(EXPECTED, target, lambda done: None)
    assert_complete(target, served)
    begins = [header.partition("-")[0] for _, _, header in faults.requests if header]
    assert len(begins) > len(set(begins)), "the stalled range was not requested again"


def test_slow_connection_is_replaced(served: Path, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults(pause=0.05)

    def end_pauses(done: int) -> None:
        faults.pause = 0.0 if "bytes in 0 s" in caplog.text else 0.05

    with serving(served, faulty(faults)) as url, caplog.at_level(logging.WARNING):
        loader = new_downloader(url, 2, timeout=0.2, min_rate=10_000_000)
        loader.sleep = lambda seconds: None
        loader.fetch(EXPECTED, target, end_pauses)
    assert_complete(target, served)
    assert "bytes in 0 s" in caplog.text


def test_retry_after_delays_all_connections(served: Path, target: Path) -> None:
    faults = Faults()
    slept: list[tuple[str, float]] = []
    with serving(served, faulty(faults)) as url:
        loader = new_downloader(url, 3)
        loader.sleep = lambda seconds: slept.append((threading.current_thread().name, seconds))
        faults.statuses = []
        # The first request succeeds, the second one gets status 429.
        real_open, opened = loader.source.open, list[int]()

        def open_with_429(*args: object) -> object:
            opened.append(1)
            faults.statuses = [(429, {"Retry-After": "7"})] if len(opened) == 2 else faults.statuses
            return real_open(*args)  # type: ignore[arg-type]

        loader.source.open = open_with_429  # type: ignore[method-assign, assignment]
        loader.fetch(EXPECTED, target, lambda done: None)
    assert_complete(target, served)
    assert 7 in [seconds for _, seconds in slept]
    assert all(seconds <= 7 for _, seconds in slept)


def test_changed_etag_restarts_the_download(
    served: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults(etags=[*"aaab"], pause=0.002)
    with serving(served, faulty(faults)) as url:
        loader = new_downloader(url, 4)
        loader.sleep = lambda seconds: None
        loader.fetch(EXPECTED, target, lambda done: None)
    assert_complete(target, served)
    assert "has changed on the server; restarting the download" in caplog.text


@pytest.mark.slow
def test_expired_login_keeps_the_downloaded_bytes(served: Path, target: Path) -> None:
    faults = Faults(pause=0.005, chunk_size=1 << 15)
    with serving(served, faulty(faults)) as url:

        def expire_login(done: int) -> None:
            faults.html = "untyped" if done > SIZE // 3 else ""

        with pytest.raises(UserError, match="is an HTML page"):
            new_downloader(url, 3).fetch(EXPECTED, target, expire_login)
        faults.html = ""
        assert new_downloader(url, 3).fetch(EXPECTED, target, lambda done: None) < SIZE * 0.8
    assert_complete(target, served)


def test_rate_limit_is_shared_by_all_connections(served: Path, target: Path) -> None:
    slept: list[float] = []
    with serving(served) as url:
        loader = new_downloader(url, 4)
        loader.rate_limiter = RateLimiter(1e5, slept.append)
        loader.fetch(EXPECTED, target, lambda done: None)
    assert_complete(target, served)
    # The recorded waits do not sleep, so they add up to the time of all bytes at 0.1 MB/s.
    assert max(slept) == pytest.approx(SIZE / 1e5, rel=0.25)


def test_parallel_download_resumes_a_single_stream(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[1 << 30, 1_000_000]))) as url:
        with pytest.raises(UserError):
            Downloader(HttpSource(url, 5, 1, HttpCredentials(url)), -1, 5, sizes=SIZES).fetch(
                EXPECTED, target, lambda done: None
            )
        assert new_downloader(url, 4).fetch(EXPECTED, target, lambda done: None) < SIZE - 900_000
    assert_complete(target, served)


Spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=30)


@pytest.mark.slow
@given(Spans)
@settings(max_examples=60, deadline=None)
def test_partial_file_tracks_written_spans(spans: list[tuple[int, int]]) -> None:
    origin = Origin("x", '"1"', None, 80, ranges=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with PartialFile(folder / "f") as part:
            part.restart(origin)
            written = [False] * 80
            for begin, length in spans:
                part.write(begin, b"x" * length)
                written[begin : begin + length] = [True] * length
                assert part.has(begin, begin + length)
            assert part.size == sum(written)
            assert part.contiguous_size == [*written, False].index(False)
            missing = [i for a, b in part.gaps() for i in range(a, b)]
            assert missing == [i for i in range(80) if not written[i]]
            for begin in range(80):
                assert part.has(begin, begin + 1) == written[begin]
        with PartialFile(folder / "f") as reopened:  # from its state file
            assert reopened.size == (sum(written) if any(written) else 0)
            assert (reopened.origin == origin) == any(written)


def test_claims_never_overlap_and_cover_all(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "f") as part:
        part.restart(Origin("x", '"1"', None, 1_000_000, ranges=True))
        part.write(300_000, bytes(100_000))
        scheduler = RangeScheduler(part, 3, SIZES.min_steal)
        claims = [scheduler.take(250_000) for _ in range(5)]
        spans = [(claim.begin, claim.end) for claim in claims if claim]
        assert spans[:2] == [(0, 250_000), (250_000, 300_000)]
        claimed = sorted(spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(claimed))
        # All gaps are claimed, so the next claim is the second half of another one.
        half = scheduler.take(250_000)
        assert half
        assert any(claim and claim.end == half.begin for claim in claims)
        assert half.end - half.begin >= 50_000


def test_streaming_hash_restarts_with_the_partial_file(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(500_000)
    with PartialFile(tmp_path / "f") as part:
        part.restart(Origin("x", '"1"', None, len(data), ranges=True))
        with StreamingHash(part) as streaming_hash:
            part.write(0, b"something else")
            streaming_hash.result(lambda: None)
            part.restart(Origin("x", '"2"', None, len(data), ranges=True))
            part.write(250_000, data[250_000:])
            part.write(0, data[:250_000])
            assert streaming_hash.result(lambda: None) == hashlib.md5(data).hexdigest()


def test_partial_file_is_cleared_if_its_state_file_is_invalid(tmp_path: Path) -> None:
    def loaded_size(state: str) -> int:
        (tmp_path / "f.part").write_bytes(bytes(FIRST_REQUEST))
        (tmp_path / "f.part.json").write_text(state)
        with PartialFile(tmp_path / "f") as part:
            return part.size

    assert loaded_size('{"url": "x", "total": 99999, "spans": [[0, 10], [20, 30]]}') == 20
    for state in (
        "",
        "{}",
        "[]",
        '{"url": "x"}',
        '{"url": "x", "spans": [[0, 99999]]}',
        '{"spans": [[0, 9]]}',
    ):
        assert loaded_size(state) == 0, state
        assert (tmp_path / "f.part").stat().st_size == 0
