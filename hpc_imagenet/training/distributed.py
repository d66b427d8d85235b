"""Distributed training settings for Lightning: cluster environment, device, strategy, precision, batch share.

The task reads its rank and size once, into a `DistEnv`; Lightning's own Slurm detection and requeueing are
not used.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.cluster.gloo_interface import set_gloo_interface
from hpc_imagenet.cluster.gpus import DEVICES, available_gpus
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.errors import UserError, first_line
from hpc_imagenet.io.ownership import make_own_folder
from hpc_imagenet.runs.job import signature
from hpc_imagenet.runs.store import Run

CPU = torch.device("cpu")
# Torch's default of 30 minutes would keep the nodes of a dead job for too long.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class JobClusterEnvironment(ClusterEnvironment):
    """Lightning's view of the tasks of this job, which submitit or srun has started.

    Args:
        dist_env: rank and size of this task.
        device_index: index of this task's device among those visible to it.
    """

    def __init__(self, dist_env: DistEnv, device_index: int) -> None:
        super().__init__()
        self.dist_env, self.device_index = dist_env, device_index

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning must not start processes."""
        return True

    @property
    def main_address(self) -> str:
        """Host name of rank 0."""
        return self.dist_env.master

    @property
    def main_port(self) -> int:
        """Rendezvous port on that host."""
        return self.dist_env.port

    @staticmethod
    def detect() -> bool:
        """Return False: this environment is passed explicitly, never detected."""
        return False

    def world_size(self) -> int:
        """Return the number of tasks."""
        return self.dist_env.size

    def set_world_size(self, size: int) -> None:
        """Do nothing: `DistEnv` is authoritative."""

    def global_rank(self) -> int:
        """Return the rank of this task over all nodes."""
        return self.dist_env.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: `DistEnv` is authoritative."""

    def local_rank(self) -> int:
        """Return the index of this task's device: Lightning uses the local rank as a device index."""
        return self.device_index

    def node_rank(self) -> int:
        """Return the index of this task's node."""
        return self.dist_env.node


def device(config: Config, dist_env: DistEnv, devices: Path = DEVICES) -> torch.device:
    """Return the device of this task: its GPU, or the CPU if no GPU was requested and none exists.

    Args:
        config: settings.
        dist_env: rank and size of this task.
        devices: folder of the device files.

    Raises:
        UserError: torch sees no GPU although GPUs are requested, allocated or installed, or cannot use it; or
            fewer GPUs than tasks; or loader.decode=gpu on a CPU.
    """
    requested, found = cluster_for(config, config.stage.name).gpus_per_node, torch.cuda.device_count()
    if requested is None and not found and (evidence := _gpu_evidence(devices)):
        raise UserError(
            f"{evidence}, but torch {torch.__version__} sees no GPU: install a torch build for this driver"
            " (nvidia-smi shows it), or set cluster.gpus_per_node=0 to train on CPUs"
        )
    if requested == 0 or (requested is None and not found):
        if config.loader.decode == "gpu":
            raise UserError("loader.decode=gpu, but this training runs on CPUs: set loader.decode=cpu")
        return torch.device("cpu")
    if not found:
        raise UserError(
            f"cluster.gpus_per_node={requested}, but torch {torch.__version__} sees no GPU on this node:"
            " set cluster.gpus_per_node=0 to train on CPUs"
        )
    if found >= dist_env.local_size:
        return _usable_gpu(dist_env.local_rank)
    if found == 1 and "SLURM_PROCID" in os.environ:  # Slurm bound each task to its own GPU, index 0
        return _usable_gpu(0)
    raise UserError(
        f"{dist_env.local_size} tasks share {found} GPUs on this node: set cluster.tasks_per_node={found}"
    )


def _usable_gpu(index: int) -> torch.device:
    """Return a GPU that torch has been started on, and has kernels for.

    torch counts GPUs through the driver's library, which also counts those that torch cannot use.
    """
    device = torch.device("cuda", index)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"torch {torch.__version__} cannot use the GPU of this node ({first_line(error)}): install a"
            " torch build for its driver (see nvidia-smi), or set cluster.gpus_per_node=0 to train on CPUs"
        ) from None
    architectures = torch.cuda.get_arch_list()
    if not has_kernels(architectures, capability):
        raise UserError(
            f"torch {torch.__version__} has no kernels for {name} (it has {' '.join(architectures)}):"
            " install a torch build for this GPU, or set cluster.gpus_per_node=0 to train on CPUs"
        )
    return device


def has_kernels(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a torch build has kernels for an NVIDIA GPU; true of builds for other GPUs.

    Args:
        architectures: those of the build, such as sm_80 and compute_90 (`torch.cuda.get_arch_list`).
        capability: compute capability of the GPU.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    built = [match for name in architectures if (match := re.match(r"(sm|compute)_(\d+)(\d)", name))]
    for kind, *digits in (match.groups() for match in built):
        major, minor = map(int, digits)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:  # compiled for the GPU when it is loaded
            return True
    return not built


def _gpu_evidence(devices: Path) -> str:
    """Return the variable or device file that shows that this task has a GPU; empty if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # set by the local queue, Slurm or the user; empty or -1 means no GPU
        return f"CUDA_VISIBLE_DEVICES={visible}" if available_gpus(devices) else ""
    if "SLURM_JOB_ID" in os.environ:  # jobs without GPUs also see /dev/nvidia*
        names = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
        allocated = [
            f"{name}={os.environ[name]}" for name in names if os.environ.get(name, "0") not in ("", "0")
        ]
        return allocated[0] if allocated else ""
    return "this machine has a GPU (/dev/nvidia0)" if available_gpus(devices) else ""


def trainer_arguments(
    dist_env: DistEnv,
    device: torch.device,
    precision: str,
    deterministic: bool,
    accumulate: int = 1,
    own: bool = False,
) -> dict[str, Any]:
    """Return the `Trainer` arguments of every training and evaluation.

    Args:
        dist_env: rank and size of this task.
        device: device of this task.
        precision: Lightning's name of the precision. With bf16-mixed, gradients are reduced in bf16 between
            nodes; links within a node are fast enough for float32.
        deterministic: take deterministic algorithms only. By default cuDNN benchmarks its algorithms in every
            process and takes the fastest, so two processes may sum in a different order. On a CPU all
            algorithms in use are deterministic.
        accumulate: device batches per step.
        own: whether the network is the user's own, and may have weights that no loss uses.
    """
    on_gpu, index = device.type == "cuda", device.index or 0
    set_gloo_interface(dist_env)
    if dist_env.size == 1:
        devices: int | list[int] = [index] if on_gpu else 1
    else:
        devices = list(range(max(index + 1, torch.cuda.device_count()))) if on_gpu else dist_env.local_size
    # After the first step of a process, DDP moves the gradients to other places in its buffers. How a sum
    # over more than two ranks is rounded depends on the place, so a resumed training would differ from one
    # that was not interrupted. DDP keeps the places only if it looks for unused parameters at every step.
    same_places = dist_env.size > 2 and (deterministic or not on_gpu)
    # Batch norm statistics are not broadcast at every step: `Classifier` broadcasts those of rank 0 before
    # each validation, so that all ranks evaluate the network that is in the checkpoint.
    ddp = DDPStrategy(
        process_group_backend="nccl" if on_gpu else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # With accumulation only the last device batch of a step is reduced.
        static_graph=accumulate == 1 and not same_places,
        # A static graph finds them by itself.
        find_unused_parameters=same_places or (own and accumulate > 1),
        ddp_comm_hook=bf16_compress_hook
        if on_gpu and dist_env.nodes > 1 and precision == "bf16-mixed"
        else None,
    )
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": devices,
        "num_nodes": dist_env.nodes,
        "strategy": "auto" if dist_env.size == 1 else ddp,
        "plugins": [JobClusterEnvironment(dist_env, index if on_gpu else dist_env.local_rank)],
        "precision": precision,
        "accumulate_grad_batches": accumulate,
        "benchmark": on_gpu and not deterministic,
        "deterministic": deterministic,
        "use_distributed_sampler": False,  # our samplers shard the data themselves
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,  # CheckpointCallback saves
        "enable_progress_bar": False,  # ProgressReporter reports
        "enable_model_summary": False,
    }


def join_ranks(run: Run, dist_env: DistEnv, device: torch.device, top: Path = Path("/dev/shm")) -> None:
    """Connect the ranks of a job on one node through a file that only this user can open.

    torch's rendezvous is a port without a password, through which any user of the node could read and change
    what the ranks exchange, their addresses among it. On several nodes it is left to Lightning.

    Args:
        run: the run, whose attempt names the file.
        dist_env: rank and size of this task.
        device: device of this task.
        top: a folder in the node's memory.

    Raises:
        UserError: another user has made the folder of the file.
    """
    if dist_env.size == 1 or dist_env.nodes > 1 or dist.is_initialized() or not top.is_dir():
        return
    set_gloo_interface(dist_env)
    # A file that a killed job has left must not be opened again, so each start of a job has another name.
    variables = ("SUBMITIT_LOCAL_JOB_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    start = [os.environ.get(name) for name in variables]
    folder = top / f"hpc_imagenet-ranks-{os.getuid()}"
    make_own_folder(folder, private=True)
    path = folder / signature(str(run.folder), len(run.attempts()), dist_env.port, start)
    atexit.register(path.unlink, True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # NCCL's monitor looks in the store once a second whether to dump its records. The first task that
        # exits removes the file: the monitors of the others, and so these tasks, would wait 5 minutes for it.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(path), dist_env.size),  # type: ignore[attr-defined]
        rank=dist_env.rank,
        world_size=dist_env.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,  # as Lightning does on several nodes
    )


def precision(setting: str, device: torch.device) -> Any:
    """Return Lightning's precision for `recipe.precision`.

    auto is 32-true on CPUs, bf16-mixed on Ampere and later GPUs, and 16-mixed on older ones: cuDNN has no
    bf16 convolutions for those, and compiled kernels do not support it.
    """
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if _has_bf16(device) else "16-mixed"


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16 natively: AMD's do, and NVIDIA's from Ampere on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def describe_device(device: torch.device, precision: str, dist_env: DistEnv, cpus: int) -> str:
    """Return the log line about the device, precision and tasks; `cpus`: number of CPUs per task."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tasks = (
        f"{dist_env.size} tasks on {dist_env.nodes} nodes" if dist_env.nodes > 1 else f"{dist_env.size} tasks"
    )
    shared = f", {tasks}" if dist_env.size > 1 else ""
    return f"device: {name}, {cpus} CPUs, {precision}{shared}"


def bf16_emulation_warning(precision: str, device: torch.device) -> str:
    """Return a warning if the GPU only emulates bf16 and `precision` uses it; empty otherwise."""
    if device.type != "cuda" or "bf16" not in precision or _has_bf16(device):
        return ""
    return f"{torch.cuda.get_device_name(device)} emulates bf16: recipe.precision=16-mixed is faster there"


def out_of_memory(error: BaseException, device: torch.device = CPU) -> bool:
    """Whether an error means that the device or this machine has run out of memory.

    Args:
        error: exception raised by a training step.
        device: device of the step; its free memory decides if the message is ambiguous.
    """
    text = str(error)
    known = any(message in text for message in _NO_MEMORY)
    if known or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if _NO_ENGINE not in text or device.type != "cuda":
        return False
    # cuDNN raises the same error if no algorithm found enough memory and if none supports the operation.
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) < 0.05 * total


def is_host_memory(error: BaseException) -> bool:
    """Whether an error that is `out_of_memory` is about the memory of this machine, not of its GPU."""
    return isinstance(error, MemoryError) or _NO_HOST_MEMORY in str(error)


def joining_memory_error(dist_env: DistEnv, device: torch.device) -> str:
    """Return an error line for too little memory before the ranks have joined; empty once they have."""
    if dist_env.size == 1 or dist.is_initialized():
        return ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    return (
        f"{name} has too little free memory to connect the tasks of this job: end the other programs that "
        "use it, or take another node"
    )


# Messages of torch on a CPU, and of CUDA, cuBLAS and cuDNN. NCCL wraps CUDA's message in a DistBackendError,
# so test for out of memory, and then for `nccl_setup_error`, before `peer_failure`.
_NO_HOST_MEMORY = "can't allocate memory"
_NO_MEMORY = (_NO_HOST_MEMORY, "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
_NO_ENGINE = "unable to find an engine to execute this computation"  # torch's Conv_v8.cpp
_NCCL_SETUP = ("ncclInvalidUsage", "ncclInvalidArgument", "no socket interface found")


def nccl_setup_error(error: BaseException) -> str:
    """Return an error line if NCCL cannot connect the GPUs of this job at all; empty for other errors.

    A new start of the job would meet it again, while after a lost peer NCCL reports ncclRemoteError,
    ncclSystemError or a timeout.
    """
    text = str(error)
    if not any(each in text for each in _NCCL_SETUP):
        return ""
    fix = (
        "start one task per GPU, with cluster.tasks_per_node and cluster.gpus_per_node"
        if "Duplicate GPU" in text
        else "check the NCCL_ variables in cluster.setup; NCCL_DEBUG=WARN prints more"
    )
    return f"NCCL cannot connect the GPUs of this job: {_cause(text)}: {fix}"


def peer_failure(error: BaseException) -> str:
    """Return a line about a collective that failed because another task has ended; empty for other errors."""
    text = str(error)
    names = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
    if type(error).__name__ in names or any(message in text for message in _CONNECTION_LOST):
        return f"lost another task of this job: {_cause(text)}"
    return ""


def _cause(text: str) -> str:
    """Return the line of an error that names its cause: the one after `Last error:`, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = [after for line, after in itertools.pairwise(lines) if line == "Last error:"]
    return [*last, *lines, ""][0][:200]


# Messages of gloo, which raises a plain RuntimeError; NCCL's errors have their own classes.
_CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
