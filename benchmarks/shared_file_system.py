"""Count what a training and the commands request of the shared file system; calculate 1,000 nodes.

    python benchmarks/shared_file_system.py [--folder DIR] [--tasks 2] [--nodes 1000] [--tasks-there 8]

Trainings of one and of three epochs run under strace, as one task and as the tasks of two nodes, which are
processes of this machine with the environment that srun gives them. A checkpoint is written after every
epoch, so half of the difference is an epoch with its checkpoint, and the rest is the start. Calls are
counted by place: the tasks' records of their usage, other files of the run, the datastore, the code, the
Python environment. Other files are local to a node. Failed calls count too; of those on open files only
reads, writes and fsync. Mapped libraries are not counted.

The calculation is rank 0 + (tasks - 1) x another task, from the training on two nodes. It is an upper
limit: a node with a cache queries the server once for each of the different paths, whatever the number of
its tasks. Usage is left out: it is written by the clock, at most ten times a second by all tasks.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from share_loader import make

from hpc_imagenet.config.compose import compose
from hpc_imagenet.runs.store import RunStore

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("usage", "run", "datastore", "code", "environment")
COLUMNS = ("opens", "stats", "lists", "paths", "changes", "fsyncs", "kB read", "kB written")
EPOCHS = (1, 3)
PATH_CALLS = {
    **dict.fromkeys(("open", "openat", "openat2", "execve"), "opens"),
    **dict.fromkeys(("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2"), "stats"),
    **dict.fromkeys(("readlink", "readlinkat", "statfs", "getxattr", "lgetxattr", "utimensat"), "stats"),
    **dict.fromkeys(("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"), "changes"),
    **dict.fromkeys(("unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "chmod", "fchmodat"), "changes"),
}
KINDS = PATH_CALLS | {
    **dict.fromkeys(("fsync", "fdatasync"), "fsyncs"),
    **dict.fromkeys(("read", "pread64", "readv", "preadv"), "kB read"),
    **dict.fromkeys(("write", "pwrite64", "writev", "pwritev"), "kB written"),
    "getdents64": "lists",
}
SETTINGS = (
    *("dataset=digits", "recipe=demo", "datastore.name=bench", "model=squeezenet1_1", "tracker=null"),
    *("recipe.size=32", "recipe.val_size=32", "recipe.val_resize=32", "recipe.global_batch=32"),
    *("cluster=foreground", "+datastore.version=1", "+datastore.content=0", "loader.workers=1"),
)
CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)")
Counts = dict[str, Counter[str]]  # by place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--tasks", type=int, default=2, help="tasks of a node that is measured")
    parser.add_argument("--nodes", type=int, default=1000, help="nodes that are calculated")
    parser.add_argument("--tasks-there", type=int, default=8, help="tasks of a node that is calculated")
    options = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder / "stores" / "bench", 128)
        for nodes, tasks in ((1, 1), (2, options.tasks)):
            phases = measure(folder, nodes, tasks)
            for phase, ranks in phases.items():
                print_table(f"{nodes} x {tasks} tasks, {phase}: rank 0", ranks[0])
                if len(ranks) > 1:
                    print_table(f"{nodes} x {tasks} tasks, {phase}: another task", mean(ranks[1:]))
        others = options.nodes * options.tasks_there - 1
        for phase, ranks in phases.items():
            for counts in ranks:
                counts["usage"].clear()  # written by the clock, at most ten times a second by all tasks
            title = f"{options.nodes:,} x {options.tasks_there} tasks, {phase}: calculated, all tasks"
            print_table(title, add(ranks[0], mean(ranks[1:]), others))
        for command in (["jobs"], ["jobs", "--json"], ["show", "0"]):
            counts = trace([sys.executable, "-m", "hpc_imagenet", *command, f"workspace={folder}"], folder)
            print_table(f"{' '.join(command)}, 1 run", counts)


def measure(folder: Path, nodes: int, tasks: int) -> dict[str, list[Counts]]:
    """Return the counts of each task by phase of the training."""
    short, long = (train(folder, nodes, tasks, epochs) for epochs in EPOCHS)
    distance = EPOCHS[1] - EPOCHS[0]
    epochs = [scale(add(b, a, -1), 1 / distance) for a, b in zip(short, long, strict=True)]
    starts = [add(a, epoch, -EPOCHS[0]) for a, epoch in zip(short, epochs, strict=True)]
    return {"start": starts, "an epoch and its checkpoint": epochs}


def train(folder: Path, nodes: int, tasks: int, epochs: int) -> list[Counts]:
    """Train on so many nodes, and return the counts of each task."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (config,) = compose(
        [*SETTINGS, f"workspace={folder}", f"datastore.url={folder}/stores", f"recipe.epochs={epochs}"]
    )
    frozen = asdict(config)
    frozen["stage"]["name"] = "train"
    run = RunStore(folder).create(
        "0" * 8, frozen, {"stage": "train", "label": "bench", "model": "bench", "needs": []}
    )
    attempt = run.new_attempt()
    attempt.submit("slurm", job_id="1")
    command = [sys.executable, "-m", "hpc_imagenet.launch.tasks.task", str(run.folder), str(attempt.number)]
    with ThreadPoolExecutor(nodes * tasks) as threads:
        environments = [task_environment(rank, nodes, tasks) for rank in range(nodes * tasks)]
        found = list(threads.map(lambda variables: trace(command, folder, variables), environments))
    if not attempt.outcome or attempt.outcome.state != "finished":
        raise SystemExit(f"the training failed: {attempt.outcome}")
    return found


def task_environment(rank: int, nodes: int, tasks: int) -> dict[str, str]:
    """Return what srun sets for a task, as far as the package reads it."""
    values = {"JOB_ID": 1, "STEP_ID": 0, "PROCID": rank, "NTASKS": nodes * tasks, "NNODES": nodes}
    values |= {"LOCALID": rank % tasks, "NODEID": rank // tasks, "CPUS_PER_TASK": 1}
    named = {f"SLURM_{name}": str(value) for name, value in values.items()}
    return {**named, "SLURM_JOB_NODELIST": "127.0.0.1"}


def trace(command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None) -> Counts:
    """Run a command under strace, and return its counts.

    Raises:
        SystemExit: it failed, or there is no strace.
    """
    with tempfile.TemporaryDirectory() as output:
        names = "trace=%file," + ",".join(KINDS.keys() - PATH_CALLS)
        strace = ["strace", "-ff", "-qq", "-y", "-s0", "--seccomp-bpf", "-e", names, "-o", f"{output}/log"]
        environment = {**os.environ, **(variables or {}), "PYTHONPATH": str(ROOT), "TMPDIR": output}
        done = subprocess.run(
            [*strace, *command], env=environment, capture_output=True, text=True, cwd="/", check=False
        )
        if done.returncode:
            raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
        counts: Counts = {place: Counter() for place in PLACES}
        seen: set[str] = set()
        for log in Path(output).glob("log.*"):
            for line in log.read_text(errors="replace").splitlines():
                count(line, folder, counts, seen)
    return counts


def count(line: str, folder: Path, counts: Counts, seen: set[str]) -> None:
    """Add a call of strace's log to the counts of the place that it concerns. `seen`: paths until now."""
    match = CALL.match(line)
    if match is None or match[1] not in KINDS:
        return
    kind, result = KINDS[match[1]], int(match[3], 0)
    names = re.findall(r'"([^"]*)"', match[2]) if match[1] in PATH_CALLS else []
    opened = re.findall(r"<([^>]*)>", match[2])
    if match[1] in PATH_CALLS and not (names and names[-1]):  # a call on an open file, such as fstat
        return
    path = str(Path(opened[0] if opened else "/", names[-1])) if names else (opened or ["/dev/null"])[0]
    place = place_of(path, folder)
    if place is None:
        return
    counts[place][kind] += max(0, result) / 1e3 if kind.startswith("kB") else 1
    if names and path not in seen:
        seen.add(path)
        counts[place]["paths"] += 1


def place_of(path: str, folder: Path) -> str | None:
    """Return the shared place of a path; None: it is local to a node."""
    if path.startswith(f"{folder}/") and "/usage/" in f"{path}/":
        return "usage"
    for place, prefixes in {
        "run": [folder / "runs"],
        "datastore": [folder / "stores"],
        "code": [ROOT / "hpc_imagenet", ROOT / "conf"],
        "environment": [sys.prefix, os.path.realpath(sys.prefix), sys.base_prefix],
    }.items():
        if any(f"{path}/".startswith(f"{prefix}/") for prefix in prefixes):
            return place
    return None


def add(one: Counts, other: Counts, times: float = 1) -> Counts:
    """Return one + times x other."""
    return {
        place: Counter({column: one[place][column] + times * other[place][column] for column in COLUMNS})
        for place in PLACES
    }


def scale(counts: Counts, factor: float) -> Counts:
    """Return the counts multiplied by a factor."""
    return add({place: Counter() for place in PLACES}, counts, factor)


def mean(counts: Sequence[Counts]) -> Counts:
    """Return the mean of the counts of several tasks."""
    return scale(functools.reduce(add, counts), 1 / len(counts))


def print_table(title: str, counts: Counts) -> None:
    """Print one line per place that was used."""
    print(f"\n{title}\n{'':12}" + "".join(f"{column:>14}" for column in COLUMNS))
    for place, found in counts.items():
        if any(round(value) for value in found.values()):
            print(
                f"{place:12}" + "".join(f"{max(0, round(found[column])):14,}" for column in COLUMNS),
                flush=True,
            )


if __name__ == "__main__":
    main()
