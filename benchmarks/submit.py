"""Measure the time until a submitting command returns, compared with Hydra's basic launcher.

    python benchmarks/submit.py [--repeats 5]

Every measurement starts a process, as a user does, and includes the interpreter and its imports. The peer is
Hydra's basic launcher with a task function that only collects the resolved config: no plan, no validation, no
run folders, no queue. Commands alternate, so that a busy moment of the machine affects all of them.

It uses a temporary workspace, cancels what it submits and deletes everything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from hpc_imagenet.config.compose import compose
from hpc_imagenet.io.atomic_files import write_json_once
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.submission import cancel_run
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore

DIGITS = ("dataset=digits", "cluster=local")
JOBS = 100
RUNS = 1000
PACKAGES = ("hpc-imagenet", "hydra-core", "omegaconf", "submitit", "torch")

PEER = """
import hydra
from omegaconf import OmegaConf
from hpc_imagenet.config.compose import CONF, register
register()
collected = []
@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def collect(config):
    collected.append(OmegaConf.to_container(config, resolve=True))
collect()
print(len(collected))
"""


@dataclass
class Row:
    """A command and its measured times."""

    name: str
    command: Callable[[int], list[str]]  # by repetition
    expected: str  # text that stdout must contain for the time to count
    times: int  # number of its occurrences
    peer: str = ""  # the row to compare with
    after: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """In s."""
        return statistics.median(self.seconds)


class Workspace:
    """A temporary workspace with a datastore of the digits, and another with finished runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HPC_IMAGENET_"))}

    def command(self, *words: str) -> list[str]:
        """Return a command of the project on this workspace."""
        return [sys.executable, "-m", "hpc_imagenet", *words, f"workspace={self.folder / 'workspace'}"]

    def run(self, command: list[str], expected: str, times: int) -> float:
        """Run a command and return its duration in s."""
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.env)
        seconds = time.perf_counter() - begin
        if done.returncode or done.stdout.count(expected) != times:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return seconds

    def make_datastore(self) -> None:
        """Upload the digits to a datastore that trainings can read."""
        for stage in ("download", "process", "upload"):
            self.run(self.command(f"+stage={stage}", *DIGITS, "wait=true"), "finished ", 1)

    def make_runs(self, folder: Path, count: int) -> None:
        """Record `count` finished trainings."""
        (job,) = make_plan(compose([*DIGITS, f"workspace={folder}"]), lambda _: None)
        store = RunStore(folder)
        for number in range(count):
            info = {"stage": job.stage, "label": job.label, "model": job.model, "needs": []}
            run = store.create(f"{number:08x}-{job.label}", job.frozen(), info)
            attempt = run.new_attempt()
            attempt.submit("local", host=socket.gethostname())
            attempt.start()
            result = {"top1": number / count, "images_per_second": 1000.0, "seconds": 60.0}
            attempt.end(FINISHED, result=result)
            progress = {"done": 1, "total": 1, "unit": "images", "rate": 1000.0, "note": "", "time": ""}
            write_json_once(run.folder / "progress.json", progress)

    def cancel_all(self) -> None:
        """Cancel what was submitted, newest first, and wait until its processes have ended."""
        for run in reversed(RunStore(self.folder / "workspace").all()):
            cancel_run(run)
        end = time.monotonic() + 60
        while alive := self.processes():
            if time.monotonic() > end:
                for process in alive:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that use the workspace."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
        return found


def rows(space: Workspace) -> list[Row]:
    def peer(*words: str) -> Callable[[int], list[str]]:
        return lambda _: [sys.executable, "-c", PEER, "-m", "dataset=digits", *words]

    def seeds(repeat: int) -> str:
        return f"seed=range({1000 + JOBS * repeat},{1000 + JOBS * (repeat + 1)})"

    two, many = "model=resnet18,resnet50", f"seed=range({JOBS})"
    recorded = [sys.executable, "-m", "hpc_imagenet"]
    there = f"workspace={space.folder / 'recorded'}"
    launcher_two, launcher_many = "Hydra's basic launcher, 2", f"Hydra's basic launcher, {JOBS}"
    cancel_all = space.cancel_all
    return [
        Row(launcher_two, peer(two), "2", 1),
        Row(
            "-m model=resnet18,resnet50, 2 jobs",
            lambda r: space.command("-m", two, *DIGITS, f"seed={r}"),
            "submitted",
            2,
            launcher_two,
            cancel_all,
        ),
        Row(launcher_many, peer(many), str(JOBS), 1),
        Row(
            f"-m seed=range({JOBS}), {JOBS} jobs",
            lambda r: space.command("-m", *DIGITS, seeds(r)),
            "submitted",
            JOBS,
            launcher_many,
            cancel_all,
        ),
        Row(f"jobs, {RUNS:,} runs", lambda _: [*recorded, "jobs", there], "finished", RUNS),
        Row(f"jobs --json, {RUNS:,} runs", lambda _: [*recorded, "jobs", "--json", there], '"run":', RUNS),
    ]


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} CPU cores, {memory:.0f} GiB, load {load:.1f} at the start"


def show(table: list[Row], repeats: int) -> None:
    medians = {row.name: row.median for row in table}
    width = max(map(len, medians))
    print(f"{'time until it returns, s':{width}}  median     min     max  / Hydra's   ({repeats} times each)")
    for row in table:
        times = "  ".join(f"{value:6.2f}" for value in (row.median, min(row.seconds), max(row.seconds)))
        ratio = f"{row.median / medians[row.peer]:9.2f}" if row.peer else ""
        print(f"{row.name:{width}}  {times}  {ratio}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="times each command is run (5)")
    options = parser.parse_args()
    print(machine())
    print(
        f"Python {platform.python_version()}",
        *(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES),
        sep=", ",
    )
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-submit-") as folder:
        space = Workspace(Path(folder).resolve())
        try:
            space.make_datastore()
            space.make_runs(space.folder / "recorded", RUNS)
            table = rows(space)
            for row in table:  # warm-up of the page cache and the .pyc files; not counted
                space.run(row.command(options.repeats), row.expected, row.times)
                row.after()
            for repeat in range(options.repeats):
                for row in table:
                    row.seconds.append(space.run(row.command(repeat), row.expected, row.times))
                    row.after()
        finally:
            space.cancel_all()
    show(table, options.repeats)


if __name__ == "__main__":
    main()
