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
from hpc_imagenet.data.download.downloader import Downloader
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.receipt import Receipt
from hpc_imagenet.data.download.transfer import FIRST_REQUEST
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.errors import UserError

FILE = "x.tar"
ALL = 1 << 30  # bytes beyond the end of the file: no drop
HINT = "contact your librarian"


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


class Client:
    """A downloader of one archive that records its waits (`slept`, in s) and its progress calls."""

    def __init__(
        self, url: str, target: Path, retries: int = 3, timeout: float = 5.0, connections: int = 1
    ) -> None:
        self.slept: list[float] = []
        self.progress: list[int] = []
        source = HttpSource(url, timeout, connections, HttpCredentials(url))
        self.downloader = Downloader(
            source, retries, timeout, connections=connections, hint=HINT, sleep=self.slept.append
        )
        self.target = target
        target.parent.mkdir(exist_ok=True)

    def __call__(self, **fields: object) -> int:
        expected = ExpectedArchive("dataset.archives.train", FILE, False, **fields)  # type: ignore[arg-type]
        return self.downloader.fetch(expected, self.target, self.progress.append)

    def error(self, **fields: object) -> str:
        with pytest.raises(UserError) as caught:
            self(**fields)
        assert "\n" not in str(caught.value)
        return str(caught.value)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_complete(target: Path, served: Path, source: str, *others: str) -> None:
    """Assert that the file and its receipt exist, and no other file except `others`."""
    assert target.read_bytes() == (served / FILE).read_bytes()
    loaded = receipt.load_receipt(target)
    assert isinstance(loaded, Receipt)
    assert (loaded.md5, loaded.source, loaded.bytes) == (md5(target), source, target.stat().st_size)
    assert {path.name for path in target.parent.iterdir()} == {FILE, f"{FILE}.receipt.json", *others}


def test_download_writes_file_and_receipt(served: Path, target: Path) -> None:
    size = (served / FILE).stat().st_size
    with serving(served) as url:
        client = Client(f"{url}/", target)
        assert client(md5=md5(served / FILE), bytes=size, md5_source="md5sums") == size
        assert_complete(target, served, f"{url}/")
    assert receipt.load_receipt(target).verified == "md5sums"  # type: ignore[union-attr]
    assert client.progress == sorted(client.progress)
    assert client.progress[-1] == size
    assert not client.slept


def test_broken_connection_is_resumed(served: Path, target: Path) -> None:
    size = (served / FILE).stat().st_size
    faults = Faults(drops=[ALL, 700_000, 1, 300_000])
    with serving(served, faulty(faults)) as url:
        client = Client(url, target)
        assert client() == size, "a byte was downloaded twice"
        assert_complete(target, served, url)
    begins = [FIRST_REQUEST, FIRST_REQUEST + 700_000, FIRST_REQUEST + 700_001, FIRST_REQUEST + 1_000_001]
    expected_ranges = [f"bytes=0-{FIRST_REQUEST - 1}", *(f"bytes={begin}-{size - 1}" for begin in begins)]
    assert [request[2] for request in faults.requests] == expected_ranges
    assert client.slept == [1, 1, 1], "every attempt downloaded new bytes, so the backoff stays at 1 s"


def test_partial_file_of_an_earlier_process_is_resumed(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[ALL, 700_000]))) as url:
        assert "the connection" in Client(url, target, retries=-1).error(), "retries=-1 is a single attempt"
        part = target.with_name(f"{FILE}.part")
        assert part.read_bytes() == (served / FILE).read_bytes()[: FIRST_REQUEST + 700_000]
        assert not target.exists()
        second = Client(url, target)
        assert second() == (served / FILE).stat().st_size - FIRST_REQUEST - 700_000
        assert_complete(target, served, url)
    assert second.progress[0] == FIRST_REQUEST + 700_000


def test_complete_partial_file_needs_no_server(served: Path, target: Path) -> None:
    with serving(served) as url:
        Client(url, target)()
    size = target.stat().st_size
    state = {"url": f"{url}/{FILE}", "etag": '"x"', "total": size, "ranges": True, "spans": [[0, size]]}
    target.replace(target.with_name(f"{FILE}.part"))
    target.with_name(f"{FILE}.part.json").write_text(json.dumps(state))
    assert Client(url, target)() == 0
    assert_complete(target, served, url)


@pytest.mark.parametrize(
    ("faults", "log_line", "discarded"),
    [
        (Faults(drops=[700_000, 700_000], ranges=False), "the server cannot resume; restarting", 1_400_000),
        (Faults(etags=[*"abbcc"]), "has changed on the server", 2 * FIRST_REQUEST),
        (
            Faults(drops=[ALL, 700_000, ALL, ALL, 700_000], etags=[*"aabbbcc"]),
            "has changed on the server",
            2 * (FIRST_REQUEST + 700_000),
        ),
        # The first request has a range; without an ETag or a date the file is then requested as a whole.
        (Faults(drops=[ALL, 700_000, ALL, 700_000], validators=False), "no ETag or date", 1_400_000),
    ],
)
def test_restart_is_logged(
    served: Path,
    target: Path,
    faults: Faults,
    log_line: str,
    discarded: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(served, faulty(faults)) as url, caplog.at_level(logging.WARNING):
        client = Client(url, target)
        assert client() == (served / FILE).stat().st_size + discarded
        assert_complete(target, served, url)
    assert sum(log_line in line for line in caplog.messages) == 2


@pytest.mark.parametrize("connections", [1, 4])
def test_changed_file_is_detected_without_if_range(served: Path, target: Path, connections: int) -> None:
    faults = Faults(etags=[*"ab"], if_range=False, pause=0.01)
    with serving(served, faulty(faults)) as url:
        Client(url, target, connections=connections)(md5=md5(served / FILE))
        assert_complete(target, served, url)
    assert sum(request[2] == f"bytes=0-{FIRST_REQUEST - 1}" for request in faults.requests) == 2


def test_restarts_if_the_url_differs(served: Path, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(served, faulty(Faults(drops=[ALL, 700_000]))) as url:
        Client(url, target, retries=-1).error()
    with serving(served) as other:
        Client(other, target)()
        assert_complete(target, served, other)
    assert "restarting the download" in caplog.text


def test_gives_up_after_retries_without_a_new_byte(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[ALL, 700_000] + [0] * 99))) as url:
        client = Client(url, target, retries=7)
        error = client.error()
    assert client.slept == [1, 1, 2, 4, 8, 16, 32, 60]
    assert "8 failed attempts in a row" in error
    assert "download.retries" in error
    assert target.with_name(f"{FILE}.part").stat().st_size == FIRST_REQUEST + 700_000, (
        "downloaded bytes are kept"
    )
    assert not target.exists()


def test_gives_up_on_a_server_without_ranges_that_always_breaks(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(drops=[700_000] * 99, ranges=False))) as url:
        client = Client(url, target, retries=3)
        assert "4 failed attempts in a row" in client.error()
    assert client.slept == [1, 1, 2, 4]


def test_retry_waits_for_retry_after(served: Path, target: Path) -> None:
    faults = Faults(
        statuses=[
            (503, {"Retry-After": "7"}),
            (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
            (500, {}),
            (503, {"Retry-After": "99999"}),
        ]
    )
    with serving(served, faulty(faults)) as url:
        client = Client(url, target, retries=4)
        client()
        assert_complete(target, served, url)
    assert client.slept == [7, 0, 4, 3600]


@pytest.mark.parametrize("html", ["typed", "untyped"])
def test_html_page_is_refused(served: Path, target: Path, html: str) -> None:
    with serving(served, faulty(Faults(html=html))) as url:
        error = Client(url, target).error()
    assert error.startswith(f"{url}/{FILE} is an HTML page")
    assert HINT in error
    assert not target.exists()


def test_html_page_keeps_the_partial_file(served: Path, target: Path) -> None:
    faults = Faults(drops=[700_000], ranges=False)
    with serving(served, faulty(faults)) as url:
        Client(url, target, retries=-1).error()
        faults.html = "typed"
        Client(url, target).error()
        assert target.with_name(f"{FILE}.part").stat().st_size == 700_000


def test_file_with_wrong_md5_is_renamed_to_bad(served: Path, target: Path) -> None:
    with serving(served) as url:
        error = Client(url, target).error(md5="0" * 32, md5_source="md5sums")
        assert "0" * 32 in error
        assert md5(served / FILE) in error
        assert f"{target}.bad" in error
        assert [path.name for path in target.parent.iterdir()] == [f"{FILE}.bad"]
        Client(url, target)(md5=md5(served / FILE))
        assert_complete(target, served, url, f"{FILE}.bad")


def test_unexpected_size_is_refused_at_the_first_request(served: Path, target: Path) -> None:
    faults = Faults()
    with serving(served, faulty(faults)) as url:
        error = Client(url, target).error(bytes=5)
    assert "dataset.archives.train.bytes is 5" in error
    assert len(faults.requests) == 1
    assert not target.with_name(f"{FILE}.part").stat().st_size


def test_content_length_too_large(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(length_error=1000, ranges=False))) as url:
        error = Client(url, target, retries=1).error()
        assert "the connection ended early; 2 failed attempts in a row" in error
        assert not target.exists()
        assert not target.with_name(f"{FILE}.bad").exists()
    with serving(served, faulty(Faults(length_error=1000))) as url:
        assert Client(url, target)() == (served / FILE).stat().st_size, (
            "a range request returns the real length"
        )
        assert_complete(target, served, url)


def test_content_length_too_small(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(length_error=-20_000, ranges=False))) as url:
        error = Client(url, target).error()
        assert "truncated" in error
        assert [path.name for path in target.parent.iterdir()] == [f"{FILE}.bad"]
    with serving(served, faulty(Faults(length_error=-20_000))) as url:
        assert "attempts in a row" in Client(url, target).error()
    assert not target.exists()


def test_truncated_tar_without_md5_is_refused(served: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / FILE).write_bytes((served / FILE).read_bytes()[:1_000_000])
    with serving(tmp_path / "cut") as url:
        assert "truncated inside image.JPEG" in Client(url, target).error()
    assert not target.exists()


def test_download_without_content_length(served: Path, target: Path) -> None:
    with serving(served, faulty(Faults(length=False))) as url:
        Client(url, target)()
        assert_complete(target, served, url)


def test_gzip_instead_of_tar_is_refused(served: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(b"\x1f\x8b" + b"x" * 5000)
    with serving(tmp_path / "other") as url:
        assert "not a tar but a gzip file" in Client(url, target).error()


@pytest.mark.parametrize(
    ("status", "reason"), [(403, "is forbidden"), (401, "needs a login"), (418, "status 418")]
)
def test_permanent_errors_are_not_retried(served: Path, target: Path, status: int, reason: str) -> None:
    faults = Faults(statuses=[(status, {})] * 9)
    with serving(served, faulty(faults)) as url:
        error = Client(url, target).error()
    assert reason in error
    assert HINT in error
    assert len(faults.requests) == 1


def test_404_names_the_settings_to_check(target: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as url:
        error = Client(url, target).error()
    assert f"{url}/{FILE} does not exist: check dataset.source and dataset.archives.train.file" in error


def test_connection_refused_is_retried_only_twice(target: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # kept open, so that no other process takes the port
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        client = Client(url, target, retries=99)
        error = client.error()
    assert "Connection refused" in error
    assert "dataset.source" in error
    assert HINT in error
    assert client.slept == [1, 2], "a server that never answered gets fewer retries"
    with pytest.raises(UserError, match=r"dataset\.source=http://a b:x"):
        Client("http://a b:x", target).downloader.text("md5sums")


def test_server_without_response_times_out(target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "timed out" in Client(url, target, retries=0, timeout=0.2).error()


def test_loopback_bypasses_the_proxy(served: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(served) as url:
        Client(url, target)()
        assert_complete(target, served, url)
    error = Client("http://example.invalid", target.with_name("y"), retries=0).error()
    assert "refused" in error, "other hosts must use the proxy, whose port is closed"


def test_free_space_is_checked_before_the_download(
    served: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (served / FILE).stat().st_size
    real_statvfs = os.statvfs
    free = size - 1

    def limited_statvfs(path: object) -> os.statvfs_result:
        values = list(real_statvfs(path))  # type: ignore[call-overload]
        values[0] = values[1] = 1
        values[3] = values[4] = free
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", limited_statvfs)
    with serving(served) as url:
        error = Client(url, target).error()
        assert f"it needs {size:,} bytes and {size - 1:,} are free" in error
        assert not target.with_name(f"{FILE}.part").stat().st_size
        free = size
        Client(url, target)()
        assert_complete(target, served, url)


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_resumes_after_a_full_disk(served: Path, target: Path, file_size_limit: None) -> None:
    with serving(served) as url:
        error = Client(url, target).error()
        assert os.strerror(errno.EFBIG) in error
        assert "run the same command again to resume" in error
        assert not target.exists()
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        partial_size = target.with_name(f"{FILE}.part").stat().st_size
        assert partial_size > 900_000
        assert Client(url, target)() == (served / FILE).stat().st_size - partial_size
        assert_complete(target, served, url)


def test_second_process_is_refused(served: Path, target: Path) -> None:
    with serving(served) as url:
        errors: list[str] = []
        first = Client(url, target)
        first.downloader.fetch(
            ExpectedArchive("dataset.archives.train", FILE, False),
            target,
            lambda done: errors or errors.append(Client(url, target).error()),
        )
        assert "another job is downloading it" in errors[0]
        assert_complete(target, served, url)
