r"""Check and measure the GPU code on one GPU, within a time budget.

    python benchmarks/gpu.py [--minutes 9] [--only A,B1] [--timm PATH/benchmark.py] [--rehearse]

Group A checks: the queue assigns the GPU, bf16 accuracy after a kill, pixels of nvJPEG, hidden
synchronisation, out of memory, deterministic resume, one-rank NCCL, torch.compile. Group B measures: a step
beside a plain loop and timm's benchmark, the loader, both together, the cost of ingredients. Each item is a
process with a time limit. Its lines are printed at once, and saved in gpu.txt and gpu.json (in the folder
$OUT, else here). The exit code is 1 if a check failed. `--rehearse` runs every item at the smallest size on
the CPU, where figures mean nothing.

A machine without internet needs, besides torch, torchvision, Lightning, scikit-learn, pytest and psutil:

    python -m pip wheel --no-deps -c constraints.txt -w .whl simplejpeg hydra-core omegaconf submitit \
        antlr4-python3-runtime cloudpickle filelock rich markdown-it-py mdurl pygments sh boto3 botocore \
        s3transfer jmespath python-dateutil six urllib3 hypothesis sortedcontainers attrs
    python -m pip install --no-index --no-deps --target .site .whl/*.whl   # there
    PYTHONPATH=$PWD/.site python benchmarks/gpu.py --minutes 9             # there
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
from gpu_report import MARK, Options

ROOT = Path(__file__).resolve().parents[1]
RUN = "HPC_IMAGENET_GPU_ITEM"  # environment variable: which run and item a process belongs to
TAIL = 15  # lines of other output that are shown of an item that failed


@dataclass(frozen=True)
class Item:
    """A check or measurement.

    Attributes:
        name: such as A2; the letter is the group.
        title: short description.
        function: module and function, as "module:function".
        expected: duration on a GPU, s.
        limit: s, after which it is killed.
        alone: whether no other item runs at the same time.
    """

    name: str
    title: str
    function: str
    expected: float
    limit: float
    alone: bool = False


# In order of importance: items that exceed the budget are skipped from the end.
ITEMS = (
    Item("A0", "the machine", "gpu_checks:machine", 20, 60, alone=True),
    Item("A6", "torch.compile", "gpu_checks:compiled", 120, 200),
    Item("A1", "queue, bf16, kill and retry", "gpu_checks:queue", 90, 170),
    Item("A2", "nvJPEG", "gpu_checks:decoding", 60, 150),
    Item("A4", "resume", "gpu_checks:resume", 50, 120),
    Item("A3", "steps", "gpu_checks:steps", 45, 120),
    Item("A5", "one-rank NCCL", "gpu_checks:nccl", 60, 120),
    Item("B1", "a step", "gpu_speed:step", 165, 200, alone=True),
    Item("B4", "end to end", "gpu_speed:end_to_end", 60, 100, alone=True),
    Item("B3", "the loader", "gpu_speed:loader", 45, 80, alone=True),
    Item("B2", "timm's benchmark", "gpu_speed:timm", 45, 80, alone=True),
    Item("B5", "ingredients", "gpu_speed:ingredients", 70, 120, alone=True),
)


@dataclass
class Outcome:
    """Result of an item: its state (ok, failed or skipped), duration in s, and reports."""

    item: Item
    state: str = "skipped"
    seconds: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def checks(self, ok: bool) -> int:
        """Return how many checks passed, or failed."""
        return sum(report["ok"] is ok for report in self.reports)


class Runner:
    """Runs items within a budget.

    Args:
        options: of the items.
        seconds: the budget.
        folder: of gpu.txt and gpu.json.
        beside: number of items of group A that run in parallel.
    """

    def __init__(self, options: Options, seconds: float, folder: Path, beside: int) -> None:
        self._options, self._beside = options, beside
        self._began, self._seconds = time.monotonic(), seconds
        self._json, self._text = folder / "gpu.json", (folder / "gpu.txt").open("w")
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self.outcomes: list[Outcome] = []

    def run(self, items: Sequence[Item]) -> int:
        """Run all, and return the exit code."""
        self.outcomes = [Outcome(item) for item in items]
        try:
            alone = [outcome for outcome in self.outcomes if outcome.item.alone]
            first = [outcome for outcome in alone if outcome.item.name == "A0"]
            for outcome in first:
                self._run(outcome)
            with ThreadPoolExecutor(self._beside) as pool:
                try:
                    list(pool.map(self._run, [o for o in self.outcomes if not o.item.alone]))
                except KeyboardInterrupt:
                    self._stopped.set()  # the pool's threads look at it
                    raise
            for outcome in alone:
                if outcome not in first:
                    self._run(outcome)
        except KeyboardInterrupt:
            self._stopped.set()
        return self._close()

    def line(self, text: str) -> None:
        """Print a line, and keep it."""
        with self._lock:
            print(text, flush=True)
            print(text, file=self._text, flush=True)

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def _run(self, outcome: Outcome) -> None:
        item, left = outcome.item, self._left()
        if self._stopped.is_set():
            return
        if item.expected > left:
            self.line(
                f"{item.name}  skipped  {item.title}: takes {item.expected:.0f} s, {left:.0f} s are left"
            )
            return
        # The limits are for a GPU; the duration of a rehearsal depends on the load of the machine.
        began, limit = time.monotonic(), left if self._options.toy else min(item.limit, left)
        process = self._start(item)
        tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        assert process.stdout
        reader = threading.Thread(target=self._read, args=(process.stdout, outcome, tail), daemon=True)
        reader.start()
        end, code = began + limit, None
        try:
            while code is None and time.monotonic() < end and not self._stopped.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.2)
        except KeyboardInterrupt:
            self._stopped.set()
        self._kill(process, item)
        reader.join(5)
        if not reader.is_alive():
            process.stdout.close()
        outcome.seconds = round(time.monotonic() - began, 1)
        outcome.state = "ok" if code == 0 and not outcome.checks(False) else "failed"
        if code is None:
            why = "interrupted" if self._stopped.is_set() else f"killed after {limit:.0f} s"
            self.line(f"{item.name}  FAILED   {item.title}: {why}")
        elif code and not outcome.checks(False):
            self.line(f"{item.name}  FAILED   {item.title}: exit code {code}")
        if outcome.state == "failed":
            for line in tail:
                self.line(f"{item.name}           | {line}")
        self._save()

    def _start(self, item: Item) -> subprocess.Popen[str]:
        options = self._options
        command = [sys.executable, __file__, "--item", item.function, "--device", options.device]
        command += ["--toy"] if options.toy else []
        command += ["--folder", str(options.folder)]
        command += ["--timm", str(options.timm)] if options.timm else []
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(options.folder / "inductor"),  # B1 uses what A6 has compiled
            RUN: f"{os.getpid()}-{item.name}",
        }
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )

    def _read(self, output: TextIO, outcome: Outcome, tail: collections.deque[str]) -> None:
        for line in output:
            _, mark, text = line.partition(MARK)
            if not mark:
                if line.strip():
                    tail.append(line.rstrip())
                continue
            report = json.loads(text)
            outcome.reports.append(report)
            word = {True: "ok", False: "WRONG", None: ""}[report["ok"]]
            self.line(f"{outcome.item.name}  {word:7}  {report['line']}")

    def _kill(self, process: subprocess.Popen[str], item: Item) -> None:
        """Kill an item and all processes that it started, also those in other sessions."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if other.environ().get(RUN) == f"{os.getpid()}-{item.name}":
                    other.kill()
        process.wait()

    def _save(self) -> None:
        with self._lock:
            whole = [
                {"item": o.item.name, "title": o.item.title, "state": o.state, "seconds": o.seconds}
                | {"reports": o.reports}
                for o in self.outcomes
            ]
            new = self._json.with_suffix(".new")
            new.write_text(json.dumps(whole, indent=1) + "\n")
            new.replace(self._json)

    def _close(self) -> int:
        self._save()
        right, wrong = (sum(outcome.checks(ok) for outcome in self.outcomes) for ok in (True, False))
        states = [outcome.state for outcome in self.outcomes]
        failed, skipped = states.count("failed"), states.count("skipped")
        took = time.monotonic() - self._began
        self.line(
            f"gpu.py: {right + wrong} checks, {wrong} wrong; {len(states)} items, {failed} failed, "
            f"{skipped} skipped; {took:.0f} s"
        )
        self._text.close()
        return int(bool(wrong or failed or self._stopped.is_set()))


def sees_gpu() -> bool:
    """Whether the driver offers a GPU to this process; importing torch would take seconds."""
    with contextlib.suppress(OSError):
        cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def chosen(only: str | None) -> list[Item]:
    """Return the items that `--only` names, by themselves or by their group.

    Raises:
        ValueError: an unknown name.
    """
    names = only.split(",") if only else ["A", "B"]
    known = {item.name for item in ITEMS} | {"A", "B"}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {only}: {unknown[0]} is unknown; one of: {', '.join(sorted(known))}")
    return [item for item in ITEMS if item.name in names or item.name[0] in names]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=9, help="the budget (9)")
    parser.add_argument("--only", help="groups or items, such as A,B1 (all)")
    parser.add_argument("--timm", type=Path, help="timm's benchmark.py, for B2")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="of gpu.txt, gpu.json"
    )
    parser.add_argument("--rehearse", action="store_true", help="the smallest sizes, on the CPU")
    for name in ("--item", "--device", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--toy", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.item:
        module, _, function = given.item.partition(":")
        options = Options(given.device, given.toy, Path(given.folder), given.timm)
        getattr(__import__(module), function)(options)
        return 0
    try:
        items = chosen(given.only)
        if given.timm and not given.timm.is_file():
            raise ValueError(f"--timm {given.timm}: no such file")
        if not given.rehearse and not sees_gpu():
            raise ValueError("no GPU found: --rehearse runs every item on the CPU at the smallest size")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-gpu-", ignore_cleanup_errors=True) as folder:
        device = "cpu" if given.rehearse else "cuda"
        timm = given.timm.resolve() if given.timm else None
        options = Options(device, given.rehearse, Path(folder), timm)
        runner = Runner(options, 60 * given.minutes, given.out, beside=1 if given.rehearse else 4)
        if given.rehearse:
            runner.line("rehearsal on the CPU at the smallest sizes: the figures mean nothing")
        return runner.run(items)


if __name__ == "__main__":
    sys.exit(main())
