"""Opening a version that lies in a bucket or behind ssh, with real servers and what goes wrong between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from faulty_s3 import Faults, proxy
from sample_dataset import make_dataset

from hpc_imagenet.config import Cluster, Config, Dataset, Datastore, Stage, Upload
from hpc_imagenet.datastore import s3, shards, versions
from hpc_imagenet.datastore.ahead import ReadAhead
from hpc_imagenet.datastore.opening import opened
from hpc_imagenet.datastore.store import Store
from hpc_imagenet.datastore.transport import Ranges
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs import Run
from hpc_imagenet.stages import upload
from hpc_imagenet.world import World

pytestmark = pytest.mark.slow
KINDS = ["moto", "rclone", "ssh"]


@pytest.fixture(scope="module", params=KINDS)
def where(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Kind of place, and the endpoint or RSYNC_RSH."""
    with servers.place(request.param, tmp_path_factory.mktemp(request.param)) as how:
        yield request.param, how


@pytest.fixture
def url(where: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place with version 1 of `digits`, made from tmp_path/workspace."""
    kind, how = where
    if kind == "ssh":
        monkeypatch.setenv("RSYNC_RSH", how)
        url = f"there:{tmp_path}/stores"
    else:
        servers.credentials(monkeypatch, how)
        url = f"s3://bucket/{tmp_path.name}"
    workspace = tmp_path / "workspace"
    make_dataset(workspace)
    run = Run(workspace / "runs" / "abc-upload")
    run.folder.mkdir(parents=True)
    config = Config(
        workspace=str(workspace),
        stage=Stage("upload"),
        dataset=Dataset(name="digits"),
        datastore=Datastore("digits", url),
        upload=Upload(connections=4),
    )
    upload.run(config, run, World())
    return url


@pytest.fixture
def expected(url: str, tmp_path: Path) -> list[tuple[bytes, int]]:
    return images(Store(tmp_path / "workspace" / "datasets" / "digits"))


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short."""
    monkeypatch.setattr(s3, "PAUSE", 0.0)


def images(store: Store) -> list[tuple[bytes, int]]:
    return [image for split in ("train", "val") for image in store.split(split)]


def test_images_are_the_same_from_there_and_from_the_node(
    url: str, expected: list[tuple[bytes, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LOOK_AGAIN", 0.01)
    version = versions.open_version(Datastore("digits", url))
    if isinstance(version.place, Ranges):
        with opened(version, Cluster(), stages=True) as store:
            assert images(store) == expected
            assert store.shards.far()
    else:
        with (
            pytest.raises(UserError, match=r"give cluster\.scratch"),
            opened(version, Cluster(), stages=True),
        ):
            pass
    with opened(version, Cluster(scratch=str(tmp_path / "disk")), stages=True) as store:
        assert images(store) == expected
        for _ in range(3000):
            if not store.shards.far():
                break
            time.sleep(0.01)
            images(store)
        assert not store.shards.far()
        assert images(store) == expected


@pytest.mark.parametrize("where", ["moto"], indirect=True)
@pytest.mark.parametrize("kind", ["500", "503", "reset", "half"])
def test_reading_ahead_from_a_bucket_survives_faults(
    where: tuple[str, str],
    url: str,
    expected: list[tuple[bytes, int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    impatient(monkeypatch)
    faults = Faults(seed=1, every=3, kinds=(kind,), only=b"shards/")
    with proxy(where[1], faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        version = versions.open_version(Datastore("digits", url))
        with opened(version, Cluster(), stages=True) as store:
            train = store.split("train")
            ahead = ReadAhead(train, threads=4)
            try:
                for image in ahead.over((image, [image]) for image in range(len(train))):
                    assert ahead.read(image) == expected[image]
            finally:
                ahead.close()
    assert faults.made[kind] > 1


@pytest.mark.parametrize("where", ["moto"], indirect=True)
def test_a_server_that_stays_away_is_one_line_without_the_signature(
    where: tuple[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    with proxy(where[1], Faults(every=1, kinds=("503",), only=b"shards/")) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        version = versions.open_version(Datastore("digits", url))
        with opened(version, Cluster(), stages=True) as store, pytest.raises(UserError) as caught:
            store.split("train").read(0)
    assert "status 503, 9 tries" in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
