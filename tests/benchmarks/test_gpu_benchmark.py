"""benchmarks/gpu.py: budget, limits, failures and exit codes, with items made here; and a rehearsal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
from gpu import Item, Runner
from gpu_report import Options

ROOT = Path(__file__).resolve().parents[2]
STUB = """
import os, subprocess, sys, time
from gpu_report import report

def good(options):
    print("a word aside")
    report(f"fine on {options.device}", ok=True, figure=1.5)
    report("as fast as can be")

def wrong(options):
    report("first", ok=True)
    report("second", ok=False)

def broken(options):
    print("about to fail")
    raise ValueError("no such thing")

def hangs(options):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    report("before it hangs", ok=True)
    time.sleep(600)
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Runner(Options("cpu", False, tmp_path), 600, tmp_path, beside=2)


def item(name: str, function: str, expected: float = 1, limit: float = 60, alone: bool = False) -> Item:
    return Item(name, function, f"stub:{function}", expected, limit, alone)


@pytest.mark.slow
def test_results_are_printed_and_kept(runner: Runner, tmp_path: Path, capsys) -> None:
    assert (
        runner.run([item("A0", "good", alone=True), item("A1", "good"), item("B1", "good", alone=True)]) == 0
    )
    out = capsys.readouterr().out
    assert (tmp_path / "gpu.txt").read_text() == out
    lines = out.splitlines()
    assert lines[:2] == ["A0  ok       fine on cpu", "A0           as fast as can be"]
    assert re.fullmatch(r"gpu\.py: 3 checks, 0 wrong; 3 items, 0 failed, 0 skipped; \d+ s", lines[-1])
    assert "a word aside" not in out
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [(one["item"], one["state"]) for one in kept] == [("A0", "ok"), ("A1", "ok"), ("B1", "ok")]
    assert kept[0]["reports"][0] == {"line": "fine on cpu", "ok": True, "figure": 1.5}


@pytest.mark.slow
def test_a_wrong_check_and_a_crash_are_failures(runner: Runner, capsys) -> None:
    assert runner.run([item("A1", "wrong"), item("A2", "broken"), item("A3", "good")]) == 1
    out = capsys.readouterr().out
    assert "A1  WRONG    second" in out
    assert "A2  FAILED   broken: exit code 1" in out
    assert "A2           | about to fail" in out
    assert "A2           | ValueError: no such thing" in out
    assert "gpu.py: 3 checks, 1 wrong; 3 items, 2 failed, 0 skipped" in out


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_skipped(runner: Runner, capsys) -> None:
    assert runner.run([item("A1", "good"), item("B1", "good", expected=700)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"B1  skipped  good: takes 700 s, \d+ s are left", out)
    assert "1 skipped" in out


@pytest.mark.slow
def test_an_item_that_hangs_is_killed_with_all_that_it_has_started(
    runner: Runner, tmp_path: Path, capsys
) -> None:
    assert runner.run([item("A1", "hangs", limit=10)]) == 1
    out = capsys.readouterr().out
    assert "A1  ok       before it hangs" in out
    assert "A1  FAILED   hangs: killed after 10 s" in out
    mine = f"{os.getpid()}-A1"
    assert not [process for process in psutil.process_iter() if _item(process) == mine]


def _item(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(gpu.RUN)
    except psutil.Error:
        return None


@pytest.mark.slow
def test_an_interrupt_ends_all_and_keeps_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom gpu import Item, Runner, interrupt\n"
        "from gpu_report import Options\nsignal.signal(signal.SIGTERM, interrupt)\n"
        f"here = Path({str(tmp_path)!r})\n"
        "items = [Item(name, 'hangs', 'stub:hangs', 1, 500, name == 'B1') for name in ('A1', 'B1')]\n"
        "sys.exit(Runner(Options('cpu', True, here), 600, here, 2).run(items))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(tmp_path)])}
    with subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "A1  ok       before it hangs\n"
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 1
    assert "A1  FAILED   hangs: interrupted" in rest
    assert "B1" not in rest
    assert "gpu.py: 1 checks, 0 wrong; 2 items, 1 failed, 1 skipped" in rest
    assert json.loads((tmp_path / "gpu.json").read_text())[0]["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "A,C7"], "error: --only A,C7: C7 is unknown; one of: A, A0"),
        (["--timm", "nowhere.py"], "error: --timm nowhere.py: no such file"),
    ],
)
def test_unusable_options_are_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_item_is_there() -> None:
    """Without importing torch: each names a function of a module beside gpu.py."""
    for one in gpu.ITEMS:
        module, _, function = one.function.partition(":")
        assert f"\ndef {function}(options: Options)" in (ROOT / "benchmarks" / f"{module}.py").read_text()
        assert one.expected < one.limit


@pytest.mark.slow
def test_a_rehearsal_of_the_machine_the_queue_and_the_compiler(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--rehearse", "--only", "A0,A1,A6"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("rehearsal on the CPU at the smallest sizes: the figures mean nothing\n")
    assert re.search(r"A1  ok       killed after \d+ images, went on from step [1-9]", done.stdout)
    assert re.search(r"A1  ok       device: CPU, \d+ CPUs, 32-true", done.stdout)
    assert re.search(r"A6  ok       squeezenet1_1: 3 graphs for 2 sizes and validation", done.stdout)
    assert re.search(r"0 wrong; 3 items, 0 failed, 0 skipped; \d+ s\n$", done.stdout)
