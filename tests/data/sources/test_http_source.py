"""The proxy of the environment, as users set it."""

from __future__ import annotations

import pytest

from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.data.sources.range_source import TransientError
from hpc_imagenet.errors import UserError

URL = "https://example.invalid"


def source_with(proxy: str, monkeypatch: pytest.MonkeyPatch) -> HttpSource:
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    return HttpSource(URL, 5, 1, HttpCredentials(URL))


def test_a_proxy_needs_no_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransientError, match="refused"):  # by the closed port of the proxy
        source_with("127.0.0.1:9", monkeypatch).size("x.tar")


@pytest.mark.parametrize("proxy", ["socks5h://host:1080", "http://user:se#cret@host:80", "http://host:x"])
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    with pytest.raises(UserError, match="variable https_proxy is not a proxy that can be used") as caught:
        source_with(proxy, monkeypatch)
    assert proxy.split("//")[1][:7] not in str(caught.value)
