from __future__ import annotations

import base64
import logging
from pathlib import Path

import pytest
from faulty_server import Faults, faulty, serving

from hpc_imagenet.data.download.downloader import Downloader
from hpc_imagenet.data.sources.http_credentials import COOKIE, HEADER, HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.data.sources.range_source import NotAvailable
from hpc_imagenet.errors import UserError

HOST = "https://images.example/data"
SECRET = "b7Xq-9secret"


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the credentials of the user who runs the tests."""
    for name in (COOKIE, HEADER, "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def private(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def basic(user: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{SECRET}".encode()).decode()}


def test_no_credentials() -> None:
    assert HttpCredentials(HOST).headers(f"{HOST}/x") == {}


def test_credentials_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COOKIE, f"session={SECRET}")
    monkeypatch.setenv(HEADER, f"Authorization: Bearer {SECRET}")
    assert HttpCredentials(HOST).headers(f"{HOST}/x") == {
        "Cookie": f"session={SECRET}",
        "Authorization": f"Bearer {SECRET}",
    }


def test_credentials_from_a_file_of_headers(tmp_path: Path) -> None:
    path = private(tmp_path / "login", f"# library account\nX-Token: {SECRET}\nCookie: a={SECRET}\n")
    assert HttpCredentials(HOST, path).headers(f"{HOST}/x") == {"X-Token": SECRET, "Cookie": f"a={SECRET}"}


def test_credentials_from_exported_cookies(tmp_path: Path) -> None:
    lines = (
        "# Netscape HTTP Cookie File\n"
        f"#HttpOnly_.images.example\tTRUE\t/\tTRUE\t0\tsession\t{SECRET}\n"
        "other.example\tFALSE\t/\tFALSE\t0\tsession\tof-another-host\n"
    )
    path = private(tmp_path / "cookies.txt", lines)
    assert HttpCredentials(HOST, path).headers(f"{HOST}/x") == {"Cookie": f"session={SECRET}"}


def test_credentials_from_a_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"machine images.example login ada password {SECRET}\n"
    path = private(tmp_path / "netrc", text)
    assert HttpCredentials(HOST, path).headers(f"{HOST}/x") == basic("ada")
    with pytest.raises(UserError, match=r"without an entry for elsewhere\.example"):
        HttpCredentials("https://elsewhere.example", path)
    # ~/.netrc is used by default; one without an entry for the host is ignored.
    private(tmp_path / "home" / ".netrc", text)
    assert HttpCredentials(HOST).headers(f"{HOST}/x") == basic("ada")
    assert HttpCredentials("https://elsewhere.example").headers("https://elsewhere.example/x") == {}
    monkeypatch.setenv("NETRC", private(tmp_path / "other-netrc", text.replace("ada", "bob")))
    assert HttpCredentials(HOST).headers(f"{HOST}/x") == basic("bob")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_file_readable_by_other_users_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "login"
    private(path, f"X-Token: {SECRET}")
    path.chmod(mode)
    with pytest.raises(UserError) as caught:
        HttpCredentials(HOST, str(path))
    assert f"(mode {mode:o}): chmod 600 {path}" in str(caught.value)
    path = tmp_path / "home" / ".netrc"
    private(path, f"machine images.example login a password {SECRET}")
    path.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        HttpCredentials(HOST)


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}",
        f"X-Token: {SECRET}\x07",
        f"X Token: {SECRET}",
        f"machine images.example {SECRET} x",
        f"# Netscape HTTP Cookie File\n{SECRET}",
        "",
    ],
)
def test_invalid_file_content_is_not_shown_in_the_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        HttpCredentials(HOST, private(tmp_path / "login", text))
    assert SECRET not in str(caught.value)
    assert str(tmp_path / "login") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "start", ["# Netscape HTTP Cookie File\nx.example\tTRUE\t/\tTRUE\t0\tsession\t", "machine x password "]
)
def test_secrets_that_are_not_utf_8_are_refused(tmp_path: Path, start: str) -> None:
    path = tmp_path / "login"
    path.write_bytes(start.encode() + SECRET.encode() + b"\xe9\n")
    path.chmod(0o600)
    with pytest.raises(UserError, match="UTF-8") as caught:
        HttpCredentials(HOST, str(path))
    assert SECRET not in str(caught.value)


def test_header_with_line_break_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COOKIE, f"{SECRET}\r\nX-More: 1")
    with pytest.raises(UserError) as caught:
        HttpCredentials(HOST)
    assert COOKIE in str(caught.value)
    assert SECRET not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"download\.login=.*/none cannot be read \(No such file"):
        HttpCredentials(HOST, str(tmp_path / "none"))
    with pytest.raises(UserError, match="no user's home folder here"):
        HttpCredentials(HOST, "~nosuchuser/x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "md5sums").write_text("hello")
    return tmp_path / "served"


def test_credentials_are_not_sent_to_another_host_on_redirect(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = private(tmp_path / "login", f"Cookie: {SECRET}\nAuthorization: {SECRET}\nX-Token: {SECRET}")
    other = Faults()
    with serving(folder, faulty(other)) as other_url, caplog.at_level(logging.DEBUG):
        redirecting = Faults(redirect=other_url)
        with serving(folder, faulty(redirecting)) as url:
            source = Downloader(HttpSource(url, 5, 1, HttpCredentials(url, path)), 0, 5)
            assert source.text("md5sums") == "hello"
    assert [headers.get("X-Token") for headers in redirecting.headers] == [SECRET]
    assert len(other.headers) == 1
    assert SECRET not in str(other.headers)
    assert "the login is sent unencrypted" in caplog.text
    assert SECRET not in caplog.text


def test_credentials_are_kept_on_redirect_within_the_host(folder: Path, tmp_path: Path) -> None:
    path = private(tmp_path / "login", f"X-Token: {SECRET}")
    faults = Faults(statuses=[(302, {"Location": "/md5sums"})], only="moved")
    with serving(folder, faulty(faults)) as url:
        assert Downloader(HttpSource(url, 5, 1, HttpCredentials(url, path)), 0, 5).text("moved") == "hello"
    assert [headers.get("X-Token") for headers in faults.headers] == [SECRET, SECRET]


def test_endless_redirects_are_refused(folder: Path) -> None:
    faults = Faults(statuses=[(302, {"Location": "/x.tar"})] * 99)
    with serving(folder, faulty(faults)) as url, pytest.raises(UserError, match="too many redirects"):
        Downloader(HttpSource(url, 5, 1, HttpCredentials(url)), 0, 5).text("x.tar")
    assert len(faults.requests) == 6


def test_status_401_raises_not_available(folder: Path) -> None:
    with serving(folder, faulty(Faults(statuses=[(401, {})]))) as url:
        source = HttpSource(url, 5, 1, HttpCredentials(url))
        with pytest.raises(NotAvailable) as caught, source.open("x.tar"):
            pass
    assert caught.value.status == 401
