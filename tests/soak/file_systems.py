"""Disturbances of the file system that a scenario writes: full, read-only, slow, stale. Mounting needs root.

Each takes a scenario, leaves nothing that looks whole, and removes the disturbance; a rerun must then end
like an undisturbed run. All return whether the disturbance had ended the first run.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.soak.run import Soak, start  # it puts the folders of the tests on the import path

from command_line import eventually  # isort: skip
from scenarios import Process, Scenario, Upload  # isort: skip

PLENTY = 512 << 20  # bytes
_WRITES = "openat,write,pwrite64,fsync,fdatasync,rename,renameat2,link,linkat,unlink,mkdir,ftruncate"
_OPENS = "openat,newfstatat,getdents64,rename,link,unlink,mkdir"


def place_of(scenario: Scenario) -> Path:
    """Return the folder that a scenario writes."""
    if isinstance(scenario, Process):
        return Path(scenario.config.workspace) / "datasets"
    if isinstance(scenario, Upload):
        return Path(scenario.url)
    return scenario.state


def fill(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Give the scenario a part of the space that it needs, then all."""
    expected, _ = undisturbed(soak, scenario)
    needed = _used_bytes(place_of(scenario))
    scenario.reset()
    place = place_of(scenario)
    with _mounted(place, "-t", "tmpfs", "-o", f"size={max(1 << 14, int(needed * draw.uniform(0.05, 0.95)))}"):
        failed = _end(start(scenario))
        scenario.check()
        _mount("-o", f"remount,size={PLENTY}", place)
        soak.run_to_end(scenario)
        assert scenario.result() == expected, "the end state differs"
    return failed


def lock(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Make the file system read-only at a random moment, as the kernel does after an error of the disk.

    What had not been written to the disk is lost then, as after a power cut. The disk is slow, so that
    the moment is in the middle of the work.
    """
    expected, _ = undisturbed(soak, scenario)
    place = place_of(scenario)
    limit = draw.random() * _used_bytes(place)
    scenario.reset()
    place = place_of(scenario)
    image = scenario.folder / "disk"
    with image.open("wb") as file:
        file.truncate(PLENTY)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with _mounted(place, "-o", "loop", image):
        (place / "lost+found").rmdir()
        child = start(scenario)
        with _traced(child, _WRITES, "delay_enter=5000"):
            while child.is_alive() and _used_bytes(place) < limit:
                time.sleep(0.001)
            _mount("-o", "remount,abort", place)
            failed = _end(child)
        scenario.check()
        with contextlib.suppress(OSError):
            (place / "written").touch()
            raise AssertionError("the file system is writable")
    repaired = subprocess.run(["e2fsck", "-p", image], capture_output=True, check=False)
    assert repaired.returncode <= 1, repaired.stdout
    with _mounted(place, "-o", "loop", image):
        scenario.check()
        soak.run_to_end(scenario)
        assert scenario.result() == expected, "the end state differs"
    image.unlink()
    return failed


def slow_down(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Let every change of the file system take milliseconds, and kill the scenario at a random moment."""
    expected, duration = undisturbed(soak, scenario)
    scenario.reset()
    delay = draw.randint(1, 20)  # ms
    child = start(scenario)
    with _traced(child, _WRITES, f"delay_enter={delay}000"):
        child.join(draw.random() * 4 * duration)
        child.kill()
        failed = _end(child)
    scenario.check()
    child = start(scenario)
    with _traced(child, _WRITES, f"delay_enter={delay}000"):
        assert not _end(child), "a slow run failed"
    assert scenario.result() == expected, "the end state differs"
    return failed


def make_stale(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Answer some system calls with ESTALE, as a file system does whose server has exported it anew."""
    expected, _ = undisturbed(soak, scenario)
    scenario.reset()
    first = int(10 ** draw.uniform(0, 3))
    child = start(scenario)
    with _traced(child, _OPENS, f"error=ESTALE:when={first}..{first + draw.randint(0, 5)}"):
        failed = _end(child)
    scenario.check()
    soak.run_to_end(scenario)
    assert scenario.result() == expected, "the end state differs"
    return failed


def undisturbed(soak: Soak, scenario: Scenario) -> tuple[Any, float]:
    """Run a scenario from its beginning; return its end state and its duration in s."""
    scenario.reset()
    begin = time.monotonic()
    soak.run_to_end(scenario)
    return scenario.result(), time.monotonic() - begin


def _end(child: BaseProcess) -> bool:
    """Wait for the end of a process; return whether it failed."""
    child.join(600)
    assert not child.is_alive(), "no end within 600 s"
    return bool(child.exitcode)


def _used_bytes(place: Path) -> int:
    total = 0
    for path in place.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


@contextlib.contextmanager
def _mounted(place: Path, *words: str | Path) -> Iterator[None]:
    """Mount a file system on a folder."""
    place.mkdir(parents=True, exist_ok=True)
    _mount(*words, *(["soak"] if "tmpfs" in words else []), place)
    try:
        yield
    finally:
        # While a process has a file open there, it fails; mounted again, it would be the same file system.
        eventually(lambda: subprocess.run(["umount", place], check=False).returncode == 0)


@contextlib.contextmanager
def _traced(child: BaseProcess, calls: str, injection: str) -> Iterator[None]:
    """Let strace inject delays or errors into the system calls of a process, its threads and children."""
    assert child.pid
    os.kill(child.pid, signal.SIGSTOP)
    command = ["strace", "-f", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:{injection}"]
    tracer = subprocess.Popen([*command, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    attached = tracer.stderr.readline()
    assert "attached" in attached, attached
    os.kill(child.pid, signal.SIGCONT)
    try:
        yield
    finally:
        tracer.kill()
        tracer.communicate()
