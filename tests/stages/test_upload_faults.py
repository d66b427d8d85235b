"""Uploads and fetches through what goes wrong between: servers, connections, credentials, full disks."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from faulty_s3 import KINDS, Faults, answer, proxy
from relay import Relay
from remote_house import House

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import s3_upload
from hpc_imagenet.errors import UserError

AWAY = float(os.environ.get("HPC_IMAGENET_TEST_AWAY", "0.5"))  # s that a server is away; 30 takes real waits

pytestmark = pytest.mark.slow


@pytest.fixture
def house(remote_house: House) -> House:
    return remote_house


@pytest.fixture
def faults(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    made = Faults(seed=random.SystemRandom().randrange(10**6))
    print(f"seed {made.seed}")
    with proxy(moto, made) as endpoint:
        servers.credentials(monkeypatch, endpoint)
        yield made


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_a_server_are_overcome(
    house: House, faults: Faults, bucket: str, tmp_path: Path, kind: str
) -> None:
    faults.every, faults.kinds = 5, (kind,)
    if kind == "sum":
        faults.every, faults.only = 3, b"partNumber"
    if kind == "flip":  # what was found wrong is fetched once more, whole: it must not go wrong twice
        faults.every, faults.only = 1, b"/shards/train-1.tar"
        assert house.upload(bucket)["version"] == 1
        with pytest.raises(UserError, match=r"train-1\.tar has other bytes than when it was made"):
            house.verb(bucket, "fetch", "digits", str(tmp_path / "here"))
        assert versions.complete_versions(str(tmp_path / "here"), "digits") == []
        assert faults.made[kind] >= 2
        faults.every = 0
    assert house.upload(bucket)["version"] == 1
    house.holds(bucket, tmp_path / "here")
    assert faults.made[kind]
    faults.every = 0
    assert house.verb(bucket, "verify", "digits") == 0


@pytest.mark.usefixtures("quick")
def test_a_byte_that_changes_once_on_its_way_is_fetched_again(
    house: House, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    house.upload(bucket)
    faults.every, faults.kinds, faults.only = 1, ("flip",), b"/shards/train-1.tar"
    watch = threading.Thread(target=lambda: stop_after_one(faults))
    watch.start()
    house.holds(bucket, tmp_path / "here")
    watch.join()
    assert faults.made == {"flip": 1}


@pytest.mark.usefixtures("quick")
def test_headers_that_are_cut_off_are_asked_for_again(
    house: House, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    house.upload(bucket)
    faults.only = b"HEAD"
    faults.answers = [
        b'HTTP/1.1 200 OK\r\nETag: "x"\r\n\r\n',
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
    ]
    assert house.verb(bucket, "verify", "digits") == 0
    assert not faults.answers


def stop_after_one(faults: Faults) -> None:
    while not faults.made:
        time.sleep(0.001)
    faults.every = 0


def test_a_server_that_is_away_for_a_while(
    house: House, faults: Faults, bucket: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if AWAY < 5:
        request.getfixturevalue("quick")

    def leave() -> None:
        while not any(b"PUT" in line and b"/shards/" in line for line in list(faults.lines)):
            time.sleep(0.001)
        faults.away = time.monotonic() + AWAY

    thread = threading.Thread(target=leave)
    thread.start()
    assert house.upload(bucket)["version"] == 1
    thread.join()
    assert time.monotonic() > faults.away
    house.holds(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_a_server_that_stays_away_is_told_and_nothing_is_seen(
    house: House, faults: Faults, bucket: str, tmp_path: Path
) -> None:
    faults.answers = [answer("503", "SlowDown")] * 100
    faults.only = b"shards/train-1.tar"
    with pytest.raises(UserError, match=r"503 SlowDown, 9 tries in a row; .*ask again") as caught:
        house.upload(bucket)
    assert "\n" not in str(caught.value)
    assert versions.complete_versions(bucket, "digits") == []
    faults.answers = []
    assert house.upload(bucket)["kept"] > 0
    house.holds(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_only_missing_parts_are_sent_again(house: House, faults: Faults, bucket: str, tmp_path: Path) -> None:
    faults.only = b"partNumber=2"
    faults.answers = [answer("403", "ExpiredToken")] * 100
    with pytest.raises(UserError, match=r"the credentials have expired \(ExpiredToken\): renew them"):
        house.upload(bucket)
    assert versions.complete_versions(bucket, "digits") == []
    faults.answers, faults.lines = [], []
    assert house.upload(bucket)["version"] == 1
    again = [line for line in faults.lines if b"PUT" in line and b"partNumber=1&" in line]
    assert len(again) < 3  # three shards have a first part
    house.holds(bucket, tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_parts_that_nobody_takes_up_are_removed(house: House, faults: Faults, moto: str, bucket: str) -> None:
    client = servers.bucket_client(moto)
    key = f"{bucket.removeprefix('s3://bucket/')}/digits/v1/shards/train-0.tar"
    noted = {"hash": house.manifest.shards[0].hash}
    for _ in range(2):
        client.create_multipart_upload(Bucket="bucket", Key=key, Metadata=noted)  # type: ignore[attr-defined]
    house.upload(bucket)
    left = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])  # type: ignore[attr-defined]
    assert [upload for upload in left if upload["Key"] == key] == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (("403", "AccessDenied"), r"is forbidden \(AccessDenied\): look at the credentials"),
        (("403", "InvalidAccessKeyId"), r"is forbidden \(InvalidAccessKeyId\)"),
        (("400", "ExpiredToken"), r"the credentials have expired \(ExpiredToken\)"),
        (("404", "NoSuchBucket"), r"there is no bucket bucket: make it first"),
        (("400", "BadDigest"), r"400 BadDigest, 9 tries in a row"),
        (("507", "InsufficientCapacity"), r"507 InsufficientCapacity, 9 tries in a row"),
    ],
)
def test_where_it_must_give_up_it_says_so(
    house: House, faults: Faults, bucket: str, fault: tuple[str, str], line: str
) -> None:
    faults.only, faults.answers = b"PUT", [answer(*fault)] * 100
    with pytest.raises(UserError, match=line) as caught:
        house.upload(bucket)
    assert "\n" not in str(caught.value)
    assert servers.SECRET not in str(caught.value)
    assert versions.complete_versions(bucket, "digits") == []


@pytest.mark.usefixtures("quick")
def test_a_full_bucket(
    house: House, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "bucket").mkdir()
    with servers.rclone(small_disk) as endpoint:
        servers.credentials(monkeypatch, endpoint)
        with pytest.raises(UserError, match=r"^datastore\.url=s3://bucket/x: .*ask again") as caught:
            house.upload("s3://bucket/x")
        assert "\n" not in str(caught.value)
        assert versions.complete_versions("s3://bucket/x", "digits") == []
        subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
        for _ in range(4):
            # Parts that this server could not write are lost for ever: a try finds that out and drops them.
            with contextlib.suppress(UserError):
                house.upload("s3://bucket/x")
        assert versions.complete_versions("s3://bucket/x", "digits") == [1]
        house.holds("s3://bucket/x", tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_a_full_host(
    house: House, host: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSYNC_RSH", host)
    url = f"there:{small_disk}"
    with pytest.raises(UserError, match="No space left"):
        house.upload(url)
    assert versions.complete_versions(url, "digits") == []
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    assert house.upload(url)["version"] == 1
    house.holds(url, tmp_path / "here")


def test_a_connection_that_breaks_goes_on(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if AWAY < 5:
        request.getfixturevalue("quick")
    (tmp_path / "sshd").mkdir()
    size = house.manifest.bytes
    with Relay().running() as relay, servers.sshd(tmp_path / "sshd", relay) as shell:
        monkeypatch.setenv("RSYNC_RSH", shell)
        relay.cuts, relay.pause = [size // 3, size * 2 // 3], AWAY / 5
        assert house.upload(f"there:{tmp_path}/stores")["version"] == 1
        assert not relay.cuts
        assert relay.up < 1.5 * size  # what had arrived was not sent again
        house.holds(f"there:{tmp_path}/stores", tmp_path / "here")
        house.fill("2nd")
        relay.cuts, relay.pause = [relay.up + size // 2], AWAY * 100
        with pytest.raises(UserError, match=r"tries in a row; what is there stays: ask again") as caught:
            house.upload(f"there:{tmp_path}/stores")
        assert "\n" not in str(caught.value)
        relay.back()
        assert versions.complete_versions(f"there:{tmp_path}/stores", "digits") == [1]
        assert house.upload(f"there:{tmp_path}/stores")["version"] == 2
        house.holds(f"there:{tmp_path}/stores", tmp_path / "here")


@pytest.mark.usefixtures("quick")
def test_a_file_that_changes_while_it_is_read(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "MEMORY", s3_upload.PART)  # no reading far ahead
    archive = house.dataset / house.manifest.shards[0].path
    monkeypatch.setattr(os, "link", refuse)
    place = versions.open_backend(url)
    real = type(place).send

    def send(self: object, pieces: object, path: str, known: object, tell: object) -> object:
        def told(done: int, note: str) -> None:
            if done > 2_000_000:
                os.utime(archive)

        return real(self, pieces, path, known, told)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(place), "send", send)
        with pytest.raises(UserError, match=r"train-0\.tar is not what \+stage=process saw \(written to"):
            house.upload(url)
    assert versions.complete_versions(url, "digits") == []
    assert house.upload(url)["version"] == 1
    assert house.verb(url, "verify", "digits") == 0


def refuse(source: object, destination: object) -> None:
    raise OSError(18, "Invalid cross-device link")
