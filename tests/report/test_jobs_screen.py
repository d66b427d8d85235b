"""`jobs` and `jobs --watch` on a real terminal: its width, its size, keys, and how little is sent."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from recorded_runs import record_run

from hpc_imagenet.report.jobs_screen import summary_line
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import RunStore

ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"  # the screens of a terminal


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, cli: Cli, *words: str, size: tuple[int, int] = (24, 80), term: str = "xterm") -> None:
        self.printed = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(cli.cwd)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            environment = {**cli.env, "TERM": term, "LC_ALL": "C.UTF-8"}
            for name in ("COLUMNS", "LINES", "NO_COLOR"):
                environment.pop(name, None)
            os.execvpe(sys.executable, [sys.executable, "-m", "hpc_imagenet", *words], environment)

    def read(self, seconds: float = 0.1) -> bool:
        """Read what arrives within some time; False at the end."""
        if select.select([self._fd], [], [], seconds)[0]:
            try:
                block = os.read(self._fd, 1 << 16)
            except OSError:
                return False
            self.printed += block.decode(errors="replace")
            return bool(block)
        return True

    def until(self, condition: Callable[[str], object], seconds: float = 60) -> str:
        """Return what was printed since the last call, as soon as it meets a condition."""
        end = time.monotonic() + seconds
        while not condition(self.printed):
            assert time.monotonic() < end, self.printed
            assert self.read(), self.printed
        printed, self.printed = self.printed, ""
        return printed

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end(self) -> int:
        """Return the exit code."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def store(cli: Cli) -> RunStore:
    store = RunStore(cli.workspace)
    for number in range(40):
        record_run(store, number, FINISHED, result={"top1": 0.5, "epochs": 90}, label="mobilenet_v3_small")
    record_run(store, 40, FAILED, "\x1b[2Jout of memory on the node: raise cluster.memory_gb", label="日本語")
    return store


@pytest.mark.slow
def test_table_fits_the_terminal(cli: Cli, store: RunStore) -> None:
    terminal = Terminal(cli, "jobs")
    assert terminal.end() == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.printed)
    lines = plain.replace("\r\n", "\n").splitlines()
    assert len(lines) == 42
    assert max(map(len, lines)) <= 80
    assert "\x1b[31mfailed" in terminal.printed
    assert "\x1b[2J" not in terminal.printed


@pytest.mark.slow
def test_watch_follows_size_and_keys_and_leaves_the_screen_as_it_was(cli: Cli, store: RunStore) -> None:
    terminal = Terminal(cli, "jobs", "--watch")
    first = terminal.until(lambda text: "40 finished" in text)
    assert ALTERNATE in first
    assert "00000028" in first  # the failed run is before the finished ones
    assert "memory" in first
    assert "\x1b[2Jout" not in first
    assert "1 failed · 40 finished" in first
    assert "00000000" not in first  # the oldest is below
    terminal.resize(50, 120)
    assert "00000000" in terminal.until(lambda text: "q leaves" in text and "00000000" in text)
    terminal.resize(5, 30)
    terminal.until(lambda text: "id" in text)
    terminal.press("\x1b[6~j\x0c")  # page down, a line, and Ctrl-L to draw everything again
    terminal.until(lambda text: "00000024" in text)
    terminal.press("q")
    assert terminal.end() == 0
    assert NORMAL in terminal.printed


@pytest.mark.slow
def test_watch_sends_only_what_changes(cli: Cli, store: RunStore) -> None:
    terminal = Terminal(cli, "jobs", "--watch")
    terminal.until(lambda text: "q leaves" in text)
    seen = terminal.until(lambda text: text.count("\x1b[24;") >= 6)  # the clock in the last line
    assert len(seen) < 1500  # a screen has 1920 characters, and there were three updates
    run = record_run(store, 41, label="resnet50", started={})
    terminal.until(lambda text: "resnet50" in text)
    terminal.press("\x0c")
    assert run.id[:8] in terminal.until(lambda text: "q leaves" in text)
    terminal.press("\x03")
    assert terminal.end() == 0
    assert "interrupted" not in terminal.printed


@pytest.mark.slow
def test_watch_needs_a_terminal_that_is_known(cli: Cli, store: RunStore) -> None:
    assert "jobs --watch needs a terminal" in cli.process("jobs", "--watch", code=2).stderr
    terminal = Terminal(cli, "jobs", "--watch", term="no-such-terminal")
    assert terminal.end() == 2
    assert terminal.printed.startswith("error: jobs --watch: ")
    assert "set TERM" in terminal.printed
    terminal = Terminal(cli, "jobs", "--watch", "--sweep", "nothing")
    assert terminal.end() == 2
    assert ALTERNATE not in terminal.printed


@pytest.mark.slow
def test_watch_of_an_empty_workspace_waits_for_runs(cli: Cli) -> None:
    terminal = Terminal(cli, "jobs", "--watch")
    terminal.until(lambda text: "no runs" in text)
    record_run(RunStore(cli.workspace), 1)
    terminal.until(lambda text: "00000001" in text)
    terminal.press("q")
    assert terminal.end() == 0


def test_summary_counts_states(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert summary_line([]).endswith(" · no runs")
    for number in range(3):
        record_run(store, number)
    assert summary_line(job_rows(store.all())).endswith(" · 3 queued")
