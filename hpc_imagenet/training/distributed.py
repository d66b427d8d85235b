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

from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.launch.local_queue import available_gpus
from hpc_imagenet.training.loading.sampler import BatchShare

CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=10)  # for a rank that is late; torch's own 30 hold a dead job's nodes too long


class JobClusterEnvironment(ClusterEnvironment):
    """The tasks of this job, started by whoever started us (submitit or srun)."""

    def __init__(self, dist_env: DistEnv, device: int) -> None:
        super().__init__()
        self.dist_env, self.device = dist_env, device

    @property
    def creates_processes_externally(self) -> bool:
        """Always: Lightning starts no process."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        return self.dist_env.master

    @property
    def main_port(self) -> int:
        """Port of the rendezvous there."""
        return self.dist_env.port

    @staticmethod
    def detect() -> bool:
        """Never: it is given."""
        return False

    def world_size(self) -> int:
        """Return the number of tasks."""
        return self.dist_env.size

    def set_world_size(self, size: int) -> None:
        """Ignore what Lightning works out."""

    def global_rank(self) -> int:
        """Return this task's rank."""
        return self.dist_env.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignore what Lightning works out."""

    def local_rank(self) -> int:
        """Return the place of this task's device among those it sees, for that is what Lightning asks for."""
        return self.device

    def node_rank(self) -> int:
        """Return this task's node."""
        return self.dist_env.node


def device(config: Config, dist_env: DistEnv) -> torch.device:
    """Return the device of this task: its GPU, or the CPU where no GPU was requested and none is there.

    Raises:
        UserError: GPUs are requested, given to this job or in this machine, and torch sees none, or fewer
            than there are tasks; or the CPU cannot do what `loader.decode` says.
    """
    asked, found = cluster_for(config, "train").gpus_per_node, torch.cuda.device_count()
    if asked is None and not found and (sign := _sign_of_gpu()):
        raise UserError(
            f"{sign}, but torch {torch.__version__} sees no GPU: install a torch that fits the driver"
            " (nvidia-smi shows it), or set cluster.gpus_per_node=0 to train on CPUs"
        )
    if asked == 0 or (asked is None and not found):
        if config.loader.decode == "gpu":
            raise UserError("loader.decode=gpu, but this training is on CPUs: set loader.decode=cpu")
        return torch.device("cpu")
    if not found:
        raise UserError(
            f"cluster.gpus_per_node={asked}, but torch {torch.__version__} sees no GPU on this node:"
            " set cluster.gpus_per_node=0 to train on CPUs"
        )
    if found >= dist_env.local_size:
        return torch.device("cuda", dist_env.local_rank)
    if found == 1 and "SLURM_PROCID" in os.environ:  # each task was bound to its own, which it sees as 0
        return torch.device("cuda", 0)
    raise UserError(
        f"{dist_env.local_size} tasks share {found} GPUs on this node: set cluster.tasks_per_node={found}"
    )


def _sign_of_gpu() -> str:
    """Return in words what says that this task has a GPU; empty if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # set by the local queue, by Slurm or by hand; without a GPU it is empty or -1
        return f"CUDA_VISIBLE_DEVICES={visible}" if available_gpus() else ""
    if "SLURM_JOB_ID" in os.environ:  # a node's GPUs have files in /dev for jobs without GPUs, too
        names = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
        given = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name, "0") not in ("", "0")]
        return given[0] if given else ""
    return "this machine has a GPU (/dev/nvidia0)" if available_gpus() else ""


def trainer_arguments(
    dist_env: DistEnv, place: torch.device, accumulate: int, precision: str
) -> dict[str, Any]:
    """Return the trainer's arguments that put every task on its device and let them work together.

    Args:
        dist_env: rank and size of this task.
        place: this task's device.
        accumulate: parts of a step.
        precision: Lightning's word. Where the network computes in bf16, gradients are sent in bf16 between
            nodes; within a node the links are fast enough not to round them.
    """
    on_gpu, index = place.type == "cuda", place.index or 0
    _name_interface(dist_env.nodes)
    if dist_env.size == 1:
        devices: int | list[int] = [index] if on_gpu else 1
    else:
        devices = list(range(max(index + 1, torch.cuda.device_count()))) if on_gpu else dist_env.local_size
    # Batch norm's statistics are not sent at every step: `Classifier` sends those of rank 0 before each
    # validation, so the checkpoint holds the whole truth, and all ranks judge the same network.
    together = DDPStrategy(
        process_group_backend="nccl" if on_gpu else "gloo",
        timeout=PATIENCE,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,  # else the parts of a step differ: only the last one sends
        ddp_comm_hook=bf16_compress_hook
        if on_gpu and dist_env.nodes > 1 and precision == "bf16-mixed"
        else None,
    )
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": devices,
        "num_nodes": dist_env.nodes,
        "strategy": "auto" if dist_env.size == 1 else together,
        "plugins": [JobClusterEnvironment(dist_env, index if on_gpu else dist_env.local_rank)],
    }


def _name_interface(nodes: int) -> None:
    """Tell gloo by which network to go: by itself it asks this host's name, which may lead nowhere."""
    # NCCL also takes a beginning, or several; gloo one whole name.
    site = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    name = "lo" if nodes == 1 else site
    if name in {there for _, there in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def precision(asked: str, place: torch.device) -> Any:
    """Return Lightning's word for recipe.precision.

    auto is 32-true on CPUs, bf16-mixed on GPUs from Ampere on and 16-mixed on older ones: cuDNN has no bf16
    convolutions for those, and compiled kernels refuse it.
    """
    if asked != "auto":
        return asked
    if place.type != "cuda":
        return "32-true"
    return "bf16-mixed" if _has_bf16(place) else "16-mixed"


def _has_bf16(place: torch.device) -> bool:
    """Whether a GPU computes in bf16: AMD's do, NVIDIA's from Ampere on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(place) >= (8, 0)


def algorithm_arguments(place: torch.device, deterministic: bool) -> dict[str, Any]:
    """Return the trainer's arguments that choose between fast and deterministic algorithms.

    By default cuDNN times its algorithms at the start of every process and takes the fastest, so two
    processes may add up in another order. On a CPU all algorithms in use are deterministic as they are.
    """
    return {"benchmark": place.type == "cuda" and not deterministic, "deterministic": deterministic}


def describe_device(place: torch.device, precision: str, dist_env: DistEnv, cpus: int) -> str:
    """Return the line that says what a training runs on; `cpus`: number that a task may use."""
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    tasks = (
        f"{dist_env.size} tasks on {dist_env.nodes} nodes" if dist_env.nodes > 1 else f"{dist_env.size} tasks"
    )
    shared = f", {tasks}" if dist_env.size > 1 else ""
    return f"device: {name}, {cpus} CPUs, {precision}{shared}"


def emulated(word: str, place: torch.device) -> str:
    """Return a line of advice where a GPU only emulates the numbers it is to compute with; else nothing."""
    if place.type != "cuda" or "bf16" not in word or _has_bf16(place):
        return ""
    return f"{torch.cuda.get_device_name(place)} emulates bf16: recipe.precision=16-mixed is faster there"


def out_of_memory(error: BaseException, place: torch.device = CPU) -> bool:
    """Whether a device, or this machine, has no memory left for what a step needs.

    Args:
        error: what a step has raised.
        place: the device, whose free memory decides where the words do not.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in _NO_MEMORY):
        return True
    if _NO_ENGINE not in text or place.type != "cuda":
        return False
    # cuDNN tries its algorithms, and hides that none found memory. Otherwise it supports none.
    free, total = torch.cuda.mem_get_info(place)
    return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place) < 0.05 * total


# What torch says of a CPU, and CUDA, cuBLAS and cuDNN of a GPU: NCCL by an error that looks like a lost peer.
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
_NO_ENGINE = "unable to find an engine to execute this computation"  # of cuDNN's Conv_v8.cpp


def peer_failure(error: BaseException) -> str:
    """Return in one line that a collective failed because another task is gone; empty for other errors."""
    text = str(error)
    names = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
    if type(error).__name__ in names or any(word in text for word in _LOST):
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return f"lost another task of this job: {line[:200]}"
    return ""


# What gloo says in a plain RuntimeError; NCCL's errors have a class of their own.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")


def batch_share(config: Config, dist_env: DistEnv) -> BatchShare:
    """Cut the global batch for this world.

    Raises:
        UserError: it does not come out even.
    """
    batch, parts = config.recipe.global_batch, dist_env.size * config.train.accumulate
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        near = f"{below} or {above}" if below else str(above)
        accumulate = (
            f" times train.accumulate={config.train.accumulate}" if config.train.accumulate > 1 else ""
        )
        raise UserError(
            f"recipe.global_batch={batch} does not divide by {dist_env.size} tasks{accumulate}: {near} would"
        )
    return BatchShare(batch, dist_env.rank, dist_env.size, config.train.accumulate)
