"""open_dataset of a version in a bucket or on an ssh host, with real servers and network faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from command_line import eventually
from faulty_s3 import Faults, proxy
from sample_dataset import make_dataset

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Cluster, Config, Datastore, StageSelection, Upload
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_client
from hpc_imagenet.datastore.backends.storage_backend import SupportsRangeReads
from hpc_imagenet.datastore.node_cache.staging import StagingIntervals
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.datastore.reader.prefetch import Prefetcher
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import upload

pytestmark = pytest.mark.slow
KINDS = ["moto", "rclone", "ssh"]


@pytest.fixture(scope="module", params=KINDS)
def backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Kind of backend, and its endpoint URL or RSYNC_RSH."""
    with servers.storage_server(request.param, tmp_path_factory.mktemp(request.param)) as address:
        yield request.param, address


@pytest.fixture
def url(backend: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a backend with version 1 of `digits`, uploaded from tmp_path/workspace."""
    kind, address = backend
    if kind == "ssh":
        monkeypatch.setenv("RSYNC_RSH", address)
        url = f"there:{tmp_path}/stores"
    else:
        servers.credentials(monkeypatch, address)
        url = f"s3://bucket/{tmp_path.name}"
    workspace = tmp_path / "workspace"
    make_dataset(workspace)
    run = Run(workspace / "runs" / "abc-upload")
    run.folder.mkdir(parents=True)
    config = Config(
        workspace=str(workspace),
        stage=StageSelection("upload"),
        dataset=Dataset(name="digits"),
        datastore=Datastore("digits", url),
        upload=Upload(connections=4),
    )
    upload.run(config, run, DistEnv())
    return url


@pytest.fixture
def expected(url: str, tmp_path: Path) -> list[tuple[bytes, int]]:
    return images(DatasetReader(tmp_path / "workspace" / "datasets" / "digits"))


def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make retries of S3 requests wait for no time."""
    monkeypatch.setattr(s3_client, "FIRST_WAIT", 0.0)


def images(store: DatasetReader) -> list[tuple[bytes, int]]:
    return [image for split in ("train", "val") for image in store.open_split(split)]


def test_images_are_identical_from_the_backend_and_from_the_node_cache(
    url: str, expected: list[tuple[bytes, int]], tmp_path: Path
) -> None:
    version = versions.open_version(Datastore("digits", url))
    if isinstance(version.backend, SupportsRangeReads):
        with open_dataset(version, Cluster(), stages=True) as store:
            assert images(store) == expected
            assert store.shards.is_remote()
    else:
        with (
            pytest.raises(UserError, match=r"set cluster\.scratch"),
            open_dataset(version, Cluster(), stages=True),
        ):
            pass
    cluster = Cluster(scratch=str(tmp_path / "disk"))
    with open_dataset(version, cluster, stages=True, intervals=StagingIntervals(cached=0.01)) as store:
        assert images(store) == expected
        eventually(store.shards.is_complete, 300, lambda: images(store))
        assert images(store) == expected


@pytest.mark.parametrize("backend", ["moto"], indirect=True)
@pytest.mark.parametrize("kind", ["500", "503", "reset", "half"])
def test_prefetch_from_a_bucket_retries_after_faults(
    backend: tuple[str, str],
    url: str,
    expected: list[tuple[bytes, int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    retry_at_once(monkeypatch)
    faults = Faults(seed=1, every=3, kinds=(kind,), only=b"shards/")
    with proxy(backend[1], faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        version = versions.open_version(Datastore("digits", url))
        with open_dataset(version, Cluster(), stages=True) as store:
            train = store.open_split("train")
            prefetcher = Prefetcher(train, threads=4)
            try:
                for image in prefetcher.batches((image, [image]) for image in range(len(train))):
                    assert prefetcher.read(image) == expected[image]
            finally:
                prefetcher.close()
    assert faults.injected[kind] > 1


@pytest.mark.parametrize("backend", ["moto"], indirect=True)
def test_an_unavailable_server_is_reported_in_one_line_without_the_signature(
    backend: tuple[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry_at_once(monkeypatch)
    with proxy(backend[1], Faults(every=1, kinds=("503",), only=b"shards/")) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        version = versions.open_version(Datastore("digits", url))
        with open_dataset(version, Cluster(), stages=True) as store, pytest.raises(UserError) as caught:
            store.open_split("train").read(0)
    assert "status 503, 9 attempts" in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
