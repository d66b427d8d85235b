"""The lines that connect prints, depending on where a session runs and listens."""

from __future__ import annotations

import getpass
import os
import pwd
import socket
import time
from pathlib import Path

import pytest
import yaml

from hpc_imagenet.cli.connect import access_instructions, wait_until_running
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.session.connection import ConnectionInfo, new_token, read_token

ME = getpass.getuser()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    cluster = {"executor": "slurm", "login": "there"}
    settings = {"time": 60, "gpus": None}
    config = {"cluster": cluster, "session": settings, "stage": {"name": "session"}}
    run = RunStore(tmp_path).create("c0ffee00-session-ana", config, {"stage": "session"})
    new_token(run.folder)
    return run


def attempt(run: Run, executor: str, **details: str) -> Attempt:
    created = run.new_attempt()
    created.submit(executor, **details)
    return created


def connection_info(way: str, left: float = 3600, host: str = "n1", **more: str) -> ConnectionInfo:
    """Connection details of a session that ends in `left` seconds."""
    socket_path = "/tmp/s/jupyter" if way == "socket" else None
    fingerprint = "0A:1B" if way == "address" else None
    return ConnectionInfo(
        host, way, 12345, socket_path, fingerprint, "/w/notebooks", time.time() + left, None, 0, **more
    )


def test_connect_waits_for_a_session_that_is_being_submitted(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(run.folder, (1, 1)))  # as if created long ago
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
def test_tunnel_to_a_node_goes_through_the_login_node(run: Run, way: str, tunnel: str) -> None:
    lines = access_instructions(run, attempt(run, "slurm", job_id="77_1"), connection_info(way, job="79"))
    assert lines["tunnel"] == tunnel
    assert lines["shell"] == "srun --overlap --jobid 79 --pty bash"  # srun does not accept 77_1
    scheme = "https://localhost" if way == "address" else "http://127.0.0.1"
    assert lines["browser"] == f"{scheme}:12345/lab?token={read_token(run.folder)}"
    assert ("certificate" in lines) == (way == "address")
    assert ("~/.ssh/config" in lines) == (way != "address")


def test_tunnel_goes_through_the_host_as_the_laptop_names_it(run: Run) -> None:
    config = run.frozen()
    config["cluster"]["host"] = "me@login.centre.org"
    run = RunStore(run.folder.parents[1]).create(run.id, config, run.info)
    lines = access_instructions(run, attempt(run, "slurm", job_id="77"), connection_info("socket"))
    assert lines["tunnel"] == f"ssh -N -L 12345:/tmp/s/jupyter -J me@login.centre.org {ME}@n1"


def test_tunnel_to_this_machine_only_for_a_socket_or_over_ssh(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = socket.gethostname()
    local = attempt(run, "local", host=name)
    assert set(access_instructions(run, local, connection_info("loopback", host=name))) == {
        "browser",
        "VSCode",
    }
    lines = access_instructions(run, local, connection_info("socket", host=name))
    assert lines["tunnel"] == f"ssh -N -L 12345:/tmp/s/jupyter {ME}@there"
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    lines = access_instructions(run, local, connection_info("loopback", host=name))
    assert lines["tunnel"] == f"ssh -N -L 12345:127.0.0.1:12345 {ME}@there"


@pytest.mark.parametrize("login", [None, "there"])
def test_another_workstation_needs_a_tunnel(run: Run, login: str | None) -> None:
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["cluster"]["login"] = login
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = access_instructions(run, attempt(run, "local", host="n1"), connection_info("loopback"))
    jump = f"-J {ME}@there " if login else ""
    assert lines["tunnel"] == f"ssh -N -L 12345:127.0.0.1:12345 {jump}{ME}@n1"
    assert lines["VSCode"] == "code --remote ssh-remote+n1 /w/notebooks"
    assert ("~/.ssh/config" in lines) == bool(login)
    assert "shell" not in lines


def test_connect_warns_of_the_end(run: Run) -> None:
    local = attempt(run, "local", host=socket.gethostname())
    lines = access_instructions(run, local, connection_info("loopback", left=475))
    assert lines["warning"].startswith("this session ends in 8 minutes, at ")
    assert access_instructions(run, local, connection_info("loopback", left=5))["warning"].startswith(
        "this session ends in 1 minute, at "
    )


def test_token_of_a_user_without_a_name_is_refused_with_the_number(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    def deny(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(UserError, match=rf"token belongs to uid {os.geteuid()}, and so does the session"):
        read_token(run.folder)
