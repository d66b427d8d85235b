"""Sessions on this machine through the command line: submit, connect, pause, resume, and refusals."""

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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from command_line import Cli, eventually
from remote_workspace import Workspace
from servers import credentials, rclone, sshd

import hpc_imagenet
from hpc_imagenet.cluster import gpus
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Progress, Run, RunStore
from hpc_imagenet.stages import session_stage
from hpc_imagenet.stages.work import session

SESSION = ("+stage=session", "dataset=digits", "cluster=local", "session.name=ana")


def browser_url(output: str) -> str:
    found = re.search(r"^  browser +(\S+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def http_status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def closed(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urllib.parse.urlsplit(url).port)) == errno.ECONNREFUSED


def api(url: str, path: str = "/api/contents") -> str:
    base, _, query = url.partition("/lab?")
    return f"{base}{path}?{query}"


@pytest.fixture
def bucket(cli: Cli) -> Iterator[str]:
    """A datastore.url in a bucket that the submitted jobs can access as well."""
    (cli.cwd / "bucket").mkdir()
    with rclone(cli.cwd) as endpoint, pytest.MonkeyPatch.context() as patch:
        credentials(patch, endpoint)
        cli.env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        yield "datastore.url=s3://bucket/stores"


@pytest.mark.slow
def test_session_is_connected_paused_and_resumed_with_other_settings(cli: Cli, bucket: str) -> None:
    for words in (["+stage=download"], ["+stage=process"], ["+stage=upload"], ["+stage=upload", bucket]):
        cli(*words, "dataset=digits", "cluster=foreground")
    output = cli.process(*SESSION, "session.datastore=digits", "wait=true").stdout
    url = browser_url(output)

    def session_row() -> dict[str, Any]:
        (row,) = [row for row in cli.jobs() if row["stage"] == "session"]
        return row

    row = session_row()
    run, folder = row["run"], Path(row["dir"])
    assert row["state"] == "running"
    assert url.startswith("http://127.0.0.1:")
    assert http_status(url) == http_status(api(url)) == 200
    assert http_status(api(url)[:-1]) == http_status(api(url).partition("?")[0]) == 403

    token = (folder / "token").read_text()
    assert token in url
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    written = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    written = [path for path in written if path.suffix != ".tmp"]  # temporary files
    assert [path for path in written if token.encode() in path.read_bytes()] == [folder / "token"]
    for words in (["jobs"], ["jobs", "--json"], ["logs", run]):
        assert token not in cli(*words).stdout
    assert (
        token not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    )

    names = {entry["name"] for entry in json.load(urllib.request.urlopen(api(url)))["content"]}
    assert {"prototype.ipynb", "datastore"} <= names
    assert (folder / "notebooks/datastore").resolve() == cli.workspace / "datastores/digits/v1"
    (folder / "notebooks/mine.txt").write_text("kept")
    (folder / "notebooks/prototype.ipynb").write_text("{}")

    # Jobs submitted from a session do not wait for its end.
    cli("+stage=download", "dataset=digits", "dataset.name=more", "cluster=local", "wait=true")
    assert cli.states()[4:] == ["running", "finished"]

    with mock.patch.dict(os.environ, cli.env, clear=True):
        # The minutes left may change between the two calls.
        eventually(lambda: hpc_imagenet.command("connect", "ana") == cli("connect", "ana").stdout)
        assert hpc_imagenet.submit(" ".join([*SESSION, "wait=true"]))[0].id == run  # returns while it runs

    assert "already running" in cli(*SESSION).stdout
    assert "is already running without session.time=30: pause" in cli.refused(*SESSION, "session.time=30")
    assert "pause it first" in cli.refused("resume", run, "session.time=30")
    assert cli("pause", "ana").stdout.startswith("paused")
    row = session_row()
    assert (row["state"], row["reason"]) == ("cancelled", "paused: resume restarts it")
    eventually(lambda: closed(url))
    assert "has ended" in cli("connect", run, code=2).stderr

    changes = ("session.time=5", bucket, f"cluster.scratch={cli.cwd}/scratch")
    done = cli.process("resume", run, *changes, "wait=true")
    output = done.stdout
    assert re.search(r"fetching digits@v1 to this node, \d+%", done.stderr)
    fetched = (folder / "notebooks/datastore").resolve()
    assert fetched.is_relative_to(cli.cwd / "scratch")
    assert DatasetReader(fetched).manifest.images == 1797
    assert not [path for path in fetched.rglob("*") if path.is_file() and path.stat().st_mode & 0o222]
    eventually(lambda: "warning" in cli("connect", run).stdout)
    assert re.search(r"this session ends in [1-5] minutes?, at ", cli("connect", run).stdout)
    eventually(lambda: bool(re.match(r"ends soon: 0:0[0-4] h left", session_row()["progress"]["note"])))
    assert (folder / "notebooks/mine.txt").read_text() == "kept"
    assert (folder / "notebooks/prototype.ipynb").read_text() == "{}"
    assert browser_url(output) != url
    assert http_status(browser_url(output)) == 200
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    assert frozen["session"]["time"] == 5
    assert frozen["datastore"]["version"] == 1
    assert session_row()["attempt"] == 2
    cli("cancel", run)

    cli("datastores", "delete", "digits@v1", "--yes", bucket)
    cli("retry", run)
    eventually(lambda: session_row()["state"] == "failed", 60)
    assert re.match(r"\S+ cannot use datastore digits: no datastore digits in s3://", session_row()["reason"])
    assert not (folder / "notebooks/datastore").is_symlink()


@pytest.mark.slow
def test_datastore_on_an_ssh_host_is_fetched_to_the_node(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(cli.cwd) as shell:
        monkeypatch.setenv("RSYNC_RSH", shell)
        cli.env["RSYNC_RSH"] = shell
        url = f"datastore.url=there:{cli.cwd}/stores"
        for words in (["+stage=download"], ["+stage=process"], ["+stage=upload", url]):
            cli(*words, "dataset=digits", "cluster=foreground")
        error = cli.refused(*SESSION, "session.datastore=digits", url)
        assert (
            f"is stored at there:{cli.cwd}/stores, where files cannot be linked: set cluster.scratch=FOLDER"
            in error
        )
        words = [*SESSION, "session.datastore=digits", url, f"cluster.scratch={cli.cwd}/scratch"]
        (config,) = compose([*words, f"workspace={cli.workspace}"])
        link = cli.cwd / "datastore"
        variables = session._link_datastore(config, link, Progress(Run(cli.cwd)))
    assert variables == {
        "HPC_IMAGENET_DATASTORE": str(link),
        "HPC_IMAGENET_DATASTORE_URL": f"there:{cli.cwd}/stores",
    }
    assert link.resolve().is_relative_to(cli.cwd / "scratch")
    assert DatasetReader(link).manifest.images == 1797


@pytest.mark.slow
def test_copies_on_the_node_are_of_one_backend_each_and_are_fetched_again_after_a_delete(
    remote_workspace: Workspace, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials(monkeypatch, moto)
    link, urls = tmp_path / "datastore", [f"s3://bucket/{tmp_path.name}/{name}" for name in ("one", "two")]
    contents = []
    for url in urls:
        assert remote_workspace.upload(url)["datastore"] == "digits@v1"
        contents.append(remote_workspace.manifest.content)
        remote_workspace.replace_dataset("2nd")

    def linked(url: str) -> Path:
        words = (f"datastore.url={url}", "session.datastore=digits", f"cluster.scratch={tmp_path}/scratch")
        (config,) = compose([*SESSION, *words, f"workspace={tmp_path}"])
        session._link_datastore(config, link, Progress(Run(tmp_path)))
        return link.resolve()

    folders = [linked(url) for url in urls]
    assert [DatasetReader(folder).manifest.content for folder in folders] == contents
    assert [linked(url) for url in urls] == folders
    assert remote_workspace.command(str(folders[0].parents[1]), "delete", "digits@v1", "--yes") == 0
    (folders[0] / "shards").mkdir()  # the delete has not ended
    with pytest.raises(UserError, match=f"{folders[0]} is being deleted"):
        linked(urls[0])
    (folders[0] / "shards").rmdir()
    assert linked(urls[0]) == folders[0]
    assert remote_workspace.command(str(folders[0].parents[1]), "verify", "digits@v1") == 0


@pytest.mark.slow
@pytest.mark.parametrize("create", [Path.touch, Path.mkdir])
def test_user_file_named_datastore_is_kept(cli: Cli, tmp_path: Path, create: Callable[[Path], None]) -> None:
    create(tmp_path / "datastore")
    for words in ((), ("session.datastore=digits",)):
        (config,) = compose([*SESSION, *words, f"workspace={cli.workspace}"])
        with (
            pytest.raises(UserError, match="was not created by this session: rename it")
            if words
            else contextlib.nullcontext()
        ):
            assert session._link_datastore(config, tmp_path / "datastore", Progress(Run(tmp_path))) == {}
        assert (tmp_path / "datastore").exists()


@pytest.mark.slow
def test_too_few_gpus_are_reported_in_one_line(cli: Cli) -> None:
    cli(*SESSION, "session.gpus=64")
    cli.until("failed")
    assert re.fullmatch(r"session\.gpus=64, but \S+ has \d+ available: .*", cli.jobs()[0]["reason"])


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0", 1), ("-1", 0), ("", 0)])
def test_gpus_are_counted_with_and_without_the_variable_of_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    for number in range(2):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(gpus, "available_gpus", partial(gpus.available_gpus, tmp_path))
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    session._check_gpus(count)
    with pytest.raises(UserError, match=rf"session.gpus={count + 1}, but \S+ has {count} available"):
        session._check_gpus(count + 1)


@pytest.mark.slow
def test_invalid_session_settings_are_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, message in (
        ("session.datastore=nothing", "no datastore nothing"),
        ("session.time=0", "session.time=0 is too small"),
        ("session.idle_minutes=0", "session.idle_minutes=0"),
        ("session.listen=everywhere", "session.listen=everywhere is unknown"),
        ("session.port=80", "session.port=80 is not between 1024 and 65535"),
        ("session.name=a/b", "session.name=a/b is not a folder name"),
    ):
        assert message in cli.refused(*SESSION[:3], setting)
    monkeypatch.setattr(session_stage, "find_spec", lambda name: None)
    assert "pip install -c constraints.txt -e '.[session]'" in cli.refused(*SESSION)


def test_session_commands_refuse_other_runs(cli: Cli) -> None:
    info = {"stage": "download", "label": "download-digits"}
    RunStore(cli.workspace).create("c0ffee00-download-digits", {}, info)
    for command in ("connect", "pause", "resume"):
        assert "is not a session" in cli.refused(command, "download-digits")


@pytest.mark.slow
def test_session_signature_depends_only_on_its_name(cli: Cli) -> None:
    def planned_run(*words: str) -> str:
        output = cli(*with_defaults(SESSION, words), "dry_run=true").stdout
        return output.split("\n\n")[1].split()[0]

    assert planned_run() == planned_run("session.time=10", "session.gpus=2", "seed=3", "model=vgg11")
    assert planned_run() != planned_run("session.name=bob")
    assert planned_run().endswith("-session-ana")


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ((), ""),
        (("session.gpus=null", "session.time=240"), ""),
        (("session.datastore=digits", "session.gpus=1"), ""),
        (("session.datastore=birds", "session.gpus=4"), "session.datastore=birds session.gpus=4"),
        (("session.idle_minutes=null",), "session.idle_minutes=null"),
        (("session.datastore=digits", "datastore.url=s3://b/x"), "datastore.url=s3://b/x"),
        (("session.datastore=digits", "datastore.url=${workspace}/link"), ""),
    ],
)
@pytest.mark.slow
def test_another_session_than_the_running_one_is_refused(
    cli: Cli, words: tuple[str, ...], other: str
) -> None:
    workspace = f"workspace={cli.workspace}"
    begun = ("session.datastore=digits", "session.gpus=1", "session.time=30")
    (running,) = compose([*SESSION, *begun, workspace])
    run = RunStore(cli.workspace).create("c0ffee00-session-ana", asdict(running), {"stage": "session"})
    (cli.workspace / "link").symlink_to(cli.workspace / "datastores")
    (config,) = compose([*SESSION, *words, workspace])
    error = f"c0ffee00-session-ana is already running without {other}: pause it first"
    with pytest.raises(UserError, match=re.escape(error)) if other else contextlib.nullcontext():
        session_stage.SESSION.check_active(config, run)


SHARED = "30 29 254:0 / / rw - ext4 /dev/vda rw\n31 30 254:0 /tmp /tmp rw - ext4 /dev/vda rw\n"
OWN = "32 31 254:0 /scratch/jobs/n4/1234/.1234 /tmp rw,relatime - ext4 /dev/vda rw\n"


@pytest.mark.parametrize(
    ("mounts", "job", "private"), [(SHARED, "1234", False), (SHARED + OWN, "1234", True), (OWN, "123", False)]
)
def test_private_tmp_of_a_job_is_detected(tmp_path: Path, mounts: str, job: str, private: bool) -> None:
    """The mounts are those of job_container/tmpfs in Slurm 22.05."""
    (tmp_path / "mountinfo").write_text(mounts)
    assert session.has_private_tmp(job, mounts=tmp_path / "mountinfo") is private
