"""The settings that a retry changes after a failure: none of them is part of the signature."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpc_imagenet.cluster.partition_limits import PartitionLimits, partition_limits
from hpc_imagenet.runs.attempt import Attempt, is_number, read_record
from hpc_imagenet.runs.checkpoints import LAST
from hpc_imagenet.runs.store import Run

PLACEHOLDER = "RUN"
_MORE_MEMORY = 1.5  # factor
_MORE_TIME = 2  # factor
_MORE_REQUEUES = 2  # factor
# Slurm's own lines that name a node.
_NODE = re.compile(
    r"^(?:srun|slurmstepd): .*(?:Node failure on|DUE TO NODE|failed on node) ([\w.-]*\w)", re.IGNORECASE
)
# Units of memory in options of sbatch, in MB.
_UNITS = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}
_BEFORE_LIMIT = 100.0  # s before the time limit, in which the warning signal may end a job


@dataclass(frozen=True)
class Failure:
    """A failed attempt and the evidence of its cause.

    Attributes:
        frozen: the frozen config, which another version may have written; empty if it is damaged.
        evidence: the line that shows the cause.
        lines: the last lines of its error logs.
    """

    run: Run
    attempt: Attempt | None
    frozen: dict[str, Any]
    evidence: str
    lines: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return str(self.run.info.get("stage", ""))

    def cluster(self, name: str) -> tuple[str, Any]:
        """Return the full name of a cluster setting where the stage has it, and its value."""
        return cluster_setting(self.frozen, self.stage, name)

    def reached_time_limit(self) -> bool:
        """Whether the attempt ran about as long as cluster.time allows."""
        limit = self.cluster("time")[1]
        outcome = self.attempt.outcome if self.attempt else None
        if not isinstance(limit, (int, float)) or outcome is None or self.attempt is None:
            return False
        try:
            begin = datetime.fromisoformat(self.attempt.started["time"])
            seconds = (datetime.fromisoformat(outcome.time) - begin).total_seconds()
        except (KeyError, TypeError, ValueError):
            return False
        return bool(seconds >= 60 * limit - _BEFORE_LIMIT and seconds > 24 * limit)

    def kept_work(self) -> bool:
        """Whether a training has saved a checkpoint since its last start, from which the next one resumes."""
        if self.attempt is None or self.stage != "train":
            return False
        try:  # both times are of the file system of the workspace
            began = (self.attempt.folder / "started.json").stat().st_mtime
            return (self.run.folder / "checkpoints" / LAST).stat().st_mtime > began
        except OSError:
            return False

    def partition_limits(self) -> PartitionLimits:
        """Return the limits of its partition; unknown of a job that is not on Slurm."""
        if not _on_slurm(self):
            return PartitionLimits()
        found = (self.cluster(name)[1] for name in ("nodes", "gpus_per_node"))
        nodes, gpus = (int(value) if is_number(value) else 0 for value in found)
        nodes = max(1, nodes) if self.stage == "train" else 1
        return partition_limits(self.cluster("partition")[1], nodes, gpus)


def cluster_setting(frozen: dict[str, Any], stage: str, name: str) -> tuple[str, Any]:
    """Return the full name of a cluster setting and its value: of `cluster.stage.<stage>` if it has it."""
    cluster = frozen.get("cluster")
    cluster = cluster if isinstance(cluster, dict) else {}
    own = (cluster.get("stage") or {}).get(stage) or {}
    if name in own:
        return f"cluster.stage.{stage}.{name}", own[name]
    return f"cluster.{name}", cluster.get(name)


def remedy_for(kind: str, failure: Failure) -> dict[str, Any]:
    """Return the settings to change for a kind of failure of `diagnosis.CLASSES`; empty if there are none."""
    make = _REMEDIES.get(kind)
    return make(failure) if make else {}


def _more_memory(failure: Failure) -> dict[str, Any]:
    if _on_slurm(failure):
        name, memory = failure.cluster("memory_gb")  # 0: all memory of the node
        if not memory:
            return _more_memory_of_sbatch(failure)
        most = failure.partition_limits().memory
        return _raised(name, memory, _MORE_MEMORY, None if most is None else most // 1024)
    return _accumulate(failure) if failure.stage == "train" else {}


def _more_memory_of_sbatch(failure: Failure) -> dict[str, Any]:
    """Return a larger mem-per-cpu or mem-per-gpu of cluster.sbatch, if it has one."""
    name, options = failure.cluster("sbatch")
    gpus, cpus = (failure.cluster(each)[1] or 1 for each in ("gpus_per_node", "cpus_per_task"))
    tasks = _tasks(failure) // (failure.cluster("nodes")[1] or 1) if failure.stage == "train" else 1
    shares = {"mem-per-cpu": cpus * tasks, "mem-per-gpu": gpus}  # of a node's memory
    for option, value in (options or {}).items():
        found = re.fullmatch(r"(\d+)([KMGT]?)", str(value), re.IGNORECASE)
        if found and (count := shares.get(option.replace("_", "-"))):
            memory, unit, most = int(found[1]), found[2], failure.partition_limits().memory
            limit = None if most is None else int(most / count / _UNITS[unit.upper()])
            raised = _raised(f"{name}.{option}", memory, _MORE_MEMORY, limit)
            return {key: f"{more}{unit}" for key, more in raised.items()}
    return {}


def _raised(name: str, value: float, factor: float, limit: int | None) -> dict[str, Any]:
    """Return a setting times a factor, at most the limit; empty if that is not more than it is."""
    if not is_number(value):
        return {}
    more = math.ceil(factor * value)
    more = more if limit is None else min(more, limit)
    return {name: more} if more > value else {}


def _accumulate(failure: Failure) -> dict[str, Any]:
    """Return the next train.accumulate: the one that the training named, else computed in the same way."""
    if named := re.search(r"train\.accumulate=(\d+)", failure.evidence):
        return {"train.accumulate": int(named[1])}
    try:
        batch = int(failure.frozen["recipe"]["global_batch"])
        present = int(failure.frozen["train"]["accumulate"])
    except (KeyError, TypeError, ValueError):
        return {}
    share = batch // _tasks(failure)
    larger = [parts for parts in range(2 * present, share + 1) if share % parts == 0]
    return {"train.accumulate": larger[0]} if larger else {}


def _tasks(failure: Failure) -> int:
    """Return the number of tasks of a training."""
    nodes, tasks, gpus = (failure.cluster(name)[1] for name in ("nodes", "tasks_per_node", "gpus_per_node"))
    if gpus is None and failure.attempt:  # the local queue gave it the GPUs that were free
        gpus = len(read_record(failure.attempt.folder / "process.json").get("gpus") or ())
    return int(nodes or 1) * int(tasks or gpus or 1)


def _more_time(failure: Failure) -> dict[str, Any]:
    name, minutes = failure.cluster("time")
    return _raised(name, minutes, _MORE_TIME, failure.partition_limits().minutes) if minutes else {}


def _exclude_node(failure: Failure) -> dict[str, Any]:
    if not _on_slurm(failure) or not (node := _failed_node(failure)):
        return {}
    name, options = failure.cluster("sbatch")
    excluded = str((options or {}).get("exclude") or "")
    if node in excluded.split(","):
        return {}
    return {f"{name}.exclude": f"{excluded},{node}" if excluded else node}


def _failed_node(failure: Failure) -> str:
    """Return the node that Slurm names, else the only node of the job; empty if that is unknown."""
    for line in (failure.evidence, *reversed(failure.lines)):
        if found := _NODE.match(line):
            return found[1]
    started = failure.attempt.started if failure.attempt else {}
    nodes = str(started.get("nodes") or "")
    return nodes if re.fullmatch(r"[\w.-]+", nodes) else ""


def _more_requeues(failure: Failure) -> dict[str, Any]:
    name, most = failure.cluster("max_requeues")
    used_up = "max_requeues" in failure.evidence and isinstance(most, int)
    return {name: max(10, _MORE_REQUEUES * most)} if used_up else {}


def _on_slurm(failure: Failure) -> bool:
    return bool(failure.cluster("executor")[1] == "slurm")


_REMEDIES: dict[str, Callable[[Failure], dict[str, Any]]] = {
    "host_memory": _more_memory,
    "device_memory": _accumulate,
    "time_limit": _more_time,
    "node_failure": _exclude_node,
    "requeued_too_often": _more_requeues,
}
