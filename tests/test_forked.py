"""Processes of jobs that tests fork: as those that start in the ordinary way, but with torch imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import psutil
import pytest
from command_line import Cli, eventually

pytestmark = pytest.mark.slow
TASK = [sys.executable, "-u", "-m", "hpc_imagenet.launch.tasks.task"]


def start(cli: Cli, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TASK, *map(str, words)],
        env=cli.env,
        cwd=cli.cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("forks", [True, False])
def test_a_process_has_its_output_and_exit_code(cli: Cli, forks: bool) -> None:
    if not forks:
        cli.without_forks()
    process = start(cli, "none", "1")
    out, err = process.communicate(timeout=120)
    assert ("in _run\n" in err) == forks  # the frame of the server
    assert "FileNotFoundError" in err
    assert out == ""
    assert process.returncode == 1


def test_other_variables_that_an_import_reads_start_a_process_of_its_own(cli: Cli) -> None:
    cli.env["OMP_NUM_THREADS"] = "3"
    assert "in _run\n" not in start(cli, "none", "1").communicate(timeout=120)[1]


@pytest.fixture
def blocked(cli: Cli) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A proxy and its forked process, which waits for the end of a pipe."""
    folder = cli.workspace / "runs/run/attempts/1"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "outcome.json")

    def found() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cwd"]) if each.info["cwd"] == str(cli.cwd)]

    with start(cli, folder.parents[1], "1") as proxy:
        eventually(lambda: len(found()) == 2)
        (process,) = [each for each in found() if each.pid != proxy.pid]
        yield proxy, process
        proxy.kill()


def test_a_signal_is_passed_on_and_ends_both_alike(
    blocked: tuple[subprocess.Popen[str], psutil.Process],
) -> None:
    proxy, process = blocked
    assert "hpc_imagenet.launch.tasks.task" not in process.cmdline()
    eventually(lambda: process.status() == psutil.STATUS_SLEEPING)
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait(60) == -signal.SIGTERM
    eventually(lambda: not process.is_running())


def test_the_forked_process_dies_with_its_proxy(
    blocked: tuple[subprocess.Popen[str], psutil.Process],
) -> None:
    proxy, process = blocked
    proxy.kill()
    eventually(lambda: not process.is_running())


def test_nothing_is_forked_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "_address", "")
    assert forked.forking_environment() == {}
