"""Measure images/s of loaders per core, beside common loaders, and how far pixels are from Pillow's.

    python benchmarks/loader.py [--images 1024] [--folder DIR] [--peers PYTHON] [--repeats 3]

The images are made from the photos of scikit-learn (and of scikit-image, if installed): crops with the
grain of a sensor, JPEGs of 500 x 375 px and about 105 kB, like ImageNet's, in the page cache. All loaders
do the same: RandomResizedCrop to 224 px of at least 0.08 of the area, mirrored half the time, batches of
64. Each runs in its own process, bound to as many CPUs as it has workers; they alternate, so that a busy
moment affects all of them. `--peers` is an interpreter with litdata, webdataset, DALI, FFCV and SPDL, if
this one lacks them; installing FFCV builds it against the headers of OpenCV and libjpeg-turbo, and its
images are JPEGs that it has encoded (rows of short side 256 are compared with its own of that size); SPDL
(spdl-core, spdl-io) needs the libraries of FFmpeg. A way that takes longer
than `--limit` is killed with its processes, and its row says `timed out`.

Off: difference to the same crops by Pillow in grey levels, mean over all pixels, and the worst. CPU ms: of
all processes, per image. First: seconds from opening the data to the first batch, without imports.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from limited import TIMED_OUT, run_limited
from loader_data import convert, make, photos
from loader_ways import WAYS

PACKAGES = ("hpc-imagenet", "numpy", "pillow", "simplejpeg", "torch", "torchvision")
PEERS = ("litdata", "webdataset", "nvidia-dali-cuda120", "ffcv", "spdl-io")
WITH_US = ("ours", "read-ours")  # loaders of this interpreter; the others run in that of the peers


@dataclass
class Row:
    """A loader, measured several times with one worker and with two."""

    name: str
    results: dict[int, list[dict[str, float]]] = field(default_factory=lambda: {1: [], 2: []})
    why: str = ""

    def median(self, what: str, workers: int = 1) -> float:
        """Median over all measurements."""
        return statistics.median(one[what] for one in self.results[workers])


def measure(rows: list[Row], folder: Path, images: int, repeats: int, peers: str, limit: float) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    cpus = len(os.sched_getaffinity(0))
    for _ in range(repeats):
        for row in rows:
            for workers in (1, 2) if cpus > 1 else (1,):
                if row.why:
                    continue
                interpreter = sys.executable if row.name.startswith(WITH_US) else peers
                enough = 16 * images if row.name.startswith("read") else images
                script = Path(__file__).with_name("loader_ways.py")
                command = [interpreter, script, row.name, str(folder), str(workers), str(enough)]
                try:
                    done = run_limited(command, limit, env)
                except subprocess.TimeoutExpired:
                    row.why = TIMED_OUT  # not measured again: a deadlock is likely to come back
                    continue
                if done.returncode:
                    row.why = (done.stderr.strip().splitlines() or ["failed"])[-1]
                else:
                    row.results[workers].append(json.loads(done.stdout.strip().splitlines()[-1]))


def show(rows: list[Row]) -> None:
    by_name = {row.name: row for row in rows}
    width = max(len(WAYS[row.name][0]) for row in rows)
    print(
        f"{'':{width}}  1 worker: images/s    min    max  CPU ms  first s"
        "  2 workers  2 / 1  x ImageFolder  x litdata  x FFCV    off  worst"
    )
    for row in rows:
        title = WAYS[row.name][0]
        if not row.results[1]:
            print(f"{title:{width}}  {row.why}")
            continue
        rates = [one["rate"] for one in row.results[1]]
        line = f"{title:{width}}  {row.median('rate'):18,.0f}{min(rates):7,.0f}{max(rates):7,.0f}"
        line += f"{row.median('cpu'):8.2f}{row.median('first'):9.2f}"
        if row.results[2]:
            two = row.median("rate", 2)
            line += f"{two:11,.0f}{two / row.median('rate'):7.2f}"
        else:
            line += f"{row.why[:16]:>18}"
        ffcv = "ffcv-short256" if "short256" in row.name else "ffcv"
        bases = ("", "read-litdata", "") if row.name.startswith("read") else ("folder-float", "litdata", ffcv)
        for base, columns in zip(bases, (15, 11, 8), strict=True):
            results = base in by_name and by_name[base].results[1]
            ratio = f"{row.median('rate') / by_name[base].median('rate'):.2f}" if results else ""
            line += f"{ratio:>{columns}}"
        if "off" in row.results[1][0]:
            line += f"{row.median('off'):7.2f}{max(one['worst'] for one in row.results[1]):7.0f}"
        print(line.rstrip())


def machine() -> Iterator[str]:
    import psutil
    from PIL import features

    memory, cores = psutil.virtual_memory().total / 2**30, len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    yield f"{platform.machine()}, {cores} CPU cores, {memory:.0f} GiB, load {load:.1f} at the start"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    yield f"Python {platform.python_version()}, {', '.join(versions)}"
    yield f"libjpeg-turbo of Pillow {features.version('libjpeg_turbo')}"


def versions_of_peers(interpreter: str) -> str:
    code = "import importlib.metadata as m, sys\nfor p in sys.argv[1:]:\n try: print(p, m.version(p))\n"
    code += " except m.PackageNotFoundError: print(p, 'is not installed')"
    done = subprocess.run([interpreter, "-c", code, *PEERS], capture_output=True, text=True)
    return ", ".join(done.stdout.split("\n")).strip(", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--images", type=int, default=1024, help="images of the data, and of a measurement (1024)"
    )
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--peers", default=sys.executable, help="an interpreter with the peers")
    parser.add_argument("--repeats", type=int, default=3, help="times each way is measured (3)")
    parser.add_argument("--limit", type=float, default=300, help="s that one measurement may take (300)")
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS), help="some of the ways")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-loader-", dir=options.folder) as name:
        folder = Path(name).resolve()
        print(*machine(), versions_of_peers(options.peers), sep="\n")
        weights = make(folder, options.images)
        convert(folder, options.peers)
        print(f"{options.images:,} images, {len(photos())} photos; {weights}; {options.repeats} times each\n")
        rows = [Row(name) for name in options.only]
        measure(rows, folder, options.images, options.repeats, options.peers, options.limit)
        show(rows)


if __name__ == "__main__":
    main()
