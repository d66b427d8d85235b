"""How cluster settings request GPUs, memory and time from sbatch, and which of them contradict each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError

# Options of sbatch that request GPUs; those of generic resources do if they name them.
_GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "ntasks-per-gpu")
_GENERIC_OPTIONS = ("gres", "tres-per-task")
_MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
_GPU_GRES = re.compile(r"(?:^|,)(?:gres[:/])?gpu\b")
_SHARED_GRES = re.compile(r"(?:^|,)(?:gres[:/])?(?:shard|mps|mig)\b")  # parts of a GPU


def tasks_per_node(cluster: Cluster, distributed: bool) -> int:
    """Return the tasks of each node: one, unless the stage is distributed."""
    return cluster.tasks_of_node if distributed else 1


def gpu_options(cluster: Cluster, tasks: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option of sbatch that requests cluster.gpus_per_node, as cluster.gpu_request says.

    Args:
        cluster: cluster settings of a stage.
        tasks: tasks of each node.
        options: more options of sbatch, which may request other generic resources.

    Raises:
        UserError: the GPUs cannot be shared between the tasks.
    """
    gpus = int(cluster.gpus_per_node or 0)
    if not gpus:
        return {}
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    if cluster.gpu_request == "gres":
        others = [str(options["gres"])] if options.get("gres") else []
        return {"gres": ",".join([f"gpu:{kind}{gpus}", *others])}
    if cluster.gpu_request == "gpus-per-task":
        if gpus % tasks:
            raise UserError(
                f"cluster.gpu_request=gpus-per-task: {gpus} GPUs cannot be shared equally between "
                f"cluster.tasks_per_node={tasks}"
            )
        return {"gpus-per-task": f"{kind}{gpus // tasks}"}
    return {"gpus-per-node": f"{kind}{gpus}"}


def requests_gpus(cluster: Cluster) -> bool:
    """Whether the settings request GPUs or parts of one: by cluster.gpus_per_node, or by cluster.sbatch."""
    return bool(cluster.gpus_per_node) or any(
        _is_gpu_option(name, value) or _names(_SHARED_GRES, name, value)
        for name, value in _options(cluster).items()
    )


def _options(cluster: Cluster) -> dict[str, Any]:
    """Return the options of cluster.sbatch that have a value, with dashes in their names."""
    return {name.replace("_", "-"): value for name, value in cluster.sbatch.items() if value}


def _is_gpu_option(name: str, value: Any) -> bool:
    return name in _GPU_OPTIONS or _names(_GPU_GRES, name, value)


def _names(resource: re.Pattern[str], option: str, value: Any) -> bool:
    return option in _GENERIC_OPTIONS and bool(resource.search(str(value)))


def warning_seconds(minutes: float | None) -> int:
    """Return the s between the warning signal and the time limit: time to save, even in a short job."""
    return int(min(90, 15 * (minutes or 6)))


def check_resources(stage: str, cluster: Cluster, tasks: int) -> None:
    """Check that cluster.sbatch requests no GPUs, memory or CPUs that other settings request differently.

    Slurm accepts --gpus-per-node=1 with --gres=gpu:4: the job gets four GPUs and uses one.

    Raises:
        UserError: names both settings, and what to set instead.
    """
    options, gpus_per_node, memory = _options(cluster), cluster.gpus_per_node, cluster.memory_gb
    for name, value in options.items():
        given = f"cluster.sbatch.{name}={value}"
        if gpus_per_node is not None and _is_gpu_option(name, value):
            raise UserError(
                f"{given} and cluster.gpus_per_node={gpus_per_node} both say how many GPUs {stage} gets: "
                f"instead of {given} set cluster.gpus_per_node=COUNT or TYPE:COUNT, and if your centre "
                "requires it cluster.gpu_request=gres or gpus-per-task"
            )
        if name in _MEMORY_OPTIONS and memory is not None:
            raise UserError(
                f"{given} and cluster.memory_gb={memory:g} both request memory for {stage}: set one of them, "
                "the other to null"
            )
        if name == "cpus-per-gpu" and cluster.cpus_per_task is not None:
            raise UserError(
                f"{given} and cluster.cpus_per_task={cluster.cpus_per_task} both request CPUs for {stage}: "
                "set one of them, the other to null"
            )
    gpu_options(cluster, tasks, options)  # raises if they cannot be shared
