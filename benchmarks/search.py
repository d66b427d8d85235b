"""Compare a search with a grid of the digits on the Slurm lab: cost until the grid's best accuracy.

    python benchmarks/search.py [--points 6] [--trials 18] [--seeds 3]

It starts a private Slurm cluster (slurm/lab) and stops it again. First a sweep over a grid of six learning
rates and three weight decays of a small network, then ASHA over the intervals that the grid covers, with as
many trials, four workers on four nodes, and Slurm preempting two of them while they train, once for each of
three seeds. Cost is the CPU time of all processes of the jobs, with their start; the lab has no GPU. A trial
has reached the grid's best if its top-1 at the end of its schedule is as high. The search goes on to its end,
to see whether anything was lost or a worker was idle.

One search is one draw of many. The pruner is therefore also replayed over the curves of the grid, in many
orders, with the first rung at several epochs: how often the best point is trained to its end, and after which
share of the epochs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import psutil
from lab_site import LabSite

from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.search.rungs import first_rung, rung_epochs
from hpc_imagenet.search.study import pruner
from hpc_imagenet.search.study_files import StudyFiles

PACKAGES = ("hpc-imagenet", "optuna", "submitit", "torch")
RATES, DECAYS = (0.003, 1.0), (1e-5, 1e-3)  # ends of logarithmic intervals
POINTS = 3  # weight decays of the grid
EPOCHS, WARMUP = 27, 1  # warm-up of the recipe demo; rungs at 3 and 9
FIRST_RUNG = first_rung(EPOCHS, WARMUP)
TRAINING = (
    *(
        "dataset=digits",
        "model=small_network:network",
        "cluster=lab",
        "tracker=null",
        f"recipe.epochs={EPOCHS}",
    ),
    *(f"recipe.warmup_epochs={WARMUP}", "recipe.norm_momentum=0.3", "train.checkpoint_every_minutes=0.1"),
    *("cluster.partition=low", "cluster.cpus_per_task=1", "+cluster.sbatch.exclusive=true"),
)
WORKERS, PREEMPTED = 4, 2
ORDERS = 500  # replays
MOST = 0.35  # share of the grid's cost
_TICK = 0.5  # s


NETWORK = """
from torch import nn


def network(num_classes):
    layers, before = [], 3
    for channels in (16, 32, 64):
        layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))
"""


class CpuMeter(threading.Thread):
    """Sums the CPU time of the processes that name a workspace, but the command `jobs`, every half second."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(daemon=True)
        self._word, self._seconds = str(workspace), dict[tuple[int, float], float]()

    def run(self) -> None:
        """Measure until the program ends."""
        while True:
            for process in psutil.process_iter():
                try:
                    line = process.cmdline()
                    if self._word in " ".join(line) and "jobs" not in line and process.pid != os.getpid():
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


def until(condition: Callable[[], bool], tick: float = 1.0, seconds: float = 3600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("the lab makes no progress")
        time.sleep(tick)


def spread(low: float, high: float, points: int) -> list[str]:
    """Return points of an interval on a logarithmic scale, as they are typed."""
    return [f"{low * (high / low) ** (i / (points - 1)):.4g}" for i in range(points)]


def grid(site: Site, points: int) -> tuple[list[list[float]], float]:
    """Train the grid; return the top-1 (0 to 1) of each point after each epoch, and the CPU time in s."""
    meter = CpuMeter(site.folder / "grid")
    meter.start()
    rates, decays = spread(*RATES, points), spread(*DECAYS, POINTS)
    swept = (f"recipe.learning_rate={','.join(rates)}", f"recipe.weight_decay={','.join(decays)}")
    site.command("-m", *TRAINING, site.data, *swept, workspace="grid")
    until(lambda: all(row["state"] not in ("queued", "running") for row in site.rows("grid", "train")), 20)
    cost = meter.seconds
    rows, store = site.rows("grid", "train"), RunStore(site.folder / "grid")
    assert [row["state"] for row in rows] == ["finished"] * len(rates) * len(decays), rows
    curves = []
    print(f"grid: {len(rows)} points, {len(rows) * EPOCHS} epochs; top-1 in %, a line a learning rate")
    for rate in rates:
        line = []
        for decay in decays:
            recipe = {"learning_rate": float(rate), "weight_decay": float(decay)}
            (run,) = [
                run
                for run in (store.run(row["run"]) for row in rows)
                if all(getattr(run.config().recipe, name) == value for name, value in recipe.items())
            ]
            curves.append(validations(run))
            line.append(f"{100 * curves[-1][-1]:.1f}")
        print(f"  {rate:>8}: {' '.join(line)}", flush=True)
    return curves, cost


def validations(run: Run) -> list[float]:
    """Return the top-1 (0 to 1) after each epoch; fail if one was validated twice or not at all."""
    with (run.folder / "metrics.csv").open() as file:
        rows = [
            (int(line["epoch"]), float(line["val_top1"])) for line in csv.DictReader(file) if line["val_top1"]
        ]
    assert [epoch for epoch, _ in rows] == list(range(len(rows))), (run.id, rows)
    return [top1 for _, top1 in rows]


def replay(curves: list[list[float]], best: float) -> None:
    """Replay ASHA over the curves of the grid in many orders, and print what becomes of the best point."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for rung in (1, FIRST_RUNG, 9):
        ended = [one_order(curves, best, rung, random.Random(order)) for order in range(ORDERS)]
        shares = [reached / len(curves) / EPOCHS for reached, _ in ended if reached]
        within = sum(share <= MOST for share in shares)
        median, reach = statistics.median(shares or [math.nan]), len(shares) / ORDERS
        epochs = statistics.mean(total for _, total in ended) / len(curves) / EPOCHS
        print(
            f"replay of {ORDERS} orders, first rung after {rung} epochs: "
            f"{reach:.0%} reach {100 * best:.2f} %, in the median after {median:.2f} of the grid's epochs; "
            f"{within / ORDERS:.0%} after {MOST} at most; all trials take {epochs:.2f}",
            flush=True,
        )


def one_order(
    curves: list[list[float]], best: float, rung: int, generator: random.Random
) -> tuple[int | None, int]:
    """Return the epochs of all trials until one reached `best`, if it did, and to the end of all trials."""
    study = optuna.create_study(direction="maximize", pruner=pruner("asha", rung))
    left = generator.sample(curves, len(curves))
    workers = [(generator.random(), number) for number in range(WORKERS)]
    trials: dict[int, tuple[optuna.Trial, list[float], int]] = {}
    reached, total = None, 0
    while workers:
        workers.sort()
        now, number = workers.pop(0)
        if number not in trials:
            if not left:
                continue
            trials[number] = (study.ask(), left.pop(), 0)
        trial, curve, done = trials.pop(number)
        done, total = done + 1, total + 1
        trial.report(curve[done - 1], done)
        if done == EPOCHS:
            study.tell(trial, curve[-1])
            reached = total if reached is None and curve[-1] >= best else reached
        elif trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            trials[number] = (trial, curve, done)
        workers.append((now + generator.uniform(0.9, 1.1), number))
    return reached, total


def preempt(site: Site, workspace: str, files: StudyFiles) -> list[str]:
    """Preempt two workers whose trials have a checkpoint; return their runs."""
    victims: list[str] = []
    while len(victims) < PREEMPTED:
        records = files.records()
        if sum(each.ended for each in records) == files.target:
            break
        for record in records:
            last = site.folder / workspace / "runs" / record.run / "checkpoints/last.ckpt"
            if record.state == "running" and record.worker not in victims and last.exists():
                row = next(row for row in site.rows(workspace, "search") if row["run"] == record.worker)
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


def search(site: Site, trials: int, seed: int, best: float) -> tuple[float, float, list[str]]:
    """Search; return CPU times in s, until a trial reached `best` and of the whole, and the victims."""
    workspace = f"search{seed}"
    meter = CpuMeter(site.folder / workspace)
    meter.start()
    space = [
        f"recipe.{name}=tag(log,interval({low:g},{high:g}))"
        for name, (low, high) in (("learning_rate", RATES), ("weight_decay", DECAYS))
    ]
    settings = (
        f"search.trials={trials}",
        f"search.parallel={WORKERS}",
        f"search.seed={seed}",
        "search.name=study",
    )
    site.command("+search=asha", *TRAINING, site.data, *space, *settings, workspace=workspace)
    files = StudyFiles(RunStore(site.folder / workspace), "study")
    victims = preempt(site, workspace, files)
    reached = float("nan")

    def over() -> bool:
        nonlocal reached
        records = files.records()
        tops = [each.top1 or 0.0 for each in records if each.state == "finished"]
        if reached != reached and tops and max(tops) >= best:
            reached = meter.seconds
            at = sum(each.epochs or 0 for each in records)
            print(
                f"a trial has ended with {100 * max(tops):.2f} % after {at} epochs of all trials", flush=True
            )
        return len(records) == trials and all(each.ended for each in records)

    until(over)
    until(lambda: all(row["state"] not in ("queued", "running") for row in site.rows(workspace, "search")))
    return reached, meter.seconds, victims


def check(site: Site, workspace: str, points: int, victims: list[str]) -> None:
    """Print what became of the trials, and how long workers were idle; fail if an epoch was lost."""
    store = RunStore(site.folder / workspace)
    records = StudyFiles(store, "study").records()
    states = [each.state for each in records]
    counts = ", ".join(f"{states.count(name)} {name}" for name in sorted(set(states)))
    epochs = sum(each.epochs or 0 for each in records)
    share = epochs / (points * EPOCHS)
    print(f"trials: {counts}; {epochs} epochs ({share:.2f} of the grid)", flush=True)
    tops = sorted((each.top1 or 0.0 for each in records if each.state == "finished"), reverse=True)
    print(f"top-1 of the finished trials: {' '.join(f'{100 * top:.2f}' for top in tops)} %")
    requeued = {row["run"]: row["requeued"] for row in site.rows(workspace, "search")}
    assert all(requeued[victim] == 1 for victim in victims), requeued
    for record in records:
        assert len(validations(store.run(record.run))) == record.epochs, record
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
    rung, idle = FIRST_RUNG * statistics.median(lasts), max(gaps, default=0)
    print(f"idle between two trials: {idle:.1f} s at most; the {FIRST_RUNG} epochs to a rung: {rung:.1f} s")


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=6, help="learning rates of the grid (6)")
    parser.add_argument(
        "--trials", type=int, default=18, help="trials of the search (18, as many as the grid)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="searches, each with a seed of its own (3)")
    options = parser.parse_args()
    memory = psutil.virtual_memory().total / 2**30
    name, cores = platform.processor() or platform.machine(), len(os.sched_getaffinity(0))
    print(f"{name}, {cores} CPU cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start")
    print(f"ASHA with {options.trials} trials, rungs at {rung_epochs(EPOCHS, WARMUP)} epochs")
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES), flush=True)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        site = Site(Path(folder))
        (site.folder / "small_network.py").write_text(NETWORK)
        with site.running():
            for stage in ("download", "process", "upload"):
                site.command(f"+stage={stage}", "dataset=digits", "cluster=foreground", workspace="data")
            curves, cost = grid(site, options.points)
            best = max(curve[-1] for curve in curves)
            print(f"grid: {cost:.0f} CPU-s, best top-1 {100 * best:.2f} %", flush=True)
            replay(curves, best)
            for seed in range(options.seeds):
                reached, whole, victims = search(site, options.trials, seed, best)
                print(
                    f"ASHA, seed {seed}: {reached:.0f} CPU-s until a trial reached it ({reached / cost:.2f} "
                    f"of the grid); {whole:.0f} CPU-s to the end of all trials ({whole / cost:.2f})"
                )
                check(site, f"search{seed}", len(curves), victims)


if __name__ == "__main__":
    main()
