"""A session through the door, on this machine: asked for, reached, paused, resumed; and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from door import Door, eventually
from servers import credentials, rclone, sshd

import hpc_imagenet
from hpc_imagenet.config.compose import compose
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import validate
from hpc_imagenet.runs.store import Progress, Run, RunStore
from hpc_imagenet.stages import session

ASK = ("+stage=session", "dataset=digits", "cluster=local", "session.name=ana")


def browser(told: str) -> str:
    found = re.search(r"^  browser +(\S+)$", told, re.MULTILINE)
    assert found, told
    return found[1]


def opens(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def closed(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urllib.parse.urlsplit(url).port)) == errno.ECONNREFUSED


def api(url: str, path: str = "/api/contents") -> str:
    base, _, query = url.partition("/lab?")
    return f"{base}{path}?{query}"


@pytest.fixture
def bucket(door: Door) -> Iterator[str]:
    """A bucket that the jobs of the door know, too."""
    (door.cwd / "bucket").mkdir()
    with rclone(door.cwd) as endpoint, pytest.MonkeyPatch.context() as patch:
        credentials(patch, endpoint)
        door.env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        yield "datastore.url=s3://bucket/stores"


@pytest.mark.slow
def test_a_session_is_reached_paused_and_resumed_with_other_settings(door: Door, bucket: str) -> None:
    for words in (["+stage=download"], ["+stage=process"], ["+stage=upload"], ["+stage=upload", bucket]):
        door(*words, "dataset=digits", "cluster=foreground")
    told = door.process(*ASK, "session.datastore=digits", "wait=true").stdout
    url = browser(told)

    def now() -> dict[str, Any]:
        (row,) = [row for row in door.jobs() if row["stage"] == "session"]
        return row

    row = now()
    run, folder = row["run"], Path(row["dir"])
    assert row["state"] == "running"
    assert url.startswith("http://127.0.0.1:")
    assert opens(url) == opens(api(url)) == 200
    assert opens(api(url)[:-1]) == opens(api(url).partition("?")[0]) == 403

    token = (folder / "token").read_text()
    assert token in url
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    written = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    written = [path for path in written if path.suffix != ".tmp"]  # which come and go
    assert [path for path in written if token.encode() in path.read_bytes()] == [folder / "token"]
    for words in (["jobs"], ["jobs", "--json"], ["logs", run]):
        assert token not in door(*words).stdout
    assert (
        token not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    )

    names = {entry["name"] for entry in json.load(urllib.request.urlopen(api(url)))["content"]}
    assert {"prototype.ipynb", "datastore"} <= names
    assert (folder / "notebooks/datastore").resolve() == door.workspace / "datastores/digits/v1"
    (folder / "notebooks/mine.txt").write_text("kept")
    (folder / "notebooks/prototype.ipynb").write_text("{}")

    # What is sent from a session need not wait for its end.
    door("+stage=download", "dataset=digits", "dataset.name=more", "cluster=local", "wait=true")
    assert door.states()[4:] == ["running", "finished"]

    with mock.patch.dict(os.environ, door.env, clear=True):
        # The minutes that are left may go by between the two.
        eventually(lambda: hpc_imagenet.command("connect", "ana") == door("connect", "ana").stdout)
        assert hpc_imagenet.submit(" ".join([*ASK, "wait=true"]))[0].id == run  # it waits for no end

    assert "already running" in door(*ASK).stdout
    assert "pause it first" in door.refused("resume", run, "session.time=30")
    assert door("pause", "ana").stdout.startswith("paused")
    row = now()
    assert (row["state"], row["reason"]) == ("cancelled", "paused: resume goes on")
    eventually(lambda: closed(url))
    assert "has ended" in door("connect", run, code=2).stderr

    far = ("session.time=5", bucket, f"cluster.scratch={door.cwd}/scratch")
    done = door.process("resume", run, *far, "wait=true")
    told = done.stdout
    assert re.search(r"bringing digits@v1 to this node, \d+%", done.stderr)
    brought = (folder / "notebooks/datastore").resolve()
    assert brought.is_relative_to(door.cwd / "scratch")
    assert DatasetReader(brought).manifest.images == 1797
    assert not [path for path in brought.rglob("*") if path.is_file() and path.stat().st_mode & 0o222]
    eventually(lambda: "mind" in door("connect", run).stdout)
    assert re.search(r"this session ends in [1-5] minutes?, at ", door("connect", run).stdout)
    eventually(lambda: bool(re.match(r"ends soon: 0:0[0-4] h left", now()["progress"]["note"])))
    assert (folder / "notebooks/mine.txt").read_text() == "kept"
    assert (folder / "notebooks/prototype.ipynb").read_text() == "{}"
    assert browser(told) != url
    assert opens(browser(told)) == 200
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    assert frozen["session"]["time"] == 5
    assert frozen["datastore"]["version"] == 1
    assert now()["attempt"] == 2
    door("cancel", run)

    door("datastores", "delete", "digits@v1", "--yes", bucket)
    door("retry", run)
    eventually(lambda: now()["state"] == "failed", 60)
    assert re.match(r"\S+ has no datastore digits: no datastore digits in s3://", now()["reason"])
    assert not (folder / "notebooks/datastore").is_symlink()


@pytest.mark.slow
def test_a_datastore_behind_ssh_is_brought_to_the_node(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(door.cwd) as shell:
        monkeypatch.setenv("RSYNC_RSH", shell)
        door.env["RSYNC_RSH"] = shell
        url = f"datastore.url=there:{door.cwd}/stores"
        for words in (["+stage=download"], ["+stage=process"], ["+stage=upload", url]):
            door(*words, "dataset=digits", "cluster=foreground")
        told = door.refused(*ASK, "session.datastore=digits", url)
        assert (
            f"lies at there:{door.cwd}/stores, where no files can be linked: cluster.scratch=FOLDER" in told
        )
        words = [*ASK, "session.datastore=digits", url, f"cluster.scratch={door.cwd}/scratch"]
        (config,) = compose([*words, f"workspace={door.workspace}"])
        link = door.cwd / "datastore"
        variables = session._datastore(config, link, Progress(Run(door.cwd)))
    assert variables == {
        "HPC_IMAGENET_DATASTORE": str(link),
        "HPC_IMAGENET_DATASTORE_URL": f"there:{door.cwd}/stores",
    }
    assert link.resolve().is_relative_to(door.cwd / "scratch")
    assert DatasetReader(link).manifest.images == 1797


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_somebody_else_called_datastore_is_left_alone(
    door: Door, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "datastore")
    for words in ((), ("session.datastore=digits",)):
        (config,) = compose([*ASK, *words, f"workspace={door.workspace}"])
        with pytest.raises(UserError, match="give it another name") if words else contextlib.nullcontext():
            assert session._datastore(config, tmp_path / "datastore", Progress(Run(tmp_path))) == {}
        assert (tmp_path / "datastore").exists()


@pytest.mark.slow
def test_gpus_that_this_machine_lacks_are_one_line(door: Door) -> None:
    door(*ASK, "session.gpus=64")
    door.until("failed")
    assert re.fullmatch(r"session\.gpus=64, but \S+ gives \d+", door.jobs()[0]["reason"])


def test_a_session_that_could_not_work_is_refused(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, told in (
        ("session.datastore=nothing", "no datastore nothing"),
        ("session.time=0", "session.time=0 is too small"),
        ("session.idle_minutes=0", "session.idle_minutes=0"),
        ("session.listen=everywhere", "session.listen=everywhere is unknown"),
        ("session.port=80", "session.port=80 is not between 1024 and 65535"),
        ("session.name=a/b", "session.name=a/b names a folder"),
    ):
        assert told in door.refused(*ASK[:3], setting)
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    assert "pip install -c constraints.txt -e '.[session]'" in door.refused(*ASK)


def test_verbs_of_sessions_leave_other_runs_alone(door: Door) -> None:
    about = {"stage": "download", "label": "download-digits"}
    RunStore(door.workspace).create("c0ffee00-download-digits", {}, about)
    for verb in ("connect", "pause", "resume"):
        assert "is no session" in door.refused(verb, "download-digits")


def test_a_session_is_its_name_in_any_size(door: Door) -> None:
    def planned(*words: str) -> str:
        told = door(*ASK, *words, "dry_run=true").stdout
        return told.split("\n\n")[1].split()[0]

    assert planned() == planned("session.time=10", "session.gpus=2", "seed=3", "model=vgg11")
    assert planned() != planned("session.name=bob")
    assert planned().endswith("-session-ana")


SHARED = "30 29 254:0 / / rw - ext4 /dev/vda rw\n31 30 254:0 /tmp /tmp rw - ext4 /dev/vda rw\n"
OWN = "32 31 254:0 /scratch/jobs/n4/1234/.1234 /tmp rw,relatime - ext4 /dev/vda rw\n"


@pytest.mark.parametrize(
    ("mounts", "job", "told"), [(SHARED, "1234", False), (SHARED + OWN, "1234", True), (OWN, "123", False)]
)
def test_a_job_with_a_tmp_of_its_own(tmp_path: Path, mounts: str, job: str, told: bool) -> None:
    """As job_container/tmpfs of Slurm 22.05 mounts it."""
    (tmp_path / "mountinfo").write_text(mounts)
    assert session.private(job, mounts=tmp_path / "mountinfo") is told
