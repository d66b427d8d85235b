"""A way of a benchmark that hangs is killed with all its processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import loader
from limited import run_limited

pytestmark = pytest.mark.slow

# A child in a session of its own, which holds the output open, and a parent that waits for it forever.
HANGING = """
import subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
own = subprocess.Popen(sleeper, start_new_session=True)
same = subprocess.Popen(sleeper)
open(sys.argv[1], "w").write(f"{own.pid} {same.pid}")
time.sleep(1000 if sys.argv[2] == "wait" else 0)
"""


@pytest.mark.parametrize("parent", ["wait", "exit"])
def test_hanging_command_is_killed_with_its_children(tmp_path: Path, parent: str) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(subprocess.TimeoutExpired):
        run_limited([sys.executable, "-c", HANGING, str(pids), parent], 15)
    own, same = (int(pid) for pid in pids.read_text().split())
    assert _ended(same)
    if parent == "wait":
        assert _ended(own)
    else:  # its parent is gone, so that nothing shows whose it is
        psutil.Process(own).kill()


def _ended(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        process.wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_output_and_exit_code() -> None:
    code = "import sys, os; print('out', os.environ['X']); print('err', file=sys.stderr); sys.exit(3)"
    done = run_limited([sys.executable, "-c", code], 60, {"X": "y"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "out y\n", "err\n")


def test_row_of_a_way_that_hangs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nsleep 1000\n")
    hanging.chmod(0o755)
    rows = [loader.Row("spdl"), loader.Row("decode_jpeg")]
    loader.measure(rows, tmp_path, images=64, repeats=3, peers=str(hanging), limit=1)
    loader.show(rows)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ", 1)[1].strip() for line in lines] == ["timed out", "timed out"]
