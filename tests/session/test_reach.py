"""The lines that connect prints, by where a session runs and listens."""

from __future__ import annotations

import getpass
import os
import socket
import time
from pathlib import Path

import pytest
import yaml

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Attempt, Run, RunStore
from hpc_imagenet.session import credentials
from hpc_imagenet.session.connect import access_instructions, wait_until_running
from hpc_imagenet.session.connection import ConnectionInfo

ME = getpass.getuser()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    cluster = {"executor": "slurm", "login": "there"}
    asked = {"time": 60, "gpus": None}
    config = {"cluster": cluster, "session": asked, "stage": {"name": "session"}}
    run = RunStore(tmp_path).create("c0ffee00-session-ana", config, {"stage": "session"})
    credentials.new_token(run.folder)
    return run


def attempt(run: Run, executor: str, **details: str) -> Attempt:
    made = run.new_attempt()
    made.submit(executor, **details)
    return made


def note(way: str, left: float = 3600, host: str = "n1", **more: str) -> ConnectionInfo:
    """A session's note, `left` seconds before its end."""
    where = "/tmp/s/jupyter" if way == "socket" else None
    finger = "0A:1B" if way == "address" else None
    return ConnectionInfo(
        host, way, 12345, where, finger, "/w/notebooks", time.time() + left, None, 0, **more
    )


def test_a_session_that_is_just_being_made_is_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(run.folder, (1, 1)))  # a minute, and nobody sent it
    with pytest.raises(UserError, match=r"has ended \(failed: was never submitted"):
        wait_until_running(run)
    assert capsys.readouterr().err == "queued: is being submitted\n"


@pytest.mark.parametrize(
    ("way", "tunnel"),
    [
        ("socket", f"ssh -N -L 12345:/tmp/s/jupyter -J {ME}@there {ME}@n1"),
        ("loopback", f"ssh -N -L 12345:127.0.0.1:12345 -J {ME}@there {ME}@n1"),
        ("address", f"ssh -N -L 12345:n1:12345 {ME}@there"),
    ],
)
def test_a_node_is_reached_by_way_of_the_login_node(run: Run, way: str, tunnel: str) -> None:
    told = access_instructions(run, attempt(run, "slurm", job_id="77_1"), note(way, job="79"))
    assert told["tunnel"] == tunnel
    assert told["shell"] == "srun --overlap --jobid 79 --pty bash"  # srun takes no 77_1
    scheme = "https://localhost" if way == "address" else "http://127.0.0.1"
    assert told["browser"] == f"{scheme}:12345/lab?token={credentials.token(run.folder)}"
    assert ("certificate" in told) == (way == "address")
    assert ("~/.ssh/config" in told) == (way != "address")


def test_this_machine_needs_a_tunnel_for_a_socket_and_for_who_came_by_ssh(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = socket.gethostname()
    here = attempt(run, "local", host=name)
    assert set(access_instructions(run, here, note("loopback", host=name))) == {"browser", "VSCode"}
    told = access_instructions(run, here, note("socket", host=name))
    assert told["tunnel"] == f"ssh -N -L 12345:/tmp/s/jupyter {ME}@there"
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    told = access_instructions(run, here, note("loopback", host=name))
    assert told["tunnel"] == f"ssh -N -L 12345:127.0.0.1:12345 {ME}@there"


@pytest.mark.parametrize("login", [None, "there"])
def test_another_workstation_needs_a_tunnel(run: Run, login: str | None) -> None:
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["cluster"]["login"] = login
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    told = access_instructions(run, attempt(run, "local", host="n1"), note("loopback"))
    jump = f"-J {ME}@there " if login else ""
    assert told["tunnel"] == f"ssh -N -L 12345:127.0.0.1:12345 {jump}{ME}@n1"
    assert told["VSCode"] == "code --remote ssh-remote+n1 /w/notebooks"
    assert ("~/.ssh/config" in told) == bool(login)
    assert "shell" not in told


def test_an_end_that_is_near_is_told(run: Run) -> None:
    here = attempt(run, "local", host=socket.gethostname())
    near = access_instructions(run, here, note("loopback", left=475))
    assert near["mind"].startswith("this session ends in 8 minutes, at ")
    assert access_instructions(run, here, note("loopback", left=5))["mind"].startswith(
        "this session ends in 1 minute, at "
    )
