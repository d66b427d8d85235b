"""The longest time and the largest memory per node that the jobs of a partition can have, by sinfo."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.input.slurm_values import parse_minutes

_COLUMNS = "%P|%l|%m"  # partition, with * the default one; time limit; MB of a node


@dataclass(frozen=True)
class PartitionLimits:
    """What a job can have at most.

    Attributes:
        minutes: its time limit; None: unlimited, or unknown.
        memory: MB of the largest node; None: unknown.
    """

    minutes: int | None = None
    memory: int | None = None


@functools.cache  # a page of many failed runs needs it for each
def partition_limits(partition: str | None) -> PartitionLimits:
    """Return the limits of a partition, or of the best of several `a,b`; without sinfo they are unknown.

    Args:
        partition: as in cluster.partition; None: the default one.
    """
    chosen = [f"--partition={partition}"] if partition else []
    # Without --exact nodes of different memory are one line, with the least of them.
    done = slurm.run_command("sinfo", "--noheader", "--exact", *chosen, f"--format={_COLUMNS}")
    times, memories = [], []
    for line in done.stdout.splitlines():
        name, *cells = line.strip().split("|")
        if len(cells) == 2 and (partition or name.endswith("*")):
            time, memory = cells
            times.append(parse_minutes(time) if time[:1].isdigit() else None)
            memories += [int(memory)] if memory.isdigit() else []
    finite = [time for time in times if time is not None]
    longest = max(finite) if finite and len(finite) == len(times) else None
    return PartitionLimits(longest, max(memories, default=None))
