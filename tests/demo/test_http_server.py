from __future__ import annotations

from pathlib import Path

import pytest
import urllib3

from hpc_imagenet.demo.http_server import serving

DATA = bytes(range(256)) * 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.tar").write_bytes(DATA)
    (tmp_path / "secret").write_bytes(b"no")
    return tmp_path / "served"


def get(url: str, method: str = "GET", **headers: str) -> urllib3.BaseHTTPResponse:
    return urllib3.request(method, url, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_http_server_serves_files_and_ranges(folder: Path) -> None:
    with serving(folder) as url:
        whole = get(f"{url}/x.tar")
        assert (whole.status, whole.data, whole.headers["Accept-Ranges"]) == (200, DATA, "bytes")
        head = get(f"{url}/x.tar", "HEAD")
        assert (head.status, head.data, head.headers["Content-Length"]) == (200, b"", str(len(DATA)))
        for range_value, begin, end in (
            ("5-9", 5, 10),
            ("2500-", 2500, 2560),
            ("-7", 2553, 2560),
            ("0-9999", 0, 2560),
        ):
            part = get(f"{url}/x.tar", Range=f"bytes={range_value}")
            assert (part.status, part.data) == (206, DATA[begin:end])
            assert part.headers["Content-Range"] == f"bytes {begin}-{end - 1}/2560"
        assert get(f"{url}/x.tar", Range="bytes=2560-").status == 416
        etag = whole.headers["ETag"]
        assert get(f"{url}/x.tar", Range="bytes=1-", If_Range=etag).status == 206
        (folder / "x.tar").write_bytes(DATA + b"more")
        changed = get(f"{url}/x.tar", Range="bytes=1-", If_Range=etag)
        assert (changed.status, changed.data) == (200, DATA + b"more")


def test_http_server_returns_404_outside_the_folder(folder: Path) -> None:
    with serving(folder) as url:
        assert get(f"{url}/y.tar").status == 404
        assert get(f"{url}/").status == 404
        assert get(f"{url}/%2e%2e/secret").status == 404
