"""Limits of a partition in the lines of sinfo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import write_command

from hpc_imagenet.cluster.partition_limits import PartitionLimits, partition_limits

LINES = (
    "debug*|30:00|8000|2|(null)",
    "gpu|1-00:00:00|257000|3|gpu:a100:4(S:0-1)",
    "gpu|1-00:00:00|515000|1|gpu:a100:2,gpu:v100:2",
    "gpu|1-00:00:00|900000|5|(null)",
    "long|infinite|128000|1|shard:8",
)
SINFO = """
partition=; for word in "$@"; do case $word in --partition=*) partition=${word#*=} ;; esac; done
for name in ${partition//,/ }; do grep "^$name" $here/lines; done
test -n "$partition" || cat $here/lines
"""


@pytest.fixture(autouse=True)
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a fake sinfo."""
    write_command(tmp_path, "sinfo", SINFO)
    (tmp_path / "lines").write_text("\n".join(LINES) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    partition_limits.cache_clear()
    yield tmp_path
    partition_limits.cache_clear()


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        (None, PartitionLimits(30, 8000)),  # the default partition
        ("gpu", PartitionLimits(1440, 900000)),  # its largest node
        ("debug,gpu", PartitionLimits(1440, 900000)),
        ("gpu,long", PartitionLimits(None, 900000)),
        ("nowhere", PartitionLimits()),
    ],
)
def test_limits_are_those_of_the_best_partition(partition: str | None, expected: PartitionLimits) -> None:
    assert partition_limits(partition) == expected


@pytest.mark.parametrize(
    ("nodes", "gpus", "memory"),
    [
        (1, 4, 515000),
        (2, 4, 257000),
        (4, 1, 257000),
        (5, 4, None),
        (5, 0, 900000),
        (6, 0, 515000),
        (1, 8, None),
    ],
)
def test_memory_is_that_of_as_many_nodes_with_the_gpus(nodes: int, gpus: int, memory: int | None) -> None:
    assert partition_limits("gpu", nodes, gpus) == PartitionLimits(1440, memory)


def test_limits_are_unknown_without_sinfo(sinfo: Path) -> None:
    write_command(sinfo, "sinfo", "echo 'sinfo: error: Unable to contact slurm controller' >&2; exit 1")
    assert partition_limits("gpu") == PartitionLimits()
