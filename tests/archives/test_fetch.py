from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import resource
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import Faults, faulty, serving

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.downloader import LOOK
from hpc_imagenet.data.download.downloader import Downloader as Source
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.receipt import Receipt
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.errors import UserError

FILE = "x.tar"
ALL = 1 << 30  # a drop behind the end: none
HINT = "ask your librarian"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "image.JPEG").write_bytes(random.Random(1).randbytes(2_000_000))
    with tarfile.open(folder / FILE, "w") as archive:
        archive.add(folder / "image.JPEG", "image.JPEG")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "archives" / FILE


class Fetch:
    """One client; `slept` and `told` are what it did in between."""

    def __init__(
        self, url: str, target: Path, retries: int = 3, timeout: float = 5.0, connections: int = 1
    ) -> None:
        self.slept: list[float] = []
        self.told: list[int] = []
        remote = HttpSource(url, timeout, connections, HttpCredentials(url))
        self.http = Source(
            remote, retries, timeout, connections=connections, hint=HINT, sleep=self.slept.append
        )
        self.target = target
        target.parent.mkdir(exist_ok=True)

    def __call__(self, **known: object) -> int:
        want = ExpectedArchive("dataset.archives.train", FILE, False, **known)  # type: ignore[arg-type]
        return self.http.fetch(want, self.target, self.told.append)

    def refused(self, **known: object) -> str:
        with pytest.raises(UserError) as caught:
            self(**known)
        assert "\n" not in str(caught.value)
        return str(caught.value)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_whole(target: Path, served: Path, source: str, *others: str) -> None:
    """The file is there with its receipt, and nothing else but `others`."""
    assert target.read_bytes() == (served / FILE).read_bytes()
    found = receipt.load_receipt(target)
    assert isinstance(found, Receipt)
    assert (found.md5, found.source, found.bytes) == (md5(target), source, target.stat().st_size)
    assert {path.name for path in target.parent.iterdir()} == {FILE, f"{FILE}.receipt.json", *others}


def test_well(served: Path, target: Path) -> None:
    size = (served / FILE).stat().st_size
    with serving(served) as url:
        fetch = Fetch(f"{url}/", target)
        assert fetch(md5=md5(served / FILE), bytes=size, vouched="md5sums") == size
        assert_whole(target, served, f"{url}/")
    assert receipt.load_receipt(target).verified == "md5sums"  # type: ignore[union-attr]
    assert fetch.told == sorted(fetch.told)
    assert fetch.told[-1] == size
    assert not fetch.slept


def test_goes_on_where_a_broken_connection_ended(served: Path, target: Path) -> None:
    size = (served / FILE).stat().st_size
    faults = Faults(drops=[ALL, 700_000, 1, 300_000])
    with serving(served, faulty(faults)) as url:
        fetch = Fetch(url, target)
        assert fetch() == size, "a byte came twice"
        assert_whole(target, served, url)
    begins = [LOOK, LOOK + 700_000, LOOK + 700_001, LOOK + 1_000_001]
    asked = [f"bytes=0-{LOOK - 1}", *(f"bytes={begin}-{size - 1}" for begin in begins)]
    assert [seen[2] for seen in faults.seen] == asked
    assert fetch.slept == [1, 1, 1], "each try brought new bytes"


def test_goes_on_after_another_process(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[ALL, 700_000]))) as url:
        assert "the connection" in Fetch(url, target, retries=-1).refused(), "retries=-1 tries once"
        part = target.with_name(f"{FILE}.part")
        assert part.read_bytes() == (served / FILE).read_bytes()[: LOOK + 700_000]
        assert not target.exists()
        second = Fetch(url, target)
        assert second() == (served / FILE).stat().st_size - LOOK - 700_000
        assert_whole(target, served, url)
    assert second.told[0] == LOOK + 700_000


def test_a_whole_part_needs_no_server(served: Path, target: Path) -> None:
    with serving(served) as url:
        Fetch(url, target)()
    size = target.stat().st_size
    note = {"url": f"{url}/{FILE}", "etag": '"x"', "total": size, "ranges": True, "spans": [[0, size]]}
    target.replace(target.with_name(f"{FILE}.part"))
    target.with_name(f"{FILE}.part.json").write_text(json.dumps(note))
    assert Fetch(url, target)() == 0
    assert_whole(target, served, url)


@pytest.mark.parametrize(
    ("faults", "words", "lost"),
    [
        (Faults(drops=[700_000, 700_000], ranges=False), "the server cannot resume", 1_400_000),
        (Faults(etags=[*"abbcc"]), "has changed on the server", 2 * LOOK),
        (
            Faults(drops=[ALL, 700_000, ALL, ALL, 700_000], etags=[*"aabbbcc"]),
            "has changed on the server",
            2 * (LOOK + 700_000),
        ),
        # The first request is for a range; without an ETag or a date the file is asked for as a whole.
        (Faults(drops=[0, 700_000, 0, 700_000], validators=False), "no ETag or date", 1_400_000),
    ],
)
def test_begins_anew_and_says_so(
    served: Path, target: Path, faults: Faults, words: str, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(served, faulty(faults)) as url, caplog.at_level(logging.WARNING):
        fetch = Fetch(url, target)
        assert fetch() == (served / FILE).stat().st_size + lost
        assert_whole(target, served, url)
    assert sum(words in line for line in caplog.messages) == 2


@pytest.mark.parametrize("connections", [1, 4])
def test_a_changed_file_is_noticed_where_if_range_is_not_understood(
    served: Path, target: Path, connections: int
) -> None:
    faults = Faults(etags=[*"ab"], if_range=False, pause=0.01)
    with serving(served, faulty(faults)) as url:
        Fetch(url, target, connections=connections)(md5=md5(served / FILE))
        assert_whole(target, served, url)
    assert sum(seen[2] == f"bytes=0-{LOOK - 1}" for seen in faults.seen) == 2


def test_begins_anew_where_the_url_is_another(
    served: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(served, faulty(Faults(drops=[ALL, 700_000]))) as url:
        Fetch(url, target, retries=-1).refused()
    with serving(served) as other:
        Fetch(other, target)()
        assert_whole(target, served, other)
    assert "begins anew" in caplog.text


def test_gives_up_after_retries_without_a_new_byte(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[ALL, 700_000] + [0] * 99))) as url:
        fetch = Fetch(url, target, retries=7)
        told = fetch.refused()
    assert fetch.slept == [1, 1, 2, 4, 8, 16, 32, 60]
    assert "8 tries in a row" in told
    assert "download.retries" in told
    assert target.with_name(f"{FILE}.part").stat().st_size == LOOK + 700_000, "what came is kept"
    assert not target.exists()


def test_a_server_that_always_begins_anew_is_given_up(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[700_000] * 99, ranges=False))) as url:
        fetch = Fetch(url, target, retries=3)
        assert "4 tries in a row" in fetch.refused()
    assert fetch.slept == [1, 1, 2, 4]


def test_honours_retry_after(served: Path, target: Path) -> None:
    faults = Faults(
        statuses=[
            (503, {"Retry-After": "7"}),
            (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
            (500, {}),
            (503, {"Retry-After": "99999"}),
        ]
    )
    with serving(served, faulty(faults)) as url:
        fetch = Fetch(url, target, retries=4)
        fetch()
        assert_whole(target, served, url)
    assert fetch.slept == [7, 0, 4, 3600]


@pytest.mark.parametrize("html", ["typed", "untyped"])
def test_an_html_page_is_no_archive(served: Path, target: Path, html: str) -> None:
    with serving(served, faulty(Faults(html=html))) as url:
        told = Fetch(url, target).refused()
    assert told.startswith(f"{url}/{FILE} is an HTML page")
    assert HINT in told
    assert not target.exists()


def test_an_html_page_does_not_cost_what_was_fetched(served: Path, target: Path) -> None:
    faults = Faults(drops=[700_000], ranges=False)
    with serving(served, faulty(faults)) as url:
        Fetch(url, target, retries=-1).refused()
        faults.html = "typed"
        Fetch(url, target).refused()
        assert target.with_name(f"{FILE}.part").stat().st_size == 700_000


def test_wrong_md5_is_kept_aside(served: Path, target: Path) -> None:
    with serving(served) as url:
        told = Fetch(url, target).refused(md5="0" * 32, vouched="md5sums")
        assert "0" * 32 in told
        assert md5(served / FILE) in told
        assert f"{target}.bad" in told
        assert [path.name for path in target.parent.iterdir()] == [f"{FILE}.bad"]
        Fetch(url, target)(md5=md5(served / FILE))
        assert_whole(target, served, url, f"{FILE}.bad")


def test_another_size_than_configured_is_refused_at_once(served: Path, target: Path) -> None:
    faults = Faults()
    with serving(served, faulty(faults)) as url:
        told = Fetch(url, target).refused(bytes=5)
    assert "dataset.archives.train.bytes is 5" in told
    assert len(faults.seen) == 1
    assert not target.with_name(f"{FILE}.part").stat().st_size


def test_a_server_that_promises_more(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(lie=1000, ranges=False))) as url:
        told = Fetch(url, target, retries=1).refused()
        assert "the connection ended early, 2 tries in a row" in told
        assert not target.exists()
        assert not target.with_name(f"{FILE}.bad").exists()
    with serving(served, faulty(Faults(lie=1000))) as url:
        assert Fetch(url, target)() == (served / FILE).stat().st_size, "asked again, it says that this is all"
        assert_whole(target, served, url)


def test_a_server_that_promises_less(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(lie=-20_000, ranges=False))) as url:
        told = Fetch(url, target).refused()
        assert "truncated" in told
        assert [path.name for path in target.parent.iterdir()] == [f"{FILE}.bad"]
    with serving(served, faulty(Faults(lie=-20_000))) as url:
        assert "tries in a row" in Fetch(url, target).refused()
    assert not target.exists()


def test_a_truncated_tar_without_md5(served: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / FILE).write_bytes((served / FILE).read_bytes()[:1_000_000])
    with serving(tmp_path / "cut") as url:
        assert "truncated inside image.JPEG" in Fetch(url, target).refused()
    assert not target.exists()


def test_no_length_said(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(length=False))) as url:
        Fetch(url, target)()
        assert_whole(target, served, url)


def test_no_tar(served: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(b"\x1f\x8b" + b"x" * 5000)
    with serving(tmp_path / "other") as url:
        assert "not a tar but a gzip file" in Fetch(url, target).refused()


@pytest.mark.parametrize(
    ("status", "words"), [(403, "is forbidden"), (401, "needs a login"), (418, "status 418")]
)
def test_refusals_are_not_repeated(served: Path, target: Path, status: int, words: str) -> None:
    faults = Faults(statuses=[(status, {})] * 9)
    with serving(served, faulty(faults)) as url:
        told = Fetch(url, target).refused()
    assert words in told
    assert HINT in told
    assert len(faults.seen) == 1


def test_missing_on_the_server(target: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as url:
        told = Fetch(url, target).refused()
    assert f"{url}/{FILE} does not exist: check dataset.source and dataset.archives.train.file" in told


def test_nobody_there(target: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and kept: nobody else takes it
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        fetch = Fetch(url, target, retries=99)
        told = fetch.refused()
    assert "Connection refused" in told
    assert "dataset.source" in told
    assert HINT in told
    assert fetch.slept == [1, 2], "who was never reached is not waited for as long"
    with pytest.raises(UserError, match=r"dataset\.source=http://a b:x"):
        Fetch("http://a b:x", target).http.text("md5sums")


def test_silence_counts_as_broken(target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "timed out" in Fetch(url, target, retries=0, timeout=0.2).refused()


def test_loopback_is_never_asked_through_a_proxy(
    served: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(served) as url:
        Fetch(url, target)()
        assert_whole(target, served, url)
    told = Fetch("http://example.invalid", target.with_name("y"), retries=0).refused()
    assert "refused" in told, "this one had to go through the proxy, where nobody listens"


def test_space_is_checked_first(served: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (served / FILE).stat().st_size
    real = os.statvfs
    free = size - 1

    def little(path: object) -> os.statvfs_result:
        values = list(real(path))  # type: ignore[call-overload]
        values[0] = values[1] = 1
        values[3] = values[4] = free
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", little)
    with serving(served) as url:
        told = Fetch(url, target).refused()
        assert f"it needs {size:,} bytes and {size - 1:,} are free" in told
        assert not target.with_name(f"{FILE}.part").stat().st_size
        free = size
        Fetch(url, target)()
        assert_whole(target, served, url)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up(served: Path, target: Path, small_files_only: None) -> None:
    with serving(served) as url:
        told = Fetch(url, target).refused()
        assert os.strerror(errno.EFBIG) in told
        assert "asking again goes on from here" in told
        assert not target.exists()
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        left = target.with_name(f"{FILE}.part").stat().st_size
        assert left > 900_000
        assert Fetch(url, target)() == (served / FILE).stat().st_size - left
        assert_whole(target, served, url)


def test_two_at_once(served: Path, target: Path) -> None:
    with serving(served) as url:
        told: list[str] = []
        first = Fetch(url, target)
        first.http.fetch(
            ExpectedArchive("dataset.archives.train", FILE, False),
            target,
            lambda done: told or told.append(Fetch(url, target).refused()),
        )
        assert "another job is downloading it" in told[0]
        assert_whole(target, served, url)
