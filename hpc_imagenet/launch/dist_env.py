"""Who am I among the processes of this job: rank and world size, from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DistEnv:
    """The place of this process among the tasks of its job."""

    rank: int = 0  # 0 … size - 1
    size: int = 1
    local_rank: int = 0  # on this node
    local_size: int = 1
    node: int = 0
    master: str = "127.0.0.1"  # the host of rank 0
    port: int = 29500  # for the rendezvous

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the record, the checkpoints and the metrics."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Nodes of the job; all have the same number of tasks."""
        return self.size // self.local_size


def from_environment(env: Mapping[str, str] = os.environ) -> DistEnv:
    """Read the world from what submitit's local executor or srun set; one process without them."""
    if "SUBMITIT_LOCAL_GLOBALID" in env:
        size = int(env["SUBMITIT_LOCAL_NTASKS"])
        rank = int(env["SUBMITIT_LOCAL_GLOBALID"])
        port = _port(int(env["SUBMITIT_LOCAL_JOB_ID"]))  # it is a process id
        return DistEnv(rank, size, rank, size, 0, "127.0.0.1", port)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        size, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
        return DistEnv(
            rank=int(env["SLURM_PROCID"]),
            size=size,
            local_rank=int(env["SLURM_LOCALID"]),
            local_size=size // nodes,
            node=int(env.get("SLURM_NODEID", 0)),
            # On one node the loopback does, whether or not the node's name resolves.
            master=_first_host(env["SLURM_JOB_NODELIST"]) if nodes > 1 else "127.0.0.1",
            port=_port(
                int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]), int(env.get("SLURM_RESTART_COUNT", 0))
            ),
        )
    return DistEnv()


def available_cpus(dist_env: DistEnv, env: Mapping[str, str] = os.environ) -> int:
    """Return the CPUs this task may use: of its allocation, not of the host, and no more than there are."""
    mine = len(os.sched_getaffinity(0))
    for given in ("HPC_IMAGENET_CPUS", "SLURM_CPUS_PER_TASK"):  # by this machine's queue, by Slurm
        if given in env:
            return min(int(env[given]), mine)
    if "SLURM_PROCID" in env:  # srun has bound each task to its own
        return mine
    return max(1, mine // dist_env.local_size)


def pinned_cpus(dist_env: DistEnv, env: Mapping[str, str] = os.environ) -> frozenset[int]:
    """Return the CPUs that are this task's alone; none where that cannot be told, or srun has seen to it.

    Tasks that srun did not bind share all CPUs of their job on the node: each takes its part. Whether others
    use them as well is certain only where they are as many as the job was given.
    """
    shared, mine = sorted(os.sched_getaffinity(0)), available_cpus(dist_env, env)
    ours = "SLURM_PROCID" in env and env.get("SLURM_CPUS_ON_NODE") == str(len(shared))
    if not ours or dist_env.local_size == 1 or mine * dist_env.local_size > len(shared):
        return frozenset()
    return frozenset(shared[dist_env.local_rank * mine : (dist_env.local_rank + 1) * mine])


def _port(job: int, step: int = 0, restart: int = 0) -> int:
    # Jobs that share a node need different ports, below the ephemeral range: 20,000 jobs in a row have
    # each its own. A restart takes another, should a stranger sit on the first.
    return 10_000 + (job + 7_919 * step + 104_729 * restart) % 20_000


def _first_host(nodelist: str) -> str:
    # `gpu[03-05,9],big1` names gpu03 first.
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    first = rest.split("]")[0].split(",")[0].split("-")[0]
    return head + first + rest.partition("]")[2].split(",")[0]
