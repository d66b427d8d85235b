"""The copy process: fetching, hashing, errors and its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from command_line import eventually, is_alive
from sample_dataset import link_version, make_dataset

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.copy_process import NICE, CopyProcess
from hpc_imagenet.errors import UserError


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """A folder backend with version 1 of `digits`."""
    make_dataset(tmp_path / "workspace")
    link_version(tmp_path / "workspace/datasets/digits", tmp_path / "stores/digits/v1")
    return tmp_path / "stores"


@pytest.fixture
def shard(stores: Path) -> File:
    return versions.open_version(Datastore("digits", str(stores))).manifest.shards[0]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A sparse file that takes an hour to hash."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    return tmp_path / "large"


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "hpc_imagenet.datastore.node_cache.copy_process" in child.cmdline():
                found.append(child)
    return found


@pytest.mark.slow
def test_copy_process_fetches_hashes_and_reports_errors(stores: Path, shard: File, tmp_path: Path) -> None:
    copier = CopyProcess(str(stores), "digits/v1", tmp_path)
    try:
        assert not children()
        copier.fetch(shard, tmp_path / "copy")
        assert copier.hash(tmp_path / "copy", shard) == shard.hash
        (tmp_path / "copy").write_bytes(b"other")
        assert copier.hash(tmp_path / "copy", shard) != shard.hash
        with pytest.raises(UserError, match="digits/v1/none is missing"):
            copier.fetch(File("none", 1, shard.hash), tmp_path / "none")
        assert not (tmp_path / "none").exists()
        (child,) = children()
        assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
    finally:
        copier.close()
    eventually(lambda: not children())
    with pytest.raises(UserError, match="the copy process is closed"):
        copier.fetch(shard, tmp_path / "copy")


@pytest.mark.slow
def test_copies_that_a_training_waits_for_are_not_idle(shard: File, tmp_path: Path) -> None:
    copier = CopyProcess("s3://bucket", "digits/v1", tmp_path)
    try:
        copier.hash(Path(__file__), shard)
        (child,) = children()
        assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER
        assert child.nice() == min(19, max(NICE, os.nice(0)))
    finally:
        copier.close()


@pytest.mark.slow
def test_killed_copy_process_is_reported_and_restarted(stores: Path, shard: File, tmp_path: Path) -> None:
    copier = CopyProcess(str(stores), "digits/v1", tmp_path)
    try:
        copier.fetch(shard, tmp_path / "copy")
        (child,) = children()
        child.send_signal(signal.SIGSTOP)
        killer = threading.Timer(1, child.kill)
        killer.start()
        with pytest.raises(UserError, match=r"ended unexpectedly \(exit code -9\)"):
            copier.fetch(shard, tmp_path / "second")
        assert not (tmp_path / "second").exists()
        copier.fetch(shard, tmp_path / "second")
        assert (tmp_path / "second").stat().st_size == shard.bytes
    finally:
        copier.close()


# In place of ssh: the first connection hangs.
SHELL = """#!/bin/sh
shift
mkdir {folder}/first 2>/dev/null && exec sleep 1000
exec sh -c "$*"
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_signals_of_slurm_to_all_processes_of_a_job_end_no_copy(
    stores: Path, shard: File, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rsync ends with them: by SIGUSR2 even with exit code 0."""
    (tmp_path / "shell").write_text(SHELL.format(folder=tmp_path))
    (tmp_path / "shell").chmod(0o755)
    monkeypatch.setenv("RSYNC_RSH", str(tmp_path / "shell"))
    copier = CopyProcess(f"host:{stores}", "digits/v1", tmp_path)
    try:
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(copier.fetch, shard, tmp_path / "copy")
            eventually((tmp_path / "first").exists)
            (child,) = children()
            for process in (child, *child.children(recursive=True)):
                process.send_signal(number)
            fetching.result(timeout=60)
        assert copier.hash(tmp_path / "copy", shard) == shard.hash
        (child,) = children()
        child.send_signal(number)  # between two requests
        assert copier.hash(tmp_path / "copy", shard) == shard.hash
    finally:
        copier.close()


@pytest.mark.slow
def test_signal_of_slurm_while_the_process_imports_ends_no_copy(
    stores: Path, shard: File, tmp_path: Path
) -> None:
    copier = CopyProcess(str(stores), "digits/v1", tmp_path)
    started = tmp_path / "started"
    # The first process ends as if the signal came before its first line.
    code = f"import os, signal; open({str(started)!r}, 'x'); os.kill(os.getpid(), signal.SIGUSR2)"
    command = " ".join(map(shlex.quote, copier._command))
    copier._command = [
        "sh",
        "-c",
        f"test -e {started} || exec {sys.executable} -c {shlex.quote(code)}; exec {command}",
    ]
    try:
        copier.fetch(shard, tmp_path / "copy")
        assert started.exists()
        assert copier.hash(tmp_path / "copy", shard) == shard.hash
    finally:
        copier.close()


def test_output_that_is_not_json_is_reported(stores: Path, shard: File, tmp_path: Path) -> None:
    copier = CopyProcess(str(stores), "digits/v1", tmp_path)
    copier._command = [sys.executable, "-c", "print('Welcome to n1')"]
    with pytest.raises(UserError, match="wrote 'Welcome to n1' instead of a JSON reply"):
        copier.fetch(shard, tmp_path / "copy")
    copier.close()


@pytest.mark.slow
def test_copy_process_ends_with_its_parent_while_idle(stores: Path, shard: File, tmp_path: Path) -> None:
    request = "copier.fetch(shard, Path(sys.argv[2], 'copy'))"
    assert stderr_after_parent_dies(request, stores, shard, tmp_path) == ""


@pytest.mark.slow
def test_copy_process_ends_with_its_parent_during_a_request(
    stores: Path, shard: File, large: Path, tmp_path: Path
) -> None:
    request = (
        "threading.Thread(target=copier.hash, args=(Path(sys.argv[2], 'large'), shard)).start()\n"
        "while not (copier._process and any(\n"
        "    file.path.endswith('large') for file in psutil.Process(copier._process.pid).open_files()\n"
        ")):\n"
        "    time.sleep(0.05)\n"
    )
    assert stderr_after_parent_dies(request, stores, shard, tmp_path) == ""


@pytest.mark.slow
def test_close_aborts_a_running_request(stores: Path, shard: File, large: Path, tmp_path: Path) -> None:
    copier = CopyProcess(str(stores), "digits/v1", tmp_path)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(copier.hash, large, shard)
        eventually(
            lambda: any(str(large) == file.path for child in children() for file in child.open_files())
        )
        copier.close()
        with pytest.raises(UserError, match=r"ended unexpectedly \(exit code -9\)"):
            hashing.result(timeout=60)
    assert not children()


def stderr_after_parent_dies(request: str, stores: Path, shard: File, tmp_path: Path) -> str:
    """Send a request from a process that kills itself; return the stderr of the copy process.

    Fails if the copy process does not end.
    """
    code = (
        "import os, psutil, sys, threading, time\n"
        "from pathlib import Path\n"
        "from hpc_imagenet.datastore.node_cache.copy_process import CopyProcess\n"
        "from hpc_imagenet.datastore.manifest import File\n"
        "copier = CopyProcess(sys.argv[1], 'digits/v1', Path(sys.argv[2]))\n"
        "shard = File(sys.argv[3], int(sys.argv[4]), sys.argv[5])\n"
        f"{request}\n"
        "print(copier._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    arguments = [str(stores), str(tmp_path), shard.path, str(shard.bytes), shard.hash]
    with (tmp_path / "errors").open("w") as errors:
        parent = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    assert parent.returncode == -signal.SIGKILL
    pid = int(parent.stdout.split()[-1])
    eventually(lambda: not is_alive(pid))
    return (tmp_path / "errors").read_text()
