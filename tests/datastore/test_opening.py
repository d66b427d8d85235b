"""Opening a version that lies in a bucket or behind ssh, with real servers and what goes wrong between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from faulty_s3 import Faults, proxy
from sample_dataset import make_dataset

from hpc_imagenet.config.schema import Cluster, Config, Dataset, Datastore, Stage, Upload
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_client
from hpc_imagenet.datastore.backends.storage_backend import SupportsRangeReads
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.reader import shard_reader
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.reader.prefetch import Prefetcher
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages import upload

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
    upload.run(config, run, DistEnv())
    return url


@pytest.fixture
def expected(url: str, tmp_path: Path) -> list[tuple[bytes, int]]:
    return images(DatasetReader(tmp_path / "workspace" / "datasets" / "digits"))


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short."""
    monkeypatch.setattr(s3_client, "PAUSE", 0.0)


def images(store: DatasetReader) -> list[tuple[bytes, int]]:
    return [image for split in ("train", "val") for image in store.open_split(split)]


def test_images_are_the_same_from_there_and_from_the_node(
    url: str, expected: list[tuple[bytes, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "LOOK_AGAIN", 0.01)
    version = versions.open_version(Datastore("digits", url))
    if isinstance(version.backend, SupportsRangeReads):
        with open_dataset(version, Cluster(), stages=True) as store:
            assert images(store) == expected
            assert store.shards.is_remote()
    else:
        with (
            pytest.raises(UserError, match=r"give cluster\.scratch"),
            open_dataset(version, Cluster(), stages=True),
        ):
            pass
    with open_dataset(version, Cluster(scratch=str(tmp_path / "disk")), stages=True) as store:
        assert images(store) == expected
        for _ in range(3000):
            if not store.shards.is_remote():
                break
            time.sleep(0.01)
            images(store)
        assert not store.shards.is_remote()
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
        with open_dataset(version, Cluster(), stages=True) as store:
            train = store.open_split("train")
            ahead = Prefetcher(train, threads=4)
            try:
                for image in ahead.batches((image, [image]) for image in range(len(train))):
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
        with open_dataset(version, Cluster(), stages=True) as store, pytest.raises(UserError) as caught:
            store.open_split("train").read(0)
    assert "status 503, 9 tries" in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
