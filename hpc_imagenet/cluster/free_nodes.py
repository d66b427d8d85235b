"""The CPUs and the memory that are free on the nodes of a partition, by sinfo."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpc_imagenet.cluster import slurm

# Fields of sinfo with their widths.
_COLUMNS = (("partition", 64), ("nodehost", 96), ("cpusstate", 32), ("memory", 16), ("allocmem", 16))


@dataclass(frozen=True)
class FreeNode:
    """What of a node no job has.

    Attributes:
        name: of the node.
        cpus: CPUs that are idle; 0 of a node that is down or drained.
        memory: GiB that are not allocated.
    """

    name: str
    cpus: int
    memory: float


def free_nodes(partition: str | None) -> list[FreeNode]:
    """Return the nodes of a partition (None: the default one); empty if sinfo does not reply."""
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS)
    chosen = [f"--partition={partition}"] if partition else []
    done = slurm.run_command("sinfo", "--noheader", "--Node", *chosen, f"--Format={columns}")
    found: dict[str, FreeNode] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) != len(_COLUMNS) or not (partition or words[0].endswith("*")):
            continue
        _, name, cpus, memory, allocated = words
        idle = re.fullmatch(r"\d+/(\d+)/\d+/\d+", cpus)  # allocated/idle/other/total
        if idle and memory.isdigit() and allocated.isdigit():
            found[name] = FreeNode(name, int(idle[1]), (int(memory) - int(allocated)) / 1024)
    return list(found.values())
