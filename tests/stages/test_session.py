"""A session through the door, on this machine: asked for, reached, paused, resumed; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from door import Door, eventually

from hpc_imagenet import check

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


def api(url: str, path: str = "/api/contents") -> str:
    base, _, query = url.partition("/lab?")
    return f"{base}{path}?{query}"


@pytest.mark.slow
def test_a_session_is_reached_paused_and_resumed_in_another_size(door: Door) -> None:
    for stage in ("download", "process", "upload"):
        door(f"+stage={stage}", "dataset=digits", "cluster=here")
    told = door.process(*ASK, "session.datastore=digits", "wait=true").stdout
    url = browser(told)
    (row,) = [row for row in door.jobs() if row["stage"] == "session"]
    run, folder = row["run"], Path(row["dir"])
    assert row["state"] == "running"
    assert url.startswith("http://127.0.0.1:")
    assert opens(url) == opens(api(url)) == 200
    assert opens(api(url)[:-1]) == opens(api(url).partition("?")[0]) == 403

    token = (folder / "token").read_text()
    assert token in url
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    written = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
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

    assert "under way already" in door(*ASK).stdout
    assert "pause it first" in door.refused("resume", run, "session.time=30")
    assert door("pause", "session-ana").stdout.startswith("paused")
    row = door.jobs()[-1]
    assert (row["state"], row["reason"]) == ("cancelled", "paused: resume goes on")
    eventually(lambda: not [p for p in door.processes() if "jupyter_server" in p.cmdline()])
    assert "has ended" in door("connect", run, code=2).stderr

    told = door.process("resume", run, "session.time=30", "wait=true").stdout
    assert (folder / "notebooks/mine.txt").read_text() == "kept"
    assert (folder / "notebooks/prototype.ipynb").read_text() == "{}"
    assert browser(told) != url
    assert opens(browser(told)) == 200
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    assert frozen["session"]["time"] == 30
    assert frozen["datastore"]["version"] == 1
    assert door.jobs()[-1]["attempt"] == 2
    door("cancel", run)

    shutil.move(door.workspace / "datastores", door.workspace / "elsewhere")
    door("retry", run)
    door.until("finished", "finished", "finished", "failed")
    assert re.match(r"\S+ has no datastore digits: no datastore digits in ", door.jobs()[-1]["reason"])
    assert not (folder / "notebooks/datastore").is_symlink()


@pytest.mark.slow
def test_jobs_that_are_sent_from_a_session_need_not_wait_for_its_end(door: Door) -> None:
    door.process(*ASK, "wait=true")
    door("+stage=download", "dataset=digits", "cluster=local", "wait=true")
    assert door.states() == ["running", "finished"]
    door("cancel", "session-ana")


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
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    assert "pip install 'hpc-imagenet[session]'" in door.refused(*ASK)


def test_verbs_of_sessions_leave_other_runs_alone(door: Door) -> None:
    door("+stage=download", "dataset=digits", "cluster=here")
    for verb in ("connect", "pause", "resume"):
        assert "is no session" in door.refused(verb, "download-digits")


def test_a_session_is_its_name_in_any_size(door: Door) -> None:
    def planned(*words: str) -> str:
        told = door(*ASK, *words, "dry_run=true").stdout
        return told.split("\n\n")[1].split()[0]

    assert planned() == planned("session.time=10", "session.gpus=2", "seed=3", "model=vgg11")
    assert planned() != planned("session.name=bob")
    assert planned().endswith("-session-ana")
