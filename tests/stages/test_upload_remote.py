"""Uploads to hosts and buckets, with what goes wrong between, and the verb `datastores` on them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from sample_dataset import make_dataset
from servers import Faults

from hpc_imagenet import datastores, verbs
from hpc_imagenet.config import Config, Dataset, Datastore, Stage, Upload
from hpc_imagenet.datastore import multipart, s3, versions
from hpc_imagenet.datastore.store import Store
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs import Run
from hpc_imagenet.stages import upload
from hpc_imagenet.world import World

KILLS = int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "3"))  # of each kind of place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with servers.moto() as endpoint:
        servers.bucket_client(endpoint).create_bucket(Bucket="bucket")  # type: ignore[attr-defined]
        yield endpoint


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "bucket").mkdir()
    with servers.rclone(folder) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.sshd(tmp_path_factory.mktemp("sshd")) as shell:
        yield shell


@pytest.fixture(params=["moto", "rclone", "ssh", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(tmp_path / "stores")
    how = request.getfixturevalue(request.param)
    if request.param == "ssh":
        monkeypatch.setenv("RSYNC_RSH", how)
        return f"there:{tmp_path}/stores"
    servers.credentials(monkeypatch, how)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short, and what is large is small."""
    monkeypatch.setattr(s3, "PAUSE", s3.PAUSE / 50)
    monkeypatch.setattr(s3, "LONGEST", s3.LONGEST / 50)
    monkeypatch.setattr(multipart, "WHOLE", 1 << 20)
    monkeypatch.setattr(multipart, "PART", 5 << 20)


class House:
    """A workspace with the processed dataset `digits`, of about 20 MB."""

    def __init__(self, tmp_path: Path) -> None:
        self.workspace = tmp_path / "workspace"
        self.manifest = make_dataset(self.workspace, images=8, image_bytes=800_000)
        self.dataset = self.workspace / "datasets" / "digits"

    def config(self, url: str, name: str = "digits", **stage: Any) -> Config:
        return Config(
            workspace=str(self.workspace),
            stage=Stage("upload", **stage),
            dataset=Dataset(name="digits"),
            datastore=Datastore(name, url),
            upload=Upload(connections=4),
        )

    def upload(self, url: str, name: str = "digits", **stage: Any) -> dict[str, Any]:
        run = Run(self.workspace / "runs" / f"abc-upload-{stage.get('part')}")
        run.folder.mkdir(parents=True, exist_ok=True)
        return upload.run(self.config(url, name, **stage), run, World())

    def verb(self, url: str, *words: str) -> int:
        return verbs.main("datastores", [*words, f"datastore.url={url}", f"workspace={self.workspace}"])

    def holds(self, url: str, target: Path) -> None:
        """Fetch the newest version, and compare every image."""
        assert self.verb(url, "fetch", "digits", str(target)) == 0
        version = versions.open_version(Datastore("digits", str(target)))
        assert self.images(version.folder) == self.images(self.dataset)

    def images(self, at: Path) -> list[tuple[bytes, int]]:
        store = Store(at)
        return [image for name in store.manifest.splits for image in store.split(name)]


def test_a_version_comes_and_goes(
    house: House, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = house.upload(url)
    assert (result["datastore"], result["images"]) == ("digits@v1", 24)
    assert result["kept"] == result["reused"] == 0
    again = house.upload(url)
    assert (again["version"], again["kept"]) == (1, house.manifest.bytes)
    make_dataset(house.workspace, content="2nd", images=8, image_bytes=800_000)
    assert house.upload(url)["datastore"] == "digits@v2"
    assert versions.complete(url, "digits") == [1, 2]
    capsys.readouterr()
    assert house.verb(url) == 0
    table = capsys.readouterr().out
    assert "digits@v1  complete      24  0.01" in table
    assert "digits@v2" in table
    assert house.verb(url, "verify", "digits@v2") == 0
    assert "digits@v2 is whole: 0.019 GB read" in capsys.readouterr().out
    house.holds(url, tmp_path / "here")
    assert house.verb(url, "delete", "digits@v2", "--yes") == 0
    assert versions.complete(url, "digits") == [1]
    assert house.verb(url, "sweep", "--yes", "--days=0") == 0
    assert house.upload(url)["datastore"] == "digits@v3"  # a number never means two things


def test_what_is_wrong_is_found(house: House, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    house.upload(url)
    place = versions.locate(url)
    place.remove(["digits/v1/meta.bin"])
    place.create("digits/v1/meta.bin", b"x" * 99)
    place.remove(["digits/v1/val.npy"])
    assert house.verb(url, "verify", "digits") == 1
    told = capsys.readouterr().out
    assert "meta.bin has other bytes than when it was made" in told
    assert "val.npy is missing" in told


def test_parts_send_and_one_commits(house: House, url: str) -> None:
    parts = [house.upload(url, part=part, parts=3) for part in range(3)]
    assert sum(part["bytes"] for part in parts) == house.manifest.bytes
    assert all(part["copied"] + part["linked"] == part["bytes"] > 0 for part in parts)
    assert versions.complete(url, "digits") == []
    whole = house.upload(url, parts=3)
    assert (whole["version"], whole["copied"]) == (1, 0)
    assert set(versions.locate(url).files("digits/v1")) == {
        "manifest.json",
        *(file.path for file in upload.placed(house.manifest).all_files()),
    }


def test_two_upload_the_same_at_once(house: House, url: str, tmp_path: Path) -> None:
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(house.upload(url, part=None, parts=n)))
        for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result["version"] for result in results] == [1, 1]
    house.holds(url, tmp_path / "here")


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_upload_remote import House
from hpc_imagenet.datastore import multipart
multipart.WHOLE, multipart.PART = 1 << 20, 5 << 20
house = House.__new__(House)
house.workspace = Path({workspace!r})
print("begun", flush=True)
house.upload({url!r})
print("done", flush=True)
"""


def test_killed_at_any_moment_it_goes_on(house: House, url: str, tmp_path: Path) -> None:
    if "/" not in url:
        pytest.skip("no place")
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    if not versions.remote(url):  # tests/stages/test_upload.py kills the folder's at every call
        pytest.skip("killed elsewhere")
    code = CHILD.format(
        tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])],
        workspace=str(house.workspace),
        url=url,
    )
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout
            assert child.stdout.readline() == b"begun\n"
            time.sleep(moments.uniform(0.1, 2.0))
            child.send_signal(signal.SIGKILL)
        assert len(versions.complete(url, "digits")) <= 1
    assert house.upload(url)["version"] == 1
    assert house.verb(url, "verify", "digits") == 0
    house.holds(url, tmp_path / "here")


@pytest.fixture
def faults(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    made = Faults(seed=random.SystemRandom().randrange(10**6))
    print(f"seed {made.seed}")
    with servers.proxy(moto, made) as endpoint:
        servers.credentials(monkeypatch, endpoint)
        yield made


@pytest.mark.usefixtures("quick")
def test_a_server_with_faults(house: House, faults: Faults, tmp_path: Path) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    faults.share = 0.15
    assert house.upload(url)["version"] == 1
    house.holds(url, tmp_path / "here")
    print(faults.made)
    assert len(faults.made) >= 3
    faults.share = 0
    assert house.verb(url, "verify", "digits") == 0
    assert set(versions.locate(url).files("digits/v1")) == {
        "manifest.json",
        *(file.path for file in upload.placed(house.manifest).all_files()),
    }


@pytest.mark.usefixtures("quick")
def test_a_server_that_is_away_for_a_while(house: House, faults: Faults, tmp_path: Path) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    versions.locate(url)
    thread = threading.Timer(0.5, lambda: setattr(faults, "away", time.monotonic() + 0.5))
    thread.start()
    assert house.upload(url)["version"] == 1
    thread.join()
    house.holds(url, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_a_server_that_stays_away_is_told_and_nothing_is_seen(
    house: House, faults: Faults, tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    faults.answers = [servers.answer("503", "SlowDown")] * 100
    faults.only = b"shards/train-1.tar"
    with pytest.raises(UserError, match=r"503 SlowDown, 9 tries in a row; .*ask again") as caught:
        house.upload(url)
    assert "\n" not in str(caught.value)
    assert versions.complete(url, "digits") == []
    faults.answers = []
    assert house.upload(url)["kept"] > 0
    house.holds(url, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_only_missing_parts_are_sent_again(house: House, faults: Faults, tmp_path: Path) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    faults.only = b"partNumber=2"
    faults.answers = [servers.answer("403", "ExpiredToken")] * 100
    with pytest.raises(UserError, match=r"the credentials have expired \(ExpiredToken\): renew them"):
        house.upload(url)
    assert versions.complete(url, "digits") == []
    faults.answers, faults.lines = [], []
    assert house.upload(url)["version"] == 1
    again = [line for line in faults.lines if b"PUT" in line and b"partNumber=1&" in line]
    assert len(again) < 3  # three shards have a first part
    house.holds(url, tmp_path / "here")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (("403", "AccessDenied"), r"is forbidden \(AccessDenied\): look at the credentials"),
        (("403", "InvalidAccessKeyId"), r"is forbidden \(InvalidAccessKeyId\)"),
        (("400", "ExpiredToken"), r"the credentials have expired \(ExpiredToken\)"),
        (("404", "NoSuchBucket"), r"there is no bucket bucket: make it first"),
        (("507", "InsufficientCapacity"), r"507 InsufficientCapacity, 9 tries in a row"),
    ],
)
def test_where_it_must_give_up_it_says_so(
    house: House, faults: Faults, tmp_path: Path, fault: tuple[str, str], line: str
) -> None:
    faults.only, faults.answers = b"PUT", [servers.answer(*fault)] * 100
    with pytest.raises(UserError, match=line) as caught:
        house.upload(f"s3://bucket/{tmp_path.name}")
    assert "\n" not in str(caught.value)
    assert servers.SECRET not in str(caught.value)


def test_a_host_that_nobody_knows(house: House, ssh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSYNC_RSH", ssh)
    with pytest.raises(UserError, match=r"^datastore\.url=nobody\.invalid:/x: asking: .*resolve"):
        house.upload("nobody.invalid:/x")


def test_a_full_host(house: House, ssh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        monkeypatch.setenv("RSYNC_RSH", ssh)
        url = f"there:{disk}"
        with pytest.raises(UserError, match="No space left"):
            house.upload(url)
        assert versions.complete(url, "digits") == []
        subprocess.run(["mount", "-o", "remount,size=90m", str(disk)], check=True)
        assert house.upload(url)["version"] == 1
        house.holds(url, tmp_path / "here")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_uploads_of_different_images_without_conditional_writes(
    house: House, rclone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later claim wins; the earlier upload sees it when it commits, and leaves nothing wrong."""
    servers.credentials(monkeypatch, rclone)
    url = f"s3://bucket/{tmp_path.name}"
    real = versions.Claim.commit

    def commit(claim: versions.Claim, manifest: Any) -> None:
        claim.place.remove([f"{claim.path}/upload.json"])
        claim.place.create(f"{claim.path}/upload.json", b'{"content": "of another"}')
        real(claim, manifest)

    monkeypatch.setattr(versions.Claim, "commit", commit)
    with pytest.raises(UserError, match="was taken away from this upload meanwhile: ask again"):
        house.upload(url)
    monkeypatch.undo()
    servers.credentials(monkeypatch, rclone)
    assert versions.complete(url, "digits") == []
    assert house.upload(url)["version"] == 2


def test_a_fetch_that_is_cut_off_goes_on(
    house: House, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.upload(url)
    place, here = type(versions.locate(url)), tmp_path / "here"
    real, fetched = place.fetch, []

    def cut(self: Any, path: str, *rest: Any) -> None:
        if len(fetched) == 2:
            raise KeyboardInterrupt
        fetched.append(path)
        real(self, path, *rest)

    monkeypatch.setattr(place, "fetch", cut)
    with pytest.raises(KeyboardInterrupt):
        house.verb(url, "fetch", "digits", str(here))
    assert versions.complete(str(here), "digits") == []
    again: list[str] = []
    monkeypatch.setattr(
        place, "fetch", lambda self, path, *rest: (again.append(path), real(self, path, *rest))
    )
    house.holds(url, here)
    assert not set(again) & set(fetched)


def test_a_version_in_use_is_not_deleted(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "stores")
    house.upload(url)
    monkeypatch.setattr(datastores, "used_by", lambda record, place: {"digits@v1": ["1234-resnet18"]})
    with pytest.raises(UserError, match=r"digits@v1 is in use by 1234-resnet18: cancel them, or wait"):
        house.verb(url, "delete", "digits@v1", "--yes")
    monkeypatch.undo()
    with pytest.raises(UserError, match="nobody is there to be asked; --yes means it"):
        house.verb(url, "delete", "digits@v1")
    assert versions.complete(url, "digits") == [1]
    shutil.rmtree(house.dataset.parents[1] / "archives")
    assert house.verb(url, "verify", "digits") == 0
