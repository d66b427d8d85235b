"""Measure how long `jobs` takes in a workspace of 10,000 runs.

    python benchmarks/jobs.py [--runs 10000] [--repeats 5] [--folder FOLDER]

Makes the run folders in a temporary folder (`--folder`: on another file system, such as that of a cluster),
and starts the command as a user does, interpreter and imports included: without its cache file, with it,
after runs have ended, with filters, as JSON. The peer is `find runs -name outcome.json`, which visits the
same folders and reads no file. CPU seconds are shown as well, since they vary less on a busy machine.
Deletes everything.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import yaml

from hpc_imagenet.config.compose import compose
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED
from hpc_imagenet.runs.run_records import RecordCache
from hpc_imagenet.runs.store import FORMAT, RunStore

MODELS = ("resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "vit_b_16")
SWEEP = 100  # runs of each sweep


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))


@functools.cache
def frozen_config(model: str) -> str:
    """Return the content of config.yaml of a training, as the package freezes it."""
    overrides = ["dataset=imagenet", "cluster=slurm", "cluster.gpus_per_node=8", f"model={model}"]
    (config,) = compose([*overrides, "workspace=/w", "datastore.url=/d"])
    frozen = asdict(config)
    frozen["stage"]["name"] = "train"
    return yaml.safe_dump(frozen, sort_keys=False)


def make_run(runs: Path, number: int, active: bool, rng: random.Random) -> None:
    """Write the folder of one training as the package does, but without fsync, and in the past."""
    model, begin = rng.choice(MODELS), datetime.now(timezone.utc) - timedelta(minutes=20 * number + 60)
    time, folder = begin.isoformat(timespec="milliseconds"), runs / f"{number:08x}-{model}"
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    info = {"format": FORMAT, "stage": "train", "label": model, "model": model, "needs": [], "created": time}
    (folder / "config.yaml").write_text(frozen_config(model))
    write(folder / "run.json", info | {"sweeps": [f"seed-{number // SWEEP:06x}"]})
    write(attempt / "submitted.json", {"executor": "local", "time": time, "host": "elsewhere"})
    write(attempt / "started.json", {"time": time, "host": "n1", "nodes": "n[1-2]", "restarts": 0})
    progress = {"done": rng.random() * 115e6, "total": 115e6, "unit": "images", "rate": 2500.0, "top1": 0.5}
    write(folder / "progress.json", progress | {"note": "epoch 3/90", "time": time})
    if not active:
        state = rng.choices((FINISHED, FAILED, CANCELLED), (90, 8, 2))[0]
        result = {"top1": rng.random(), "epochs": 90, "images_per_second": 2500.0, "seconds": 46e3}
        outcome = {"state": state, "reason": "", "result": result}
        if state != FINISHED:
            outcome |= {"reason": "the loss of step 4711 is not finite", "result": None}
        write(attempt / "outcome.json", outcome | {"time": (begin + timedelta(minutes=19)).isoformat()})
    for path in (folder / "attempts", folder):  # the cache leaves out what has just changed
        os.utime(path, (begin.timestamp(), begin.timestamp()))


def measure(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Return the duration of a command and the CPU time that it used, in s."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--active", type=int, default=100, help="runs that have not ended")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for the temporary workspace")
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-jobs-", dir=options.folder) as folder:
        runs = Path(folder).resolve() / "runs"
        for number in range(options.runs):
            make_run(runs, number, number < options.active, rng)
        cache = RunStore(Path(folder).resolve()).own_folder / RecordCache.file
        env = {**os.environ, "HPC_IMAGENET_WORKSPACE": folder}
        jobs = [sys.executable, "-m", "hpc_imagenet", "jobs"]
        rows = (
            ("jobs, no cache file", jobs),
            ("jobs", jobs),
            ("jobs, 10 runs have ended", jobs),
            ("jobs --failed --since 2d", [*jobs, "--failed", "--since", "2d"]),
            ("jobs --json", [*jobs, "--json"]),
            ("jobs --help, which reads no run", [*jobs, "--help"]),
            ("peer: find runs -name outcome.json", ["find", str(runs), "-name", "outcome.json"]),
        )
        load = f"load {os.getloadavg()[0]:.1f} at the start"
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, {load}, Python {platform.python_version()}")
        print(f"{options.runs:,} runs, {options.active:,} of them active; {options.repeats} repeats")
        print(f"{'':36} {'median':>7} {'fastest':>7} {'slowest':>7} {'CPU':>7}  (s)")
        active = [next(runs.glob(f"{number:08x}-*")) for number in range(options.active)]
        for name, command in rows:
            measured = []
            for _ in range(options.repeats):
                if "no cache" in name:
                    cache.unlink(missing_ok=True)
                for run in [active.pop() for _ in range(10) if "ended" in name and active]:
                    write(run / "attempts/1/outcome.json", {"state": FINISHED, "result": {"top1": 0.7}})
                measured.append(measure(command, env))
            seconds, cpu = zip(*measured, strict=True)
            median, least, most = statistics.median(seconds), min(seconds), max(seconds)
            print(
                f"{name:36} {median:7.2f} {least:7.2f} {most:7.2f} {statistics.median(cpu):7.2f}", flush=True
            )


if __name__ == "__main__":
    main()
