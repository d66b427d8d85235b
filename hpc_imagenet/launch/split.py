"""Split the runs of a sweep over several clusters, such as cluster=alliance,mila, by their free capacity.

A run does not depend on the cluster, so a sweep over clusters makes no more runs: each run has alternatives,
of which one is chosen. `sbatch --test-only` estimates when a cluster would start K runs at once. Runs are
assigned in steps to the cluster that starts them first; of equal ones, to the one that is named first.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hpc_imagenet.config.schema import DATA_STAGES, Cluster
from hpc_imagenet.launch.executor import State
from hpc_imagenet.runs.job import Job

_STEPS = 8  # in which the runs are assigned
_TIE = 60.0  # s between two starts that count as equal
_NAMED = ("partition", "account", "qos", "constraint")  # settings that name a cluster, if they differ

Delay = Callable[[int], "float | None"]
"""Estimated s until a number of runs can start together; None if they never can."""


def merge_alternatives(jobs: Sequence[Job]) -> list[Job]:
    """Return one job per run; those with other cluster settings become its alternatives.

    The stages that make the data take the cluster that is named first.
    """
    merged: dict[str, Job] = {}
    for job in jobs:
        first = merged.setdefault(job.run_id, job)
        known = [first, *first.alternatives]
        if job.stage not in DATA_STAGES and all(job.cluster != each.cluster for each in known):
            merged[job.run_id] = replace(first, alternatives=(*first.alternatives, job))
    return list(merged.values())


def choose_clusters(jobs: Sequence[Job], state_of: dict[str, State]) -> tuple[list[Job], str]:
    """Return the jobs with the cluster that each is submitted to, and one line about the split, or nothing.

    Args:
        jobs: the plan.
        state_of: states of the jobs; those that are finished or active are not counted.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        state = state_of[job.run_id]
        # Else there is nothing to choose: the first settings count
        on_slurm = job.cluster.executor == "slurm"
        if on_slurm and job.alternatives and not state.active and not state.finished:
            clusters = [job.cluster, *(each.cluster for each in job.alternatives)]
            groups.setdefault(repr(clusters), []).append(job)
    chosen: dict[str, Job] = {}
    lines = []
    for group in groups.values():
        clusters = [group[0].cluster, *(each.cluster for each in group[0].alternatives)]
        delays = [functools.cache(functools.partial(_delay, cluster, group[0].stage)) for cluster in clusters]
        limits = [60.0 * (cluster.time or 0) for cluster in clusters]
        counts = shares(len(group), delays, limits)
        places = [number for number, count in enumerate(counts) for _ in range(count)]
        for job, place in zip(group, places, strict=True):
            chosen[job.run_id] = replace([job, *job.alternatives][place], alternatives=())
        for cluster, delay, count in zip(clusters, delays, counts, strict=True):
            start = delay(count) if count else None
            when = f", all start in {start / 60:.0f} min" if start and start > _TIE else ", all start now"
            name = " ".join(_differences(cluster, clusters))
            lines.append(f"{count} with {name}{when if start is not None else ''}")
    plan = [replace(chosen.get(job.run_id, job), alternatives=()) for job in jobs]
    return plan, f"split by sbatch --test-only: {'; '.join(lines)}" if lines else ""


def shares(total: int, delays: Sequence[Delay], limits: Sequence[float]) -> list[int]:
    """Return how many of `total` runs each cluster gets.

    Args:
        total: number of runs.
        delays: of each cluster, the estimate of the s until a number of runs can start together.
        limits: of each cluster, s that a run takes at most: what does not fit waits for earlier runs to end.
    """
    most = [_largest(total, delay) for delay in delays]
    counts = [0] * len(delays)

    def cost(place: int, count: int) -> float:
        if not most[place]:
            return math.inf
        rounds = -(-count // most[place]) - 1
        return (delays[place](min(count, most[place])) or 0.0) + rounds * limits[place]

    while (left := total - sum(counts)) > 0:
        size = min(left, -(-total // _STEPS))
        costs = [cost(place, counts[place] + size) for place in range(len(delays))]
        best = min(costs)
        counts[next(place for place, each in enumerate(costs) if each <= best + _TIE)] += size
    return counts


def _largest(total: int, delay: Delay) -> int:
    """Return the largest number of runs, at most `total`, that can ever start together."""
    low, high = 0, total + 1
    while high - low > 1:
        middle = (low + high + 1) // 2 if low else 1
        low, high = (middle, high) if delay(middle) is not None else (low, middle)
    return low


def _delay(cluster: Cluster, stage: str, runs: int) -> float | None:
    from hpc_imagenet.launch.slurm_jobs.sbatch import ArrayTask, sbatch_script, test_only

    found = re.search(r"to start at (\S+)", test_only(capacity_script(cluster, runs)))
    if found is None and runs == 1:  # a centre that takes no --gpus-per-task or --mem-per-cpu
        script = sbatch_script([ArrayTask("split", stage, "split", cluster, ())], Path("split"))
        found = re.search(r"to start at (\S+)", test_only(script))
    if found is None:
        return None
    try:
        return max(0.0, datetime.fromisoformat(found[1]).timestamp() - time.time())
    except ValueError:
        return None


def capacity_script(cluster: Cluster, runs: int) -> str:
    """Return the script of one job with the tasks of several runs, which may be spread over nodes in any way.

    Memory is requested per CPU, and GPUs per task: the only form that does not depend on the nodes.
    """
    from hpc_imagenet.launch.slurm_jobs.resource_requests import tasks_per_node
    from hpc_imagenet.launch.slurm_jobs.sbatch import extra_sbatch_options

    tasks, cpus = tasks_per_node(cluster, distributed=True), cluster.cpus_per_task or 1
    options: dict[str, Any] = {name: getattr(cluster, name) for name in (*_NAMED, "time")}
    options |= extra_sbatch_options(cluster)
    options |= {"ntasks": runs * cluster.nodes * tasks, "cpus-per-task": cluster.cpus_per_task}
    if cluster.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        options |= {"gpus-per-task": f"{kind}{max(1, cluster.gpus_per_node // tasks)}"}
    if cluster.memory_gb:
        options |= {"mem-per-cpu": f"{math.ceil(cluster.memory_gb * 1024 / (tasks * cpus))}M"}
    lines = [f"#SBATCH --{name}" + ("" if value is True else f"={value}") for name, value in options.items()
             if value is not None and value is not False]  # fmt: skip
    return "\n".join(["#!/bin/sh", *lines, "true", ""])


def _differences(cluster: Cluster, clusters: Sequence[Cluster]) -> list[str]:
    """Return the settings, as typed, in which a cluster differs from the others; the best known ones."""
    values = [asdict(each) for each in clusters]
    names = [name for name in asdict(cluster) if any(each[name] != values[0][name] for each in values)]
    known = [name for name in _NAMED if name in names] or names[:2]
    return [f"cluster.{name}={getattr(cluster, name)}" for name in known]
