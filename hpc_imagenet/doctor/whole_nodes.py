"""Check of partitions and jobs that get whole nodes: what of a node a training leaves idle."""

from __future__ import annotations

from hpc_imagenet.doctor.check_result import Finding, StageCluster, ok, warn
from hpc_imagenet.doctor.cluster_checks import Partitions, usable_partitions
from hpc_imagenet.doctor.cluster_file import find_partitions
from hpc_imagenet.launch.slurm_jobs.resource_requests import tasks_per_node


def check_whole_nodes(target: StageCluster, known: Partitions) -> Finding | None:
    """Compare a training with the node that it gets; None if jobs may share the nodes.

    Nodes are not shared in a partition with OverSubscribe=EXCLUSIVE, and by jobs with --exclusive.
    """
    cluster = target.cluster
    usable = usable_partitions(cluster, known)
    exclusive = [name for name, each in usable.items() if each.get("OverSubscribe") == "EXCLUSIVE"]
    if cluster.sbatch.get("exclusive") not in (None, False):
        who, names = "cluster.sbatch.exclusive", list(usable)
    elif exclusive:
        who, names = f"partition {', '.join(exclusive)}", exclusive
    else:
        return None
    nodes = [each for each in find_partitions() if each.name in names]
    if not nodes:
        return None
    cpus, gpus = min(each.cpus for each in nodes), min(each.gpus for each in nodes)
    tasks = tasks_per_node(cluster, distributed=True)
    used_cpus, used_gpus = tasks * (cluster.cpus_per_task or 1), cluster.gpus_per_node
    idle = []
    if used_gpus is not None and used_gpus < gpus:
        fix = f"{target.setting('gpus_per_node')}={gpus}"
        fix += f" {target.setting('tasks_per_node')}={gpus}" if cluster.tasks_per_node else ""
        idle.append((gpus - used_gpus, "GPU", fix))
        tasks = gpus
    if cpus // tasks > (cluster.cpus_per_task or 1):
        idle.append((cpus - used_cpus, "CPU", f"{target.setting('cpus_per_task')}={cpus // tasks}"))
    if not idle:
        return ok(f"{who} gives whole nodes, and a training uses all GPUs and CPUs")
    counts = " and ".join(f"{count} {unit}{'s' if count > 1 else ''}" for count, unit, _ in idle)
    return warn(
        f"{who} gives whole nodes of {gpus} GPUs and {cpus} CPUs: a training leaves {counts} idle",
        f"set {' '.join(fix for *_, fix in idle)}",
    )
