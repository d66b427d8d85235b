"""Limits of a partition in the lines of sinfo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import write_command

from hpc_imagenet.cluster.partition_limits import PartitionLimits, partition_limits

LINES = ("debug*|30:00|8000", "gpu|1-00:00:00|257000", "gpu|1-00:00:00|515000", "long|infinite|128000")
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
        ("gpu", PartitionLimits(1440, 515000)),  # its largest node
        ("debug,gpu", PartitionLimits(1440, 515000)),
        ("gpu,long", PartitionLimits(None, 515000)),
        ("nowhere", PartitionLimits()),
    ],
)
def test_limits_are_those_of_the_best_partition(partition: str | None, expected: PartitionLimits) -> None:
    assert partition_limits(partition) == expected


def test_limits_are_unknown_without_sinfo(sinfo: Path) -> None:
    write_command(sinfo, "sinfo", "echo 'sinfo: error: Unable to contact slurm controller' >&2; exit 1")
    assert partition_limits("gpu") == PartitionLimits()
