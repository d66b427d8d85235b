"""Measure the way from ILSVRC archives to a dataset that a loader reads, beside common tools.

    python benchmarks/process.py [--train 8000] [--val 1000] [--folder DIR] [--peers PYTHON] [--repeats 3]

The archives are made by shaped.py: JPEGs of 500 x 375 px and 105 kB, in the layout of the real ones. Every
tool starts from them, in the page cache; tools alternate, so that a busy moment affects all of them. Times
are of the work alone, without Python's start and imports, except in one row that names it. Ours end with
fsync, the others do not, except those with `sync`. Ratios are those of images/s. `--peers` is an interpreter
with webdataset and litdata, if this one lacks them. A tool that hangs is killed after ten minutes.

The last rows index archives of ImageNet's full count: headers and ends of 1,331,167 images in sparse files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from limited import LIMIT, TIMED_OUT, finish, run_limited, start
from PIL import features
from process_ways import BASH, GNU_TAR, LITDATA, OURS, SINGLE, TORCHVISION, WEBDATASET
from shaped import link_archives, make_archives, make_hollow, prepare_val

from hpc_imagenet.data.ilsvrc import ilsvrc_writer

FULL = (1_281_167, 50_000, 1000)  # images of train and of val, classes
PACKAGES = ("hpc-imagenet", "numpy", "pillow", "torch", "torchvision")
SAMPLE = 400  # images in the rows of single images

Spent = tuple[float, float]  # s of wall clock, and s of CPU


@dataclass
class Row:
    """A tool and its measured times."""

    name: str
    act: Callable[[], Spent | str]  # or why it cannot run
    images: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    why: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        """In s."""
        return statistics.median(self.seconds)


class Bench:
    """Archives, a workspace with them, and an output folder for the tools."""

    def __init__(self, folder: Path, train: int, val: int, classes: int, peers: str) -> None:
        self.source, self.workspace, self.out = folder / "source", folder / "workspace", folder / "out"
        self.train, self.val, self.peers = train, val, peers
        self.images = train + val
        make_archives(self.source, train, val, classes)
        link_archives(self.source, self.workspace)
        self.prepare = folder / "prepare.sh"
        self.prepare.write_text(prepare_val(self.source, classes, val))
        self.index = folder / "train.npy"

    def clean(self) -> None:
        """Delete the output of the last tool, and sync the disk."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.workspace / "datasets", ignore_errors=True)
        self.out.mkdir()
        os.sync()

    def ours(self, *settings: str, tasks: int = 1) -> Spent | str:
        """Run the process stage; with several tasks as so many processes and one that puts together."""
        if tasks == 1:
            return self.python(OURS, str(self.workspace), "", "1", "process.workers=1", *settings)
        parts = [
            start([sys.executable, "-c", OURS, str(self.workspace), str(part), str(tasks), *settings])
            for part in range(tasks)
        ]
        output = [spent(finish(part, LIMIT).stdout) for part in parts]
        last = self.python(OURS, str(self.workspace), "", str(tasks), *settings)
        if isinstance(last, str):
            return last
        return max(wall for wall, _ in output) + last[0], sum(cpu for _, cpu in output) + last[1]

    def python(self, code: str, *arguments: str, interpreter: str = sys.executable) -> Spent | str:
        """Return what `code` prints, or the last line of what it complains of."""
        done = run_limited([interpreter, "-c", code, *arguments], LIMIT)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["failed"])[-1]
        return spent(done.stdout)

    def command(self) -> Spent:
        """Run the whole command, as a user types it."""
        words = ["dataset=ilsvrc", "dataset.name=x", f"dataset.source={self.source}", "cluster=foreground"]
        result = timed(
            [sys.executable, "-m", "hpc_imagenet", "+stage=process", *words, f"workspace={self.workspace}"]
        )
        shutil.rmtree(self.workspace / "runs")
        return result

    def bash(self, script: str) -> Spent:
        """Run a shell script."""
        text = script.format(
            out=self.out,
            source=self.source,
            train=ilsvrc_writer.TRAIN,
            val=ilsvrc_writer.VAL,
            prepare=self.prepare,
        )
        return timed(["bash", "-c", text])

    def torchvision(self) -> Spent | str:
        """Let torchvision extract, in a folder of links to the archives."""
        for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT):
            (self.out / file).symlink_to(self.source / file)
        return self.python(TORCHVISION, str(self.out))

    def copy(self, sync: bool = False) -> Spent:
        """Copy the archives with cp, and flush the copies if `sync`."""
        archives = " ".join(str(self.source / file) for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL))
        flush = f" && sync {self.out}/*" * sync
        return timed(["sh", "-c", f"cp {archives} {self.out}{flush}"])

    def writer(self, code: str) -> Spent | str:
        """Let a package write its own format from the images at their addresses."""
        shards = [str(self.source / file) for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)]
        return self.python(code, str(self.index), *shards, str(self.out), interpreter=self.peers)

    def single(self, way: str) -> Spent | str:
        """Process single images one after another, on one core."""
        shards = [str(self.source / file) for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)]
        return self.python(SINGLE, str(self.index), *shards, str(SAMPLE), way)


def spent(output: str) -> Spent:
    """Parse the two numbers that a process printed last."""
    wall, cpu = output.strip().splitlines()[-1].split()
    return float(wall), float(cpu)


def timed(command: list[str]) -> Spent:
    """Run a command; return its wall time and the CPU time of it and its children, in s."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run_limited(command, LIMIT).check_returncode()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(bench: Bench) -> list[Row]:
    small = "process.shard_size=0.25"
    return [
        Row("bash script: tar, tar of each class, mv", lambda: bench.bash(BASH), bench.images),
        Row("torchvision's parse_*_archive", bench.torchvision, bench.images),
        Row("GNU tar --to-command", lambda: bench.bash(GNU_TAR), bench.images),
        Row("cp of the archives", bench.copy, bench.images),
        Row("cp of the archives, sync", lambda: bench.copy(sync=True), bench.images),
        Row("webdataset's ShardWriter (train)", lambda: bench.writer(WEBDATASET), bench.train),
        Row("litdata's optimize, 1 worker (train)", lambda: bench.writer(LITDATA), bench.train),
        Row("index", lambda: bench.ours("process.layout=index"), bench.images),
        Row("index, the whole command", bench.command, bench.images),
        Row("folders, 1 task", lambda: bench.ours("process.layout=folders"), bench.images),
        Row(
            "folders, 2 tasks",
            lambda: bench.ours("process.layout=folders", "process.workers=1", "process.tasks=2", tasks=2),
            bench.images,
        ),
        Row("shards, 1 task", lambda: bench.ours("process.layout=shards", small), bench.images),
        Row(
            "shards, 2 tasks",
            lambda: bench.ours("process.layout=shards", small, "process.workers=1", tasks=2),
            bench.images,
        ),
        Row(
            "shards, shuffled, 1 task",
            lambda: bench.ours("process.layout=shards", small, "process.order=shuffled"),
            bench.images,
        ),
        Row("short side 256, Pillow, 1 core", lambda: bench.single("pillow"), SAMPLE),
        Row("short side 256, torchvision, 1 core", lambda: bench.single("torchvision"), SAMPLE),
        Row("short side 256, ours, 1 core", lambda: bench.single("ours"), SAMPLE),
        Row("process.check=decode, 1 core", lambda: bench.single("decode"), SAMPLE),
        Row("restart markers by jpegtran, 1 core", lambda: bench.single("tile"), SAMPLE),
    ]


def full_count(folder: Path, repeats: int) -> list[Row]:
    """Index archives of ImageNet's count with one CPU and with all; memory is that of all processes."""
    make_hollow(folder / "hollow", *FULL)
    workspace = folder / "full"
    link_archives(folder / "hollow", workspace, hashed=False)
    table = []
    for workers in ("1", str(len(os.sched_getaffinity(0)))):
        row = Row(f"index of {sum(FULL[:2]):,} images, {workers} process", lambda: "", sum(FULL[:2]))
        peaks = []
        for _ in range(repeats):
            shutil.rmtree(workspace / "datasets", ignore_errors=True)
            os.sync()
            seconds, peak = watched(
                [sys.executable, "-c", OURS, str(workspace), "", "1", f"process.workers={workers}"]
            )
            row.seconds.append(seconds[0])
            row.cpu.append(seconds[1])
            peaks.append(peak)
        size = (workspace / "datasets" / "x" / "train.npy").stat().st_size
        row.note = f"{max(peaks) / 1e6:.0f} MB of memory at most, train.npy {size / 1e6:.1f} MB"
        table.append(row)
    return table


def watched(command: list[str], seen: Callable[[psutil.Process], object] | None = None) -> tuple[Spent, int]:
    """Return the times that a command prints, and the peak memory of its processes together, in bytes.

    Args:
        command: the command.
        seen: called with its process, many times a second.
    """
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    peak = 0
    while child.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):
            whole = psutil.Process(child.pid)
            peak = max(peak, sum(resident(one) for one in (whole, *whole.children(recursive=True))))
            if seen is not None:
                seen(whole)
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"{command} failed")
    assert child.stdout is not None
    return spent(child.stdout.read().decode()), peak


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process, with its mapped pages of archives and libraries."""
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def measure(bench: Bench, table: list[Row], repeats: int) -> None:
    bench.clean()
    result = bench.ours("process.layout=index")
    if isinstance(result, str):
        raise SystemExit(result)
    shutil.copy(bench.workspace / "datasets" / "x" / "train.npy", bench.index)
    with contextlib.suppress(KeyboardInterrupt):  # shows the measurements until then
        _measure(bench, table, repeats)


def _measure(bench: Bench, table: list[Row], repeats: int) -> None:
    for _ in range(repeats):
        for row in table:
            if row.why:
                continue
            bench.clean()
            try:
                result = row.act()
            except subprocess.TimeoutExpired:
                result = TIMED_OUT  # not measured again: it is likely to hang again
            if isinstance(result, str):
                row.why = result
            else:
                row.seconds.append(result[0])
                row.cpu.append(result[1])


def show(table: list[Row]) -> None:
    rates = {row.name: row.images / row.median for row in table if row.seconds}
    bash, copied = (rates.get(table[number].name, math.nan) for number in (0, 3))
    width = max(len(row.name) for row in table)
    print(f"{'':{width}}  median s     min     max   CPU s  images/s    x bash      x cp")
    for row in table:
        if not row.seconds:
            print(f"{row.name:{width}}  {row.why or 'not measured'}")
            continue
        rate = rates[row.name]
        ratios = "" if row.images == SAMPLE else f"{rate / bash:10.2f}{rate / copied:10.2f}"
        print(
            f"{row.name:{width}}  {row.median:8.3f}{min(row.seconds):8.3f}{max(row.seconds):8.3f}"
            f"{statistics.median(row.cpu):8.3f}{rate:10,.0f}{ratios}  {row.note}".rstrip()
        )
    print()
    for mine, theirs in (
        ("index", "shards, 1 task"),
        ("shards, 1 task", "cp of the archives"),
        ("shards, 1 task", "cp of the archives, sync"),
        ("shards, 1 task", "webdataset's ShardWriter (train)"),
        ("shards, 2 tasks", "webdataset's ShardWriter (train)"),
        ("shards, 1 task", "litdata's optimize, 1 worker (train)"),
        ("short side 256, ours, 1 core", "short side 256, Pillow, 1 core"),
        ("short side 256, ours, 1 core", "short side 256, torchvision, 1 core"),
    ):
        if mine in rates and theirs in rates:
            print(f"{mine}: {rates[mine] / rates[theirs]:.2f} x the images/s of {theirs}")


def machine(folder: Path) -> Iterator[str]:
    memory, load = psutil.virtual_memory().total / 2**30, os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()
    yield f"{platform.machine()}, {cores} CPU cores, {memory:.0f} GiB, {kind}, load {load:.1f} at the start"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    yield f"Python {platform.python_version()}, {', '.join(versions)}"
    yield f"libjpeg-turbo {features.version('libjpeg_turbo')}"


def versions_of_peers(interpreter: str) -> str:
    code = (
        "import importlib.metadata as m\nfor p in ('webdataset', 'litdata'):\n try: print(p, m.version(p))\n"
    )
    code += " except m.PackageNotFoundError: print(p, 'is not installed')"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
    return ", ".join(done.stdout.split("\n")).strip(", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", type=int, default=8000, help="images of train (8000)")
    parser.add_argument("--val", type=int, default=1000, help="images of val (1000)")
    parser.add_argument("--classes", type=int, default=40, help="classes (40)")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--peers", default=sys.executable, help="an interpreter with webdataset and litdata")
    parser.add_argument("--repeats", type=int, default=3, help="times each way is measured (3)")
    parser.add_argument("--only", nargs="*", default=[""], help="measure only ways with these in their names")
    parser.add_argument("--full", action="store_true", help="also index the full count; takes 10 GB of disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-process-", dir=options.folder) as name:
        folder = Path(name).resolve()
        print(*machine(folder), versions_of_peers(options.peers), sep="\n")
        bench = Bench(folder, options.train, options.val, options.classes, options.peers)
        size = sum(path.stat().st_size for path in bench.source.iterdir())
        print(
            f"{options.train:,} + {options.val:,} images, {size / 1e9:.2f} GB; {options.repeats} times each\n"
        )
        table = rows(bench)
        for row in table:
            row.why = "" if any(word in row.name for word in options.only) else "left out"
        measure(bench, table, options.repeats)
        bench.clean()
        if options.full:
            table += full_count(folder, options.repeats)
        show(table)


if __name__ == "__main__":
    main()
