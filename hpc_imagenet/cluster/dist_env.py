"""Rank, world size, rendezvous address and CPUs of this task, from the environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

CPUS_VARIABLE = "HPC_IMAGENET_CPUS"  # environment variable: the CPUs that a task of a local job may use
# Environment variable of a run with a shared loader: file descriptors of its connection and of the memory.
SHARED_LOADER_VARIABLE = "HPC_IMAGENET_SHARED_LOADER"


@dataclass(frozen=True)
class DistEnv:
    """Rank of this process in its job, and the rendezvous address, as in torch.distributed."""

    rank: int = 0  # 0 … size - 1
    size: int = 1  # world size: tasks of the job
    local_rank: int = 0  # on this node
    local_size: int = 1  # tasks on this node
    node: int = 0  # index of this node in the job
    master: str = "127.0.0.1"  # the host of rank 0; loopback on one node, whose name may not resolve
    port: int = 29500  # of the rendezvous
    peer: str = "127.0.0.1"  # a host of another node

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the run folder, the checkpoints and the metrics."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of nodes of the job; all have the same number of tasks."""
        return self.size // self.local_size


def from_environment(env: Mapping[str, str] = os.environ) -> DistEnv:
    """Return the DistEnv set by submitit's local executor or by srun; without them a single process."""
    if "SUBMITIT_LOCAL_GLOBALID" in env:
        size = int(env["SUBMITIT_LOCAL_NTASKS"])
        rank = int(env["SUBMITIT_LOCAL_GLOBALID"])
        port = _port(int(env["SUBMITIT_LOCAL_JOB_ID"]))  # a process id
        return DistEnv(rank, size, rank, size, 0, "127.0.0.1", port)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        size, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
        node = int(env.get("SLURM_NODEID", 0))
        master = _first_address(env) if nodes > 1 else "127.0.0.1"
        return DistEnv(
            rank=int(env["SLURM_PROCID"]),
            size=size,
            local_rank=int(env["SLURM_LOCALID"]),
            local_size=size // nodes,
            node=node,
            master=master,
            port=_port(
                int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]), int(env.get("SLURM_RESTART_COUNT", 0))
            ),
            peer=master if node or nodes == 1 else _last_host(_step_nodes(env)),
        )
    return DistEnv()


def available_cpus(dist_env: DistEnv, env: Mapping[str, str] = os.environ) -> int:
    """Return the number of CPUs of this task: its share of the allocation, at most its CPU affinity."""
    allowed = len(os.sched_getaffinity(0))
    for variable in (CPUS_VARIABLE, "SLURM_CPUS_PER_TASK"):  # set by the local queue, by Slurm
        if variable in env:
            return min(int(env[variable]), allowed)
    if "SLURM_PROCID" in env:  # srun has bound each task to its own CPUs
        return allowed
    return max(1, allowed // dist_env.local_size)


def pinned_cpus(dist_env: DistEnv, env: Mapping[str, str] = os.environ) -> frozenset[int]:
    """Return the CPU numbers to pin this task to; empty if srun has bound it or the CPUs may be shared.

    Tasks that srun did not bind share all CPUs of the job on the node, so each takes its slice. The CPUs
    belong to this job alone only if their number equals SLURM_CPUS_ON_NODE.
    """
    shared, share = sorted(os.sched_getaffinity(0)), available_cpus(dist_env, env)
    exclusive = "SLURM_PROCID" in env and env.get("SLURM_CPUS_ON_NODE") == str(len(shared))
    if not exclusive or dist_env.local_size == 1 or share * dist_env.local_size > len(shared):
        return frozenset()
    return frozenset(shared[dist_env.local_rank * share : (dist_env.local_rank + 1) * share])


def _port(job: int, step: int = 0, restart: int = 0) -> int:
    # Jobs that share a node need different ports, below the ephemeral range: 20,000 consecutive job ids
    # get distinct ports. A restart uses another port, in case another process holds the first.
    return 10_000 + (job + 7_919 * step + 104_729 * restart) % 20_000


def _first_address(env: Mapping[str, str]) -> str:
    """Return the name of the first node of this step; its address if the name does not resolve here."""
    first, address = _first_host(env["SLURM_JOB_NODELIST"]), env.get("SLURM_LAUNCH_NODE_IPADDR")
    host = _first_host(_step_nodes(env))
    if address and host == first:  # of the node where srun runs: for a batch script the first of the job
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            return address
    return host


def _step_nodes(env: Mapping[str, str]) -> str:
    return env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]


def _first_host(nodelist: str) -> str:
    # The first host of `gpu[03-05,9],big1` is gpu03.
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    first = rest.split("]")[0].split(",")[0].split("-")[0]
    return head + first + rest.partition("]")[2].split(",")[0]


def _last_host(nodelist: str) -> str:
    # The last host of `big1,gpu[03-05,9]` is gpu9.
    head, bracket, rest = nodelist.rpartition("[")
    numbers, _, suffix = rest.partition("]")
    if not bracket or "," in suffix:
        return nodelist.rpartition(",")[2]
    return head.rpartition(",")[2] + numbers.rpartition(",")[2].rpartition("-")[2] + suffix
