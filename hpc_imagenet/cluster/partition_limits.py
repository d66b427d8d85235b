"""The longest time and the largest memory per node that a job in a partition can have, by sinfo."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.input.slurm_values import parse_minutes

# Partition, with * the default one; time limit; and of nodes that are equal MB, number and generic resources.
_COLUMNS = "%P|%l|%m|%D|%G"
_GPU = re.compile(r"gpu(?::[\w.-]+)?:(\d+)(?=[(,]|$)")


@dataclass(frozen=True)
class PartitionLimits:
    """What a job can have at most.

    Attributes:
        minutes: its time limit; None: unlimited, or unknown.
        memory: MB of a node; None: unknown.
    """

    minutes: int | None = None
    memory: int | None = None


@functools.cache  # a page of many failed runs needs it for each
def partition_limits(partition: str | None, nodes: int = 1, gpus: int = 0) -> PartitionLimits:
    """Return the limits of a partition, or of the best of several `a,b`; without sinfo they are unknown.

    Args:
        partition: as in cluster.partition; None: the default one.
        nodes: number of nodes of the job.
        gpus: GPUs that it has on each node.
    """
    chosen = [f"--partition={partition}"] if partition else []
    # Without --exact nodes of different memory are one line, with the least of them.
    done = slurm.run_command("sinfo", "--noheader", "--exact", *chosen, f"--format={_COLUMNS}")
    times: list[int | None] = []
    memories: dict[str, list[int]] = {}  # MB of each node with such GPUs, by partition
    for line in done.stdout.splitlines():
        name, *cells = line.strip().split("|")
        if len(cells) == 4 and (partition or name.endswith("*")):
            time, memory, count, resources = cells
            times.append(parse_minutes(time) if time[:1].isdigit() else None)
            if memory.isdigit() and count.isdigit() and sum(map(int, _GPU.findall(resources))) >= gpus:
                memories.setdefault(name, []).extend([int(memory)] * int(count))
    finite = [time for time in times if time is not None]
    longest = max(finite) if finite and len(finite) == len(times) else None
    enough = [sorted(each)[-nodes] for each in memories.values() if len(each) >= nodes]
    return PartitionLimits(longest, max(enough, default=None))
