"""Every benchmark runs to its end at its smallest size, so that a change of the package does not break it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "download": "--gib 0.05 --repeats 1",
    "end_to_end": "--windows 2 --steps 2 --batch 8 --size 32",
    "jobs": "--runs 100 --active 10 --repeats 1",
    "layouts": "--images 1000 --classes 10 --repeats 1",
    "load": "--only runs,queue,worker,clients --divide 10",
    "loader": "--images 64 --repeats 1 --limit 60 --only ours ours-tiled folder-float",
    "loader_lock": "--images 4 --repeats 1",
    "price": "--rounds 1",
    "process": "--train 200 --val 20 --classes 4 --repeats 1",
    "report_page": "--runs 20 --repeats 1",
    "search": "--points 2 --trials 4 --seeds 1",
    "sequential_reads": "--images 20000 --window 2048 --gb 0.2",
    "share_loader": "--images 128 --epochs 2 --repeats 1",
    "shared_file_system": "--tasks 1",
    "slurm": "--repeats 1",
    "staging": "--gb 0.1 --shard-gb 0.05 --repeats 1",
    "submit": "--repeats 1",
    "ten_times": "--images 20000 --classes 50 --scan 120000",
    "train_step": "--processes 1 --windows 1 --steps 1 --batch 4 --size 32",
    "transfer": "--shards 2 --mb 2 --large-gb 0.01 --repeats 1",
}
PARTS = ("shaped", "loader_data", "loader_ways", "process_ways", "gpu")  # gpu has tests of its own


def test_every_benchmark_is_tested() -> None:
    programs = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert {path.stem for path in programs} == {*SMALL, *PARTS}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs_to_its_end(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *SMALL[name].split()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    others = done.stdout.replace("ModuleNotFoundError", "")  # a peer that is not installed
    assert "Error" not in others, done.stdout  # a row that could not be measured
