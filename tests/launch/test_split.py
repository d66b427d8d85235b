"""A sweep over several clusters is split: each run is submitted once, to the cluster that starts it first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import scripts, write_command

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.launch.split import capacity_script, shares

SWEEP = ("-m", "+stage=pipeline", "dataset=digits", "model=resnet18", "seed=range(8)")
FILE = "defaults: [slurm, _self_]\npartition: {}\naccount: {}\n"
# Partition left starts 3 runs of one task now; more are refused. right starts any number in an hour.
SBATCH = """
test "$1" = --help && exit 0
if [ "$1" = --test-only ]; then
  text=$(cat); tasks=$(echo "$text" | sed -n 's/^#SBATCH --ntasks=//p'); tasks=${tasks:-1}
  start=$(date +%Y-%m-%dT%H:%M:%S)
  if [[ $text == *--partition=left* ]]; then
    [ $tasks -le 3 ] || { echo 'Requested node configuration is not available' >&2; exit 1; }
  else
    start=$(date -d '+1 hour' +%Y-%m-%dT%H:%M:%S)
  fi
  echo "sbatch: Job 1 to start at $start using 1 processors on nodes n1 in partition x" >&2; exit 0
fi
n=$(ls $here | grep -c script); cp "$1" $here/script.$((n + 1)); echo Submitted batch job $((n + 1))
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
[ "$tasks" ] && ids=$(seq -f "$((n + 1))_%g" 0 $tasks) || ids=$((n + 1))
for id in $ids; do echo "$id|PENDING|0|0|Priority" >> $here/queue; done
"""


@pytest.fixture
def two(cluster: Cli, commands: Path, tmp_path: Path) -> Cli:
    """The command line with the cluster files left and right, of one Slurm."""
    write_command(commands, "sbatch", SBATCH)
    folder = tmp_path / "conf" / "cluster"
    folder.mkdir(parents=True)
    for name in ("left", "right"):
        (folder / f"{name}.yaml").write_text(FILE.format(name, f"{name}-account"))
    return cluster


def partitions(commands: Path) -> dict[str, int]:
    """Return the number of submitted trainings by partition."""
    found: dict[str, int] = {}
    for text in scripts(commands):
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
        if options["job-name"].startswith(("train", "resnet")):
            last = options.get("array", "0-0").partition("-")[2].partition("%")[0]
            found[options["partition"]] = found.get(options["partition"], 0) + int(last) + 1
    return found


@pytest.mark.slow
def test_sweep_over_two_cluster_files_is_one_sweep_of_single_runs(two: Cli, commands: Path) -> None:
    done = two(*SWEEP, "cluster=left,right")
    assert partitions(commands) == {"left": 3, "right": 5}
    left = "3 with cluster.partition=left cluster.account=left-account, all start now"
    right = "5 with cluster.partition=right cluster.account=right-account, all start in 60 min"
    assert f"split by sbatch --test-only: {left}; {right}\n" in done.stdout
    # The data stages take the cluster that is named first, and all trainings wait for them.
    assert [text.count("--partition=left") for text in scripts(commands)[:3]] == [1, 1, 1]
    assert all("#SBATCH --dependency=afterok:3\n" in text for text in scripts(commands)[3:])
    rows = two.jobs()
    assert len(rows) == len({row["run"] for row in rows}) == 3 + 8
    (sweep,) = {name for row in rows for name in row["sweeps"]}
    assert sweep.startswith("seed-")
    # The same sweep with one of the clusters is the same sweep, and nothing is submitted twice.
    done = two(*SWEEP, "cluster=right")
    assert f"sweep: {sweep}" in done.stdout
    assert done.stdout.count("already running") == 11
    assert sum(partitions(commands).values()) == 8
    assert "split by" not in two(*SWEEP, "cluster=left,right").stdout


@pytest.mark.slow
def test_dry_run_shows_the_split_and_writes_nothing(two: Cli, commands: Path) -> None:
    done = two(*SWEEP, "cluster=right,left", "dry_run=true")
    assert "split by sbatch --test-only: 5 with cluster.partition=right" in done.stdout
    assert scripts(commands) == []
    assert not two.workspace.exists()


def test_without_m_it_is_refused_with_the_form_that_works(two: Cli) -> None:
    error = two.refused("+stage=pipeline", "dataset=digits", "cluster=left,right")
    assert "cluster=left,right is a sweep: add -m" in error


@pytest.mark.slow
def test_one_run_goes_to_the_cluster_that_starts_it_first(two: Cli, commands: Path) -> None:
    words = ("-m", "+stage=pipeline", "dataset=digits", "model=resnet18", "cluster=right,left")
    assert "sweep:" not in two(*words).stdout
    assert partitions(commands) == {"left": 1}


def test_clusters_of_different_hosts_are_refused(two: Cli, tmp_path: Path) -> None:
    path = tmp_path / "conf" / "cluster" / "right.yaml"
    path.write_text(path.read_text() + "host: me@far\n")
    error = two.refused(*SWEEP, "cluster=left,right")
    assert "different hosts (left on this machine, right on me@far)" in error


@pytest.mark.slow
def test_a_setting_that_one_of_the_clusters_cannot_have_is_refused(two: Cli, tmp_path: Path) -> None:
    path = tmp_path / "conf" / "cluster" / "right.yaml"
    path.write_text(path.read_text() + "time: null\n")
    assert "cluster.time is not set" in two.refused(*SWEEP, "cluster=left,right")


@pytest.mark.slow
def test_centre_that_estimates_single_jobs_only_gets_equal_shares(two: Cli, commands: Path) -> None:
    """Neither the number of tasks nor GPUs per task may be requested there."""
    refused = "[[ $text == *--ntasks=* ]] && { echo 'use --nodes' >&2; exit 1; }"
    write_command(commands, "sbatch", SBATCH.replace("  start=$(date +", f"  {refused}\n  start=$(date +"))
    two(*SWEEP, "cluster=left,right")
    assert partitions(commands) == {"left": 4, "right": 4}


@pytest.mark.slow
def test_on_this_machine_the_first_settings_count(two: Cli, commands: Path) -> None:
    words = ("-m", "+stage=pipeline", "dataset=digits", "model=resnet18", "cluster=local", "dry_run=true")
    done = two(*words, "cluster.parallel=1,2", "seed=1,2")
    assert "split by" not in done.stdout
    assert done.stdout.count("would be submitted") == 5


def limited(most: int, later: float = 3600.0) -> Callable[[int], float | None]:
    """Return the delays of a cluster that starts `most` runs now, and up to twice as many later."""
    return lambda runs: 0.0 if runs <= most else later if runs <= 2 * most else None


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [
        (8, (8, 8), [8, 0]),  # the first named cluster starts all
        (8, (4, 8), [4, 4]),
        (8, (0, 8), [0, 8]),  # the first refuses every job
        (2, (1, 1), [1, 1]),
        (80, (10, 30), [20, 60]),  # more than fit: by size
    ],
)
def test_shares(total: int, most: tuple[int, int], expected: list[int]) -> None:
    counts = shares(total, [limited(each) for each in most], [24 * 3600.0] * 2)
    assert sum(counts) == total
    assert counts == expected


def test_no_cluster_starts_anything_and_the_first_reports_why() -> None:
    assert shares(5, [lambda _: None, lambda _: None], [math.inf, math.inf]) == [5, 0]


def test_capacity_is_queried_per_task_so_that_runs_may_share_nodes() -> None:
    cluster = Cluster(
        "slurm", nodes=2, gpus_per_node=4, gpu_type="a100", cpus_per_task=8, memory_gb=64, time=60
    )
    lines = capacity_script(cluster, 3).splitlines()
    for line in ("--ntasks=24", "--gpus-per-task=a100:1", "--mem-per-cpu=2048M", "--time=60"):
        assert f"#SBATCH {line}" in lines
    assert not any("nodes" in line for line in lines)
