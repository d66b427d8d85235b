"""Compare prices with what the trainings then take.

    python benchmarks/price.py [--rounds 3] [--workspace DIR]

Prices trainings of the digits (other models, epochs, batches and image sizes) from short price jobs, and runs
them. Each round prices and trains every case once, so that both are measured under the same load, and takes a
new seed, so that nothing is finished already. The CPU time is that of the operating system for the task's
process and its children, without the command line; the wall time is that from the start of the process to its
outcome. On a machine that others use too, compare the CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from rich.console import Console

from hpc_imagenet.cli.price_plan import plan_prices
from hpc_imagenet.cli.submit import prepare
from hpc_imagenet.config.compose import compose
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.runs.time_record import Time, times_folders

CASES = {
    "shufflenet_v2_x0_5, 8 epochs, batch 64": ("model=shufflenet_v2_x0_5",),
    "squeezenet1_1, 12 epochs, batch 32": (
        *("model=squeezenet1_1", "recipe.epochs=12", "recipe.global_batch=32"),
    ),
    "mobilenet_v3_small, 6 epochs, batch 128": (
        *("model=mobilenet_v3_small", "recipe.epochs=6", "recipe.global_batch=128"),
    ),
    "resnet18, 6 epochs, 8 to 16 px, batch 64": (
        *("model=resnet18", "recipe.epochs=6", "recipe.start_size=8", "recipe.grow_from=2"),
        "recipe.grow_to=4",
    ),
}
FIXED = ("dataset=digits", "cluster=foreground", "cluster.gpus_per_node=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workspace", type=Path, help="folder with a datastore of the digits, or a new one")
    options = parser.parse_args()
    sys.stdout = os.fdopen(os.dup(1), "w")  # of the table alone: a price job prints to the descriptor itself
    os.dup2(2, 1)
    folder = options.workspace or Path(tempfile.mkdtemp(prefix="price-"))
    try:
        compare(folder, options.rounds)
    finally:
        if options.workspace is None:
            shutil.rmtree(folder)


def compare(folder: Path, rounds: int) -> None:
    """Print a line for each case: the medians of its rounds, and of predicted / real."""
    workspace = f"workspace={folder}"
    for stage in ("download", "process", "upload"):
        command_line(f"+stage={stage}", *FIXED, workspace)
    found: dict[str, list[tuple[Time, Time]]] = {name: [] for name in CASES}
    with contextlib.suppress(KeyboardInterrupt):  # prints what has been measured until then
        for seed, (name, words) in itertools.product(range(rounds), CASES.items()):
            pair = predicted_and_real(folder, (*FIXED, *words, workspace, f"seed={1000 + seed}"))
            found[name].append(pair)
            times = f"CPU {pair[0].cpu:.1f} {pair[1].cpu:.1f}, wall {pair[0].wall:.1f} {pair[1].wall:.1f}"
            print(f"{name}: {times}", file=sys.stderr, flush=True)
    measured = len(next(iter(found.values())))
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs"
    print(f"medians of {measured} rounds, price job and training in turn; {load}")
    print(f"{'training':42}{'CPU s':>8}{'real':>8}{'ratio':>7}{'wall s':>8}{'real':>8}{'ratio':>7}")
    for name, pairs in found.items():
        cells = ""
        for kind in ("cpu", "wall") if pairs else ():
            one, other = ([getattr(pair[i], kind) for pair in pairs] for i in (0, 1))
            ratio = statistics.median(a / b for a, b in zip(one, other, strict=True))
            cells += f"{statistics.median(one):8.1f}{statistics.median(other):8.1f}{ratio:7.2f}"
        print(f"{name:42}{cells}")


def predicted_and_real(folder: Path, words: tuple[str, ...]) -> tuple[Time, Time]:
    """Price one training from a new price job, run it, and return both times."""
    for records in times_folders(folder / "runs"):
        shutil.rmtree(records)
    prepared = prepare(compose(words))
    with Path(os.devnull).open("w") as quiet:
        (price,) = plan_prices(prepared, Console(file=quiet))
    together = command_line(*words)
    attempt = RunStore(folder).run(price.job.run_id).attempt
    assert attempt
    assert attempt.outcome
    wall = datetime.fromisoformat(attempt.outcome.time).timestamp() - float(attempt.started["born"])
    return price.total, Time(wall, together - command_line(*words))  # the second time it is finished already


def command_line(*words: str) -> float:
    """Run a command and return the CPU s of it and of its children."""
    command = [sys.executable, "-m", "hpc_imagenet", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {json.dumps(command)}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
