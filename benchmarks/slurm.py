"""Measure the Slurm path: start of the lab, array submission, `jobs`, first step after a requeue.

    python benchmarks/slurm.py [--repeats 5]

It starts a private Slurm cluster (slurm/lab) and stops it again. The peers are submitit's own methods to
submit a hundred functions, on the same cluster in the same run; commands alternate. Every measurement
starts a process, as a user does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil
from lab_site import LAB, LabSite

from hpc_imagenet.config.compose import compose
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore

JOBS, RUNS = 100, 1000
PACKAGES = ("hpc-imagenet", "submitit", "hydra-core", "torch")
TRAINING = ("dataset=digits", "model=squeezenet1_1", "cluster=lab")

PEER = """
import sys, time, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(time=10, partition="debug", wckey=None, additional_parameters={"hold": True})
if sys.argv[2] == "map_array":
    jobs = executor.map_array(time.sleep, [0] * 100)
else:
    jobs = [executor.submit(time.sleep, 0) for _ in range(100)]
print(len(jobs))
"""


@dataclass
class Row:
    """A measurement and its times."""

    name: str
    measure: Callable[[int], float]  # s, by repetition
    peer: str = ""  # the row to compare with
    seconds: list[float] = field(default_factory=list)


class Site(LabSite):
    """A lab, and what is measured on it."""

    def up(self, _: int = 0) -> float:
        """Start another lab in a new folder, and stop it again."""
        with tempfile.TemporaryDirectory(prefix="lab-") as folder:
            seconds = self.run(str(LAB), "--dir", folder, "up")[0]
            self.run(str(LAB), "--dir", folder, "down")
        return seconds

    def clear(self) -> None:
        """Cancel all jobs except those of `make_runs`."""
        self.run("scancel", "--partition=debug")
        while self.run("squeue", "--noheader", "--partition=debug")[1]:
            time.sleep(0.2)

    def array(self, repeat: int) -> float:
        """Submit a hundred trainings; held, so that none of them starts."""
        seeds = f"seed=range({1000 + JOBS * repeat},{1000 + JOBS * (repeat + 1)})"
        seconds, output = self.command("-m", *TRAINING, seeds, "+cluster.sbatch.hold=true")
        assert output.count("submitted") == JOBS, output
        self.clear()
        return seconds

    def submitit(self, how: str) -> float:
        """Submit a hundred functions with submitit alone."""
        seconds, output = self.run(sys.executable, "-c", PEER, str(self.folder / "submitit"), how)
        assert output.strip() == str(JOBS), output
        self.clear()
        return seconds

    def make_runs(self) -> None:
        """Make a thousand runs, of which the last hundred are queued."""
        overrides = [*TRAINING, f"workspace={self.folder / 'recorded'}"]
        (job,) = make_plan(compose(overrides), lambda _: None)
        store = RunStore(self.folder / "recorded")
        for number in range(RUNS - JOBS):
            info = {"stage": job.stage, "label": job.label, "model": job.model, "needs": []}
            attempt = store.create(f"{number:08x}-{job.label}", job.frozen(), info).new_attempt()
            attempt.submit("slurm", job_id="1")
            attempt.start()
            attempt.end(FINISHED, result={"top1": number / RUNS, "images_per_second": 1.0, "seconds": 60.0})
        url = f"datastore.url={self.folder / 'workspace/datastores'}"
        held = ("cluster.partition=high", "+cluster.sbatch.hold=true")
        self.command("-m", *TRAINING, f"seed=range({JOBS})", url, *held, workspace="recorded")

    def jobs(self, *words: str) -> float:
        """List the runs of `make_runs`."""
        seconds, output = self.command("jobs", *words, workspace="recorded")
        assert output.count("squeezenet1_1") >= RUNS, output
        return seconds

    def requeue(self, repeat: int) -> float:
        """Requeue a running training and wait for its next step; s from the start time that Slurm reports."""
        settings = ("recipe.epochs=500", "train.checkpoint_every_minutes=0.02", f"seed={repeat}")
        self.command(*TRAINING, *settings)
        run = self._training(repeat)
        self._until(lambda: (run / "checkpoints/last.ckpt").exists())
        job = (read_json(run / "attempts/1/submitted.json") or {})["job_id"]
        self.run("scontrol", "requeue", job)
        self._until(lambda: (read_json(run / "attempts/1/started.json") or {})["restarts"] == 1)
        before = read_json(run / "progress.json") or {}
        self._until(lambda: (read_json(run / "progress.json") or {}).get("done", 0) > before["done"])
        first = datetime.fromisoformat((read_json(run / "progress.json") or {})["time"]).timestamp()
        output = self.run("squeue", "--noheader", f"--jobs={job}", "--Format=StartTime:30")[1].strip()
        self.run("scancel", job)
        self.clear()
        return first - datetime.fromisoformat(output).timestamp()

    def _training(self, seed: int) -> Path:
        rows = json.loads(self.command("jobs", "--json")[1])
        return next(
            Path(row["dir"])
            for row in rows
            if row["stage"] == "train"
            and RunStore(self.folder / "workspace").run(row["run"]).config().seed == seed
        )

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not condition():
            if time.monotonic() > end:
                raise SystemExit("a training on the lab makes no progress")
            time.sleep(0.05)


def rows(site: Site) -> list[Row]:
    each, at_once = f"submitit: submit, {JOBS} times", f"submitit: map_array of {JOBS}"
    return [
        Row("lab up, from nothing to all nodes idle", site.up),
        Row(each, lambda _: site.submitit("submit")),
        Row(at_once, lambda _: site.submitit("map_array"), each),
        Row(f"-m seed=range({JOBS}) cluster=lab", site.array, each),
        Row(f"jobs, {RUNS:,} runs, {JOBS} in the queue", lambda _: site.jobs()),
        Row("first step after a requeue, from the node's start", site.requeue),
    ]


def show(table: list[Row], repeats: int) -> None:
    medians = {row.name: statistics.median(row.seconds) for row in table}
    width = max(map(len, medians))
    print(f"{'seconds':{width}}  median     min     max  / submit   ({repeats} times each)")
    for row in table:
        found = (medians[row.name], min(row.seconds), max(row.seconds))
        ratio = f"{medians[row.name] / medians[row.peer]:10.2f}" if row.peer else ""
        print(f"{row.name:{width}}  {'  '.join(f'{value:6.2f}' for value in found)}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="times each is measured (5)")
    options = parser.parse_args()
    memory = psutil.virtual_memory().total / 2**30
    name, load = platform.processor() or platform.machine(), os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    print(f"{name}, {cores} CPU cores, {memory:.0f} GiB, load {load:.1f} at the start")
    versions = (f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    slurm = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"Python {platform.python_version()}", slurm, *versions, sep=", ")
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        site = Site(Path(folder))
        with site.running():
            for stage in ("download", "process", "upload"):
                site.command(f"+stage={stage}", "dataset=digits", "cluster=foreground")
            site.make_runs()
            table = rows(site)
            for repeat in range(options.repeats):
                for row in table:
                    row.seconds.append(row.measure(repeat))
    show(table, options.repeats)


if __name__ == "__main__":
    main()
