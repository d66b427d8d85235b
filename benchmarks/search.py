"""Compare a search with a grid of the digits on the Slurm lab: cost until the grid's best accuracy.

    python benchmarks/search.py [--points 7] [--trials 12]

It starts a private Slurm cluster (slurm/lab) and stops it again. First a sweep over a grid of learning rates,
then ASHA over the interval that the grid covers, with four workers on four nodes, of which two are preempted
by Slurm while they train. Cost is the CPU time of all processes of the jobs, with their start; the lab has no
GPU. Then the search goes on to its end, to see whether anything was lost or a worker was idle.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from lab_site import LabSite

from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.search.study_files import StudyFiles

PACKAGES = ("hpc-imagenet", "optuna", "submitit", "torch")
LOW, HIGH = 0.003, 1.0  # learning rates
EPOCHS = 27  # rungs at 1, 3 and 9
TRAINING = (
    *("dataset=digits", "model=shufflenet_v2_x0_5", "cluster=lab", "tracker=null", f"recipe.epochs={EPOCHS}"),
    *("recipe.warmup_epochs=0", "recipe.norm_momentum=0.3", "train.checkpoint_every_minutes=0.1"),
    *("cluster.partition=low", "cluster.cpus_per_task=1", "+cluster.sbatch.exclusive=true"),
)
WORKERS, PREEMPTED = 4, 2
_TICK = 0.5  # s


class CpuMeter(threading.Thread):
    """Sums the CPU time of all processes whose command line names a workspace, every half second."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(daemon=True)
        self._word, self._seconds = str(workspace), dict[tuple[int, float], float]()

    def run(self) -> None:
        """Measure until the program ends."""
        while True:
            for process in psutil.process_iter():
                try:
                    if self._word in " ".join(process.cmdline()) and process.pid != os.getpid():
                        times = process.cpu_times()
                        self._seconds[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
            time.sleep(_TICK)

    @property
    def seconds(self) -> float:
        """CPU time so far, s."""
        return sum(self._seconds.copy().values())


class Site(LabSite):
    """A lab, with the datastore in the workspace `data`."""

    def rows(self, workspace: str, stage: str) -> list[dict[str, Any]]:
        """Return the rows of `jobs` of a stage."""
        rows: list[dict[str, Any]] = json.loads(self.command("jobs", "--json", workspace=workspace)[1])
        return [row for row in rows if row["stage"] == stage]

    @property
    def data(self) -> str:
        """The setting of the datastore, made once for both workspaces."""
        return f"datastore.url={self.folder / 'data/datastores'}"


def until(condition: Callable[[], bool], tick: float = 1.0, seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("the lab makes no progress")
        time.sleep(tick)


def grid(site: Site, points: int) -> tuple[float, float]:
    """Train the grid; return its best top-1 (0 to 1) and its CPU time in s."""
    rates = [LOW * (HIGH / LOW) ** (i / (points - 1)) for i in range(points)]
    meter = CpuMeter(site.folder / "grid")
    meter.start()
    swept = f"recipe.learning_rate={','.join(f'{rate:.4g}' for rate in rates)}"
    site.command("-m", *TRAINING, site.data, swept, workspace="grid")
    until(lambda: all(row["state"] not in ("queued", "running") for row in site.rows("grid", "train")), 5)
    rows = site.rows("grid", "train")
    assert [row["state"] for row in rows] == ["finished"] * points, rows
    tops = [row["top1"] for row in rows]
    print(
        f"grid: {points} learning rates, {points * EPOCHS} epochs, "
        f"top-1 {' '.join(f'{100 * top:.1f}' for top in tops)} %",
        flush=True,
    )
    return max(tops), meter.seconds


def preempt(site: Site, files: StudyFiles) -> list[str]:
    """Preempt two workers whose trials have a checkpoint; return their runs."""
    victims: list[str] = []
    while len(victims) < PREEMPTED:
        for record in files.records():
            last = site.folder / "search/runs" / record.run / "checkpoints/last.ckpt"
            if record.state == "running" and record.worker not in victims and last.exists():
                row = next(row for row in site.rows("search", "search") if row["run"] == record.worker)
                if row["state"] != "running" or row["requeued"]:
                    continue
                options = (
                    "--partition=high",
                    f"--nodelist={row['nodes']}",
                    "--exclusive",
                    "--output=/dev/null",
                )
                site.run("sbatch", *options, "--wrap=sleep 1")
                victims.append(record.worker)
                break
        time.sleep(_TICK)
    return victims


def search(site: Site, trials: int, best: float) -> tuple[float, float, list[str]]:
    """Search; return CPU times in s, until a trial reached `best` and of the whole, and the victims."""
    meter = CpuMeter(site.folder / "search")
    meter.start()
    space = f"recipe.learning_rate=tag(log,interval({LOW:g},{HIGH:g}))"
    settings = (f"search.trials={trials}", f"search.parallel={WORKERS}", "search.name=study")
    site.command("+search=asha", *TRAINING, site.data, space, *settings, workspace="search")
    files = StudyFiles(RunStore(site.folder / "search"), "study")
    victims = preempt(site, files)
    reached = float("nan")

    def over() -> bool:
        nonlocal reached
        tops = [top for each in files.records() for top in each.accuracies.values()]
        if reached != reached and tops and max(tops) >= best:
            reached = meter.seconds
            at = sum(each.epochs or 0 for each in files.records())
            print(f"a trial has reached {100 * max(tops):.2f} % after {at} epochs of all trials", flush=True)
        records = files.records()
        return len(records) == trials and all(each.ended for each in records)

    until(over)
    until(lambda: all(row["state"] not in ("queued", "running") for row in site.rows("search", "search")))
    return reached, meter.seconds, victims


def check(site: Site, victims: list[str]) -> None:
    """Print what became of the trials, and how long workers were idle; fail if an epoch was lost."""
    store = RunStore(site.folder / "search")
    records = StudyFiles(store, "study").records()
    states = [each.state for each in records]
    counts = ", ".join(f"{states.count(name)} {name}" for name in sorted(set(states)))
    print(f"trials: {counts}; epochs: {sum(each.epochs or 0 for each in records)}", flush=True)
    requeued = {row["run"]: row["requeued"] for row in site.rows("search", "search")}
    assert all(requeued[victim] == 1 for victim in victims), requeued
    for record in records:
        with (store.run(record.run).folder / "metrics.csv").open() as file:
            validated = [int(line["epoch"]) for line in csv.DictReader(file) if line["val_top1"]]
        assert validated == list(range(record.epochs or 0)), (record.run, validated)
        assert sorted(map(int, record.accuracies)) == list(range(1, (record.epochs or 0) + 1)), record
    print(f"preempted and requeued: {', '.join(victims)}; each epoch of each trial was validated once")
    gaps, lasts = [], []
    for worker in {each.worker for each in records}:
        times = []
        for record in records:
            attempt = store.run(record.run).attempt
            if record.worker == worker and attempt and attempt.outcome:
                started = attempt.started
                begins = [each["time"] for each in (*started.get("earlier", ()), started)]
                times.append((_moment(begins[0]), _moment(attempt.outcome.time)))
                lasts.append((_moment(attempt.outcome.time) - _moment(begins[-1])) / (record.epochs or 1))
        times.sort()
        gaps += [after[0] - before[1] for before, after in pairwise(times)]
    rung = statistics.median(lasts)
    print(f"idle between two trials: {max(gaps):.1f} s at most; the first rung, one epoch: {rung:.1f} s")


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=7, help="learning rates of the grid (7)")
    parser.add_argument("--trials", type=int, default=12, help="trials of the search (12)")
    options = parser.parse_args()
    memory = psutil.virtual_memory().total / 2**30
    name, cores = platform.processor() or platform.machine(), len(os.sched_getaffinity(0))
    print(f"{name}, {cores} CPU cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start")
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES), flush=True)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        site = Site(Path(folder))
        with site.running():
            for stage in ("download", "process", "upload"):
                site.command(f"+stage={stage}", "dataset=digits", "cluster=foreground", workspace="data")
            best, cost = grid(site, options.points)
            reached, whole, victims = search(site, options.trials, best)
            print(f"grid: {cost:.0f} CPU-s, best top-1 {100 * best:.2f} %")
            print(
                f"ASHA: {reached:.0f} CPU-s until a trial reached it ({reached / cost:.2f} of the grid); "
                f"{whole:.0f} CPU-s to the end of all {options.trials} trials ({whole / cost:.2f})"
            )
            check(site, victims)


if __name__ == "__main__":
    main()
