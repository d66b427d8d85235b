"""Uploads to hosts and buckets, and the verb `datastores` on them, as they go when nothing breaks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import servers
from remote_house import House

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import ssh_backend, ssh_connection
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages import upload

pytestmark = pytest.mark.slow


@pytest.fixture
def house(remote_house: House) -> House:
    return remote_house


def test_a_version_comes_and_goes(
    house: House, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = house.upload(url)
    assert (result["datastore"], result["images"]) == ("digits@v1", 24)
    assert result["kept"] == result["reused"] == 0
    again = house.upload(url)
    assert (again["version"], again["kept"]) == (1, house.manifest.bytes)
    house.fill("2nd")
    assert house.upload(url)["datastore"] == "digits@v2"
    assert versions.complete_versions(url, "digits") == [1, 2]
    capsys.readouterr()
    assert house.verb(url) == 0
    table = capsys.readouterr().out
    assert "digits@v1  complete      24  0.01" in table
    assert "digits@v2" in table
    assert house.verb(url, "verify", "digits@v2") == 0
    assert "digits@v2 is whole: 0.019 GB read" in capsys.readouterr().out
    house.holds(url, tmp_path / "here")
    assert house.verb(url, "delete", "digits@v2", "--yes") == 0
    assert versions.complete_versions(url, "digits") == [1]
    assert house.verb(url, "prune", "--yes", "--days=0") == 0
    assert house.upload(url)["datastore"] == "digits@v3"  # a number never means two things


def test_what_is_wrong_is_found(house: House, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    house.upload(url)
    place = versions.open_backend(url)
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
    assert versions.complete_versions(url, "digits") == []
    whole = house.upload(url, parts=3)
    assert (whole["version"], whole["copied"]) == (1, 0)
    assert set(versions.open_backend(url).files("digits/v1")) == {
        "manifest.json",
        *(file.path for file in upload.placed(house.manifest).all_files()),
    }


def test_two_upload_the_same_at_once(house: House, url: str, tmp_path: Path) -> None:
    results = at_once(lambda: house.upload(url), lambda: house.upload(url))
    print(results)
    refused = [result for result in results if isinstance(result, UserError)]
    for error in refused:  # where the server replaces objects piece by piece
        assert "ask again" in str(error)
        assert "rclone" in os.environ["PYTEST_CURRENT_TEST"]
    assert len(refused) < 2
    assert house.upload(url)["version"] == 1
    house.holds(url, tmp_path / "here")


def test_two_upload_other_images_of_one_name_at_once(house: House, url: str, tmp_path: Path) -> None:
    first = house.manifest
    house.fill("other", name="other")
    results = at_once(lambda: house.upload(url), lambda: house.upload(url, dataset="other"))
    refused = [result for result in results if isinstance(result, UserError)]
    for error in refused:  # where the server cannot write an object only if there is none
        assert "ask again" in str(error)
        assert "rclone" in os.environ["PYTEST_CURRENT_TEST"]
    numbers = [house.upload(url, dataset=name)["version"] for name in ("digits", "other")]
    assert len(set(numbers)) == 2
    assert sorted(versions.complete_versions(url, "digits")) == sorted(numbers)
    assert house.verb(url, "verify", f"digits@v{numbers[0]}") == 0
    assert house.verb(url, "verify", f"digits@v{numbers[1]}") == 0
    assert first.content != house.manifest.content


def at_once(*tasks: Any) -> list[Any]:
    """Do all of them, each in a thread; return what each returns or is refused with."""
    done: list[Any] = [None] * len(tasks)

    def work(number: int) -> None:
        try:
            done[number] = tasks[number]()
        except UserError as error:
            done[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


@pytest.mark.parametrize("url", ["moto", "rclone", "folder"], indirect=True)  # ssh: the next test
def test_a_fetch_that_is_cut_off_goes_on(
    house: House, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.upload(url)
    place, here = type(versions.open_backend(url)), tmp_path / "here"
    real, fetched = place.fetch, []

    def cut(self: Any, path: str, *rest: Any) -> None:
        if len(fetched) == 2:
            raise KeyboardInterrupt
        fetched.append(path)
        real(self, path, *rest)

    monkeypatch.setattr(place, "fetch", cut)
    with pytest.raises(KeyboardInterrupt):
        house.verb(url, "fetch", "digits", str(here))
    assert versions.complete_versions(str(here), "digits") == []
    again: list[str] = []
    monkeypatch.setattr(
        place, "fetch", lambda self, path, *rest: (again.append(path), real(self, path, *rest))
    )
    house.holds(url, here)
    assert not set(again) & set(fetched)


def test_a_fetch_by_rsync_that_is_cut_off_goes_on(
    house: House, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSYNC_RSH", host)
    url, here = f"there:{tmp_path}/stores", tmp_path / "here"
    house.upload(url)
    part = here / "digits" / "v1" / ssh_backend.FETCHED
    cut, whole = (part / shard.path for shard in upload.placed(house.manifest).shards[:2])
    real, came = ssh_connection.SshConnection.rsync, []

    def run(self: ssh_connection.SshConnection, what: str, words: list[str], *tell: object) -> None:
        told = [0]
        real(self, what, words, told.append)
        came.append(max(told))
        if not again:
            raise KeyboardInterrupt

    again = False
    monkeypatch.setattr(ssh_connection.SshConnection, "rsync", run)
    with pytest.raises(KeyboardInterrupt):
        house.verb(url, "fetch", "digits", str(here))
    assert versions.complete_versions(str(here), "digits") == []
    assert came[0] >= sum(shard.bytes for shard in house.manifest.shards)
    data = cut.read_bytes()
    cut.write_bytes(b"x" + data[1 : len(data) // 2])  # cut off, and wrong at its beginning
    modified = whole.stat().st_mtime_ns
    whole.write_bytes(b"x" + whole.read_bytes()[1:])  # wrong, and rsync cannot see it
    os.utime(whole, ns=(modified, modified))
    again = True
    wrong = whole.stat().st_size
    house.holds(url, here)
    assert came[1:] == [len(data), wrong]  # the one is mended, the other fetched anew, and nothing else
    assert not part.exists()


def test_two_uploads_of_different_images_without_conditional_writes(
    house: House, rclone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later claim wins; the earlier upload sees it when it commits, and leaves nothing wrong."""
    servers.credentials(monkeypatch, rclone)
    url = f"s3://bucket/{tmp_path.name}"
    real = versions.VersionClaim.commit

    def commit(claim: versions.VersionClaim, manifest: Any) -> None:
        claim.backend.remove([f"{claim.path}/upload.json"])
        claim.backend.create(f"{claim.path}/upload.json", b'{"content": "of another"}')
        real(claim, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(versions.VersionClaim, "commit", commit)
        with pytest.raises(UserError, match="was taken away from this upload meanwhile: ask again"):
            house.upload(url)
    assert versions.complete_versions(url, "digits") == []
    assert house.upload(url)["version"] == 2


def test_a_host_that_nobody_knows(house: House, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSYNC_RSH", host)
    with pytest.raises(UserError, match=r"^datastore\.url=nobody\.invalid:/x: asking: .*resolve"):
        house.upload("nobody.invalid:/x")
