"""The process that copies: what it brings, what it says, how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from door import eventually, lives
from sample_dataset import make_dataset

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.copy_process import NICE, CopyProcess
from hpc_imagenet.errors import UserError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A place with version 1 of `digits`."""
    make_dataset(tmp_path / "workspace")
    (tmp_path / "stores" / "digits").mkdir(parents=True)
    (tmp_path / "stores/digits/v1").symlink_to(tmp_path / "workspace/datasets/digits")
    return tmp_path / "stores"


@pytest.fixture
def shard(home: Path) -> File:
    return versions.open_version(Datastore("digits", str(home))).manifest.shards[0]


def silent(done: int) -> None:
    pass


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "hpc_imagenet.datastore.node_cache.copy_process" in child.cmdline():
                found.append(child)
    return found


def test_it_copies_hashes_and_says_what_is_wrong(home: Path, shard: File, tmp_path: Path) -> None:
    copier = CopyProcess(str(home), "digits/v1", tmp_path)
    try:
        assert not children()
        copier.fetch(shard, tmp_path / "copy", silent)
        assert copier.hash(tmp_path / "copy", shard, silent) == shard.hash
        (tmp_path / "copy").write_bytes(b"else")
        assert copier.hash(tmp_path / "copy", shard, silent) != shard.hash
        with pytest.raises(UserError, match="digits/v1/none is missing"):
            copier.fetch(File("none", 1, shard.hash), tmp_path / "none", silent)
        assert not (tmp_path / "none").exists()
        (child,) = children()
        assert child.nice() == min(19, max(NICE, os.nice(0)))
    finally:
        copier.close()
    eventually(lambda: not children())
    with pytest.raises(UserError, match="not copied any more"):
        copier.fetch(shard, tmp_path / "copy", silent)


def test_one_that_was_killed_is_told_and_another_takes_its_place(
    home: Path, shard: File, tmp_path: Path
) -> None:
    copier = CopyProcess(str(home), "digits/v1", tmp_path)
    try:
        copier.fetch(shard, tmp_path / "copy", silent)
        (child,) = children()
        child.send_signal(signal.SIGSTOP)
        killer = threading.Timer(1, child.kill)
        killer.start()
        with pytest.raises(UserError, match=r"has ended \(exit code -9\)"):
            copier.fetch(shard, tmp_path / "second", silent)
        assert not (tmp_path / "second").exists()
        copier.fetch(shard, tmp_path / "second", silent)
        assert (tmp_path / "second").stat().st_size == shard.bytes
    finally:
        copier.close()


def test_what_is_no_answer_is_told(home: Path, shard: File, tmp_path: Path) -> None:
    copier = CopyProcess(str(home), "digits/v1", tmp_path)
    copier._command = [sys.executable, "-c", "print('Welcome to n1')"]
    with pytest.raises(UserError, match="says 'Welcome to n1', which is no answer"):
        copier.fetch(shard, tmp_path / "copy", silent)
    copier.close()


def test_it_ends_with_whoever_gives_the_orders(home: Path, shard: File, tmp_path: Path) -> None:
    order = "copier.bring(shard, Path(sys.argv[2], 'copy'), print)"
    assert gone_after(order, home, shard, tmp_path) == ""


def test_it_ends_in_the_midst_of_its_work(home: Path, shard: File, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # holes: an hour of hashing
    order = "copier.hash(Path(sys.argv[2], 'large'), shard, lambda done: end())"
    assert gone_after(order, home, shard, tmp_path) == ""


def gone_after(order: str, home: Path, shard: File, tmp_path: Path) -> str:
    """Give an order in a process that kills itself over it or behind it; return what the copier complains of.

    Fails where the copier does not end.
    """
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from hpc_imagenet.datastore.node_cache.copy_process import Copier\n"
        "from hpc_imagenet.datastore.manifest import File\n"
        "copier = Copier(sys.argv[1], 'digits/v1', Path(sys.argv[2]))\n"
        "shard = File(sys.argv[3], int(sys.argv[4]), sys.argv[5])\n"
        "def end():\n"
        "    print(copier._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        f"{order}\n"
        "end()\n"
    )
    words = [str(home), str(tmp_path), shard.path, str(shard.bytes), shard.hash]
    with (tmp_path / "errors").open("w") as errors:
        told = subprocess.run(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    assert told.returncode == -signal.SIGKILL
    pid = int(told.stdout.split()[-1])
    eventually(lambda: not lives(pid))
    return (tmp_path / "errors").read_text()
