"""From the world of this job to Lightning's terms: processes, devices, shares of the global batch.

The world was read once, by the job; Lightning's own detection of Slurm, with its requeueing, stays out of it.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from hpc_imagenet.config import Config, cluster_for
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.sampler import Share
from hpc_imagenet.world import World

PATIENCE = timedelta(minutes=10)  # for a rank that is late; torch's own 30 hold a dead job's nodes too long


class Environment(ClusterEnvironment):
    """The tasks of this job, started by whoever started us (submitit or srun)."""

    def __init__(self, world: World, device: int) -> None:
        super().__init__()
        self.world, self.device = world, device

    @property
    def creates_processes_externally(self) -> bool:
        """Always: Lightning starts no process."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        return self.world.master

    @property
    def main_port(self) -> int:
        """Port of the rendezvous there."""
        return self.world.port

    @staticmethod
    def detect() -> bool:
        """Never: it is given."""
        return False

    def world_size(self) -> int:
        """Return the number of tasks."""
        return self.world.size

    def set_world_size(self, size: int) -> None:
        """Ignore what Lightning works out."""

    def global_rank(self) -> int:
        """Return this task's rank."""
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignore what Lightning works out."""

    def local_rank(self) -> int:
        """Return the place of this task's device among those it sees, for that is what Lightning asks for."""
        return self.device

    def node_rank(self) -> int:
        """Return this task's node."""
        return self.world.node


def device(config: Config, world: World) -> torch.device:
    """Return the device of this task: its GPU, or the CPU where none was asked for or none is there.

    Raises:
        UserError: GPUs are asked for, to train or to decode, and missing, or fewer than tasks.
    """
    asked, found = cluster_for(config, "train").gpus_per_node, torch.cuda.device_count()
    if asked == 0 or (asked is None and not found):
        if config.loader.decode == "gpu":
            raise UserError("loader.decode=gpu, but this training is on CPUs: set loader.decode=cpu")
        return torch.device("cpu")
    if not found:
        raise UserError(
            f"cluster.gpus_per_node={asked}, but torch {torch.__version__} sees no GPU on this node:"
            " set cluster.gpus_per_node=0 to train on CPUs"
        )
    if found >= world.local_size:
        return torch.device("cuda", world.local_rank)
    if found == 1 and "SLURM_PROCID" in os.environ:  # each task was bound to its own, which it sees as 0
        return torch.device("cuda", 0)
    raise UserError(
        f"{world.local_size} tasks share {found} GPUs on this node: set cluster.tasks_per_node={found}"
    )


def placement(world: World, place: torch.device, accumulate: int, precision: str) -> dict[str, Any]:
    """Return the trainer's arguments that put every task on its device and let them work together.

    Args:
        world: the tasks.
        place: this task's device.
        accumulate: parts of a step.
        precision: Lightning's word; gradients travel in bf16 on GPUs where the network computes in it.
    """
    on_gpu, index = place.type == "cuda", place.index or 0
    _name_interface(world.nodes)
    if world.size == 1:
        devices: int | list[int] = [index] if on_gpu else 1
    else:
        devices = list(range(max(index + 1, torch.cuda.device_count()))) if on_gpu else world.local_size
    # Batch norm's statistics are not sent at every step: `Classifier` sends those of rank 0 before each
    # validation, so the checkpoint holds the whole truth, and all ranks judge the same network.
    together = DDPStrategy(
        process_group_backend="nccl" if on_gpu else "gloo",
        timeout=PATIENCE,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,  # else the parts of a step differ: only the last one sends
        ddp_comm_hook=bf16_compress_hook if on_gpu and precision == "bf16-mixed" else None,
    )
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": devices,
        "num_nodes": world.nodes,
        "strategy": "auto" if world.size == 1 else together,
        "plugins": [Environment(world, index if on_gpu else world.local_rank)],
    }


def _name_interface(nodes: int) -> None:
    """Tell gloo by which network to go: by itself it asks this host's name, which may lead nowhere."""
    # NCCL also takes a beginning, or several; gloo one whole name.
    site = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    name = "lo" if nodes == 1 else site
    if name in {there for _, there in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def precision(asked: str, place: torch.device) -> Any:
    """Return Lightning's word for recipe.precision; auto is bf16-mixed on GPUs, else 32-true."""
    if asked != "auto":
        return asked
    return "bf16-mixed" if place.type == "cuda" else "32-true"


def emulated(word: str, place: torch.device) -> str:
    """Return a line of advice where a GPU only emulates the numbers it is to compute with; else nothing."""
    if place.type != "cuda" or "bf16" not in word or torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    return f"{torch.cuda.get_device_name(place)} emulates bf16: recipe.precision=16-mixed is faster there"


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, has no memory left for what a step wants."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    # What torch says of a CPU, and CUDA's libraries of a GPU: NCCL by an error that looks like a lost peer.
    return known or any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def lost(error: BaseException) -> str:
    """Return in one line that a collective failed because another task is gone; empty for other errors."""
    text = str(error)
    names = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
    if type(error).__name__ in names or any(word in text for word in _LOST):
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return f"lost another task of this job: {line[:200]}"
    return ""


# What gloo says in a plain RuntimeError; NCCL's errors have a class of their own.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")


def share(config: Config, world: World) -> Share:
    """Cut the global batch for this world.

    Raises:
        UserError: it does not come out even.
    """
    batch, parts = config.recipe.global_batch, world.size * config.train.accumulate
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        near = f"{below} or {above}" if below else str(above)
        accumulate = (
            f" times train.accumulate={config.train.accumulate}" if config.train.accumulate > 1 else ""
        )
        raise UserError(
            f"recipe.global_batch={batch} does not divide by {world.size} tasks{accumulate}: {near} would"
        )
    return Share(batch, world.rank, world.size, config.train.accumulate)
