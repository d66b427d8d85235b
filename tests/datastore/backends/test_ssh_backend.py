"""SshBackend and SshConnection with a program in place of ssh, which runs commands on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_imagenet.datastore.backends.ssh_backend import FETCHED, SshBackend
from hpc_imagenet.datastore.backends.ssh_connection import SshConnection
from hpc_imagenet.datastore.backends.storage_backend import ProgressCounter
from hpc_imagenet.datastore.file_hash import NEW_HASH
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError


@pytest.fixture
def programs(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for programs, with `ssh` for this user, and `ssh-other` for another one if this is root."""
    for name, user in (("ssh", ""), ("ssh-other", "setpriv --reuid=65534 --regid=65534 --clear-groups ")):
        write_program(
            public_path / name, f'shift; set -o pipefail; {user}sh -c "$*" | cat'
        )  # ssh has no terminal
    monkeypatch.setenv("RSYNC_RSH", str(public_path / "ssh"))
    monkeypatch.setenv("PATH", f"{public_path}:{os.environ['PATH']}")
    return public_path


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_files_are_listed_while_other_uploads_rename_theirs(programs: Path) -> None:
    folder, stop = programs / "stores/a/v1", threading.Event()
    folder.mkdir(parents=True)
    files = [folder / str(number) for number in range(300)]
    for file in files:
        file.touch()

    def rename() -> None:
        while not stop.is_set():
            for file in files:
                file.rename(f"{file}.tmp").rename(file)

    thread, backend = threading.Thread(target=rename), SshBackend(f"there:{programs}/stores")
    thread.start()
    try:
        for _ in range(10):
            assert backend.files("a/v1")
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_what_another_user_may_not_read_is_left_out(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, mode in (("a/v1", 0o755), ("a/v2", 0o700), ("a/v3", 0o755), ("theirs/v1", 0o755)):
        (programs / "stores" / path).mkdir(parents=True)
        (programs / "stores" / path / "manifest.json").write_text("{}")
        (programs / "stores" / path).chmod(mode)
    (programs / "stores/a/v3/manifest.json").chmod(0o600)
    (programs / "stores/theirs").chmod(0o700)
    monkeypatch.setenv("RSYNC_RSH", str(programs / "ssh-other"))
    backend = SshBackend(f"there:{programs}/stores")
    assert backend.versions() == backend.versions("a") == ["a/v1", "a/v2", "a/v3"]
    manifests = [f"{path}/manifest.json" for path in backend.versions()]
    assert backend.read(manifests) == {"a/v1/manifest.json": b"{}"}


def test_an_interrupted_fetch_does_not_hash_all_that_has_arrived(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SshConnection, "rsync", interrupt)
    file = File("0.tar", 1 << 28, f"{NEW_HASH}0")
    (tmp_path / FETCHED).mkdir()
    with (tmp_path / FETCHED / file.path).open("wb") as arrived:
        arrived.truncate(file.bytes)
    hashed = [0]
    counter = ProgressCounter(lambda done, step: hashed.append(done))
    with pytest.raises(KeyboardInterrupt):
        SshBackend("there:/stores").fetch_all("a/v1", [file], tmp_path, counter)
    assert hashed[-1] < file.bytes


def test_a_vanished_file_is_no_error_in_a_folder_that_changes(programs: Path) -> None:
    write_program(programs / "rsync", "echo 'file has vanished: x' >&2; exit 24")
    connection = SshConnection("there:/runs")
    connection.rsync("bringing run", ["there:/runs/", "here"], changing=True)
    with pytest.raises(UserError, match="bringing run: file has vanished: x"):
        connection.rsync("bringing run", ["there:/runs/", "here"])
