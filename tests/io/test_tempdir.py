"""Temporary folders: those of killed processes are removed, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from sample_dataset import make_dataset

from hpc_imagenet.io.tempdir import NodeTempDir, remove_stale

HOLD = "import sys; from pathlib import Path; from hpc_imagenet.io.tempdir import NodeTempDir; "
HOLD += "print(NodeTempDir('session', Path(sys.argv[1])).folder, flush=True); input()"


def test_folder_of_a_killed_process_is_removed_and_of_a_running_one_kept(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        (folder / "runtime").mkdir()
        (folder / "runtime/key").write_text("a secret")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert remove_stale("session", tmp_path) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
    following = NodeTempDir("session", tmp_path)
    assert list(tmp_path.iterdir()) == [following.folder]
    following.close()
    assert not list(tmp_path.iterdir())


def test_links_files_and_folders_of_other_users_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "hpc_imagenet-session-link").symlink_to(kept)
    (tmp_path / "hpc_imagenet-session-file").touch()
    (tmp_path / "hpc_imagenet-other").mkdir()
    if os.geteuid() == 0:
        (tmp_path / "hpc_imagenet-session-theirs").mkdir()
        os.chown(tmp_path / "hpc_imagenet-session-theirs", 65534, 65534)
    before = sorted(tmp_path.rglob("*"))
    assert remove_stale("session", tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_concurrent_processes_keep_their_own_folders(tmp_path: Path) -> None:
    folders: list[NodeTempDir] = []

    def start() -> None:
        for _ in range(10):
            folders.append(NodeTempDir("session", tmp_path))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tmp_path.iterdir()) == sorted(each.folder for each in folders)
    for each in folders:
        each.close()
    assert not list(tmp_path.iterdir())


def test_folders_of_another_purpose_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "hpc_imagenet-session-old").mkdir()
    (tmp_path / "hpc_imagenet-indexes-old").mkdir()
    made = NodeTempDir("indexes")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "hpc_imagenet-session-old", made.folder])
    made.close()


REMOTE = """
import sys
from pathlib import Path
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.backends.ssh_backend import SshBackend
from hpc_imagenet.datastore.backends.storage_backend import ProgressCounter, Reusable, UploadFile
from hpc_imagenet.datastore.versions import Version
folder, host = Path(sys.argv[1]), SshBackend("there:/stores")
manifest = load_manifest(folder)
(file,) = manifest.files
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "act",
    [
        "with open_dataset(Version('a', 1, host, manifest), Cluster(scratch='.'), stages=False): pass",
        "host.fetch_all('a/v1', [file], folder, ProgressCounter(print))",
        "host.send([UploadFile(folder / file.path, file)], 'a/v1', Reusable(0), print)",
    ],
)
def test_folder_of_a_killed_transfer_is_removed_by_the_next_one(tmp_path: Path, act: str) -> None:
    make_dataset(tmp_path)
    (tmp_path / "node").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rsync").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (tmp_path / "bin/ssh").write_text("#!/bin/sh\nprintf reply-of-hpc_imagenet:\n")  # and does nothing
    for program in ("rsync", "ssh"):
        (tmp_path / "bin" / program).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": f"{tmp_path}/node"}
    left = []
    for _ in range(2):
        command = [sys.executable, "-c", REMOTE + act, tmp_path / "datasets/digits"]
        done = subprocess.run(command, env={**env, "RSYNC_RSH": f"{tmp_path}/bin/ssh"}, check=False)
        assert done.returncode == -signal.SIGKILL
        (folder,) = (tmp_path / "node").iterdir()
        left.append(folder)
    assert left[0] != left[1]
