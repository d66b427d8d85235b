"""Fixtures of stages: archives of the digits, two S3 servers and a host behind ssh."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from faulty_s3 import Faults, proxy
from remote_workspace import Workspace

from hpc_imagenet.datastore.backends import s3_backend, s3_client, s3_upload, ssh_connection
from hpc_imagenet.demo import digits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archives of the digits; tests that change them take a copy."""
    folder = tmp_path_factory.mktemp("sources") / "digits"
    digits.write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with servers.moto() as endpoint:
        servers.bucket_client(endpoint).create_bucket(Bucket="bucket")  # type: ignore[attr-defined]
        yield endpoint


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "bucket").mkdir()
    with servers.rclone(folder) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.sshd(tmp_path_factory.mktemp("sshd")) as shell:
        yield shell


@pytest.fixture(params=["moto", "rclone", "host", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(tmp_path / "stores")
    access = request.getfixturevalue(request.param)
    if request.param == "host":
        monkeypatch.setenv("RSYNC_RSH", access)
        return f"there:{tmp_path}/stores"
    servers.credentials(monkeypatch, access)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def remote_workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits between retries and lower the size limits."""
    for module in (s3_client, ssh_connection):
        monkeypatch.setattr(module, "FIRST_WAIT", module.FIRST_WAIT / 50)
        monkeypatch.setattr(module, "LONGEST_WAIT", module.LONGEST_WAIT / 50)
    monkeypatch.setattr(s3_backend, "CLAIM_WAIT", s3_backend.CLAIM_WAIT / 50)
    monkeypatch.setattr(s3_upload, "MAX_SINGLE", 1 << 20)
    monkeypatch.setattr(s3_upload, "PART", 5 << 20)  # the minimum of S3


@pytest.fixture
def faults(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    faults = Faults(seed=random.SystemRandom().randrange(10**6))
    print(f"seed {faults.seed}")
    with proxy(moto, faults) as endpoint:
        servers.credentials(monkeypatch, endpoint)
        yield faults


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"
