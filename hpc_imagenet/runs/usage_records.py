"""What an attempt requested, what its tasks used, and when it was last known to run.

Every task of every start records its own usage in `attempts/<n>/usage/<restarts>-<rank>.json`, several times
while it runs, so that a task that is killed leaves its last record.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeGuard

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.runs.attempt import Attempt, instant, is_number, read_record
from hpc_imagenet.runs.store import Run

_GIB = 2**30


@dataclass(frozen=True)
class Usage:
    """What an attempt used, over all its starts, nodes and tasks; None where nothing was recorded.

    Attributes:
        cpus: CPUs that the tasks could use at the same time.
        cpu_seconds: CPU time, of user and system.
        available_cpu_seconds: CPUs that the tasks could use, times their s.
        memory_bytes: highest memory of a start: the sum of the peaks of its tasks, over all its nodes.
        gpu_use: share of the time in which a GPU computed, 0 to 1, mean over GPUs.
        joules: energy of the GPUs; one that several tasks see counts once.
        gpus: highest number of GPUs of a start: a job that is requeued may get others.
    """

    cpus: float | None = None
    cpu_seconds: float | None = None
    available_cpu_seconds: float | None = None
    memory_bytes: float | None = None
    gpu_use: float | None = None
    joules: float | None = None
    gpus: int = 0


def usage_path(attempt: Attempt, restarts: int, rank: int) -> Path:
    """Return the file in which a task records its usage."""
    return attempt.folder / "usage" / f"{restarts}-{rank}.json"


def read_usage(*attempts: Attempt) -> Usage:
    """Return what an attempt, or several ones together, used as far as the tasks have recorded it."""
    paths = [path for attempt in attempts for path in sorted(attempt.folder.glob("usage/*-*.json"))]
    records = [_numbers(read_record(path)) for path in paths]
    records = [record for record in records if record]
    memory: dict[Any, float] = defaultdict(float)
    cpus: dict[Any, float] = defaultdict(float)
    gpus: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in records:
        node = record["restarts"], record["host"]
        memory[record["restarts"]] += record["memory_bytes"]
        cpus[record["restarts"]] += record["cpus"]
        for uuid, measured in record["gpus"].items():
            key = (*node, uuid)
            if key not in gpus or measured["seconds"] > gpus[key]["seconds"]:
                gpus[key] = measured
    observed = [gpu for gpu in gpus.values() if "use" in gpu]
    seconds = sum(gpu["seconds"] for gpu in observed)
    joules = [gpu["joules"] for gpu in gpus.values() if "joules" in gpu]
    return Usage(
        cpus=max(cpus.values(), default=None),
        cpu_seconds=sum(record["cpu_seconds"] for record in records) if records else None,
        available_cpu_seconds=sum(r["cpus"] * r["seconds"] for r in records) if records else None,
        memory_bytes=max(memory.values(), default=None),
        gpu_use=sum(gpu["use"] * gpu["seconds"] for gpu in observed) / seconds if seconds else None,
        joules=sum(joules) if joules else None,
        gpus=max(Counter(restarts for restarts, *_ in gpus).values(), default=0),
    )


def last_seen(attempt: Attempt) -> datetime | None:
    """Return when an attempt was last known to run; None if it has not started.

    If it has no outcome, because Slurm or a lost machine ended it or its job was requeued, this is the best
    record of when its newest start stopped: the latest of that start, of the usage of its first task, and of
    the progress of its run. Other tasks record the same time, in thousands of files.
    """
    started, run = attempt.started, Run(attempt.folder.parents[1])
    begin = instant(started.get("time"))
    if begin is None:
        return None
    found = [begin]
    with contextlib.suppress(OverflowError, PermissionError):  # a damaged record, or one of another user
        seconds = read_record(usage_path(attempt, started.get("restarts", 0), 0)).get("seconds")
        if _is_amount(seconds):
            found.append(begin + timedelta(seconds=seconds))
    later = [instant(each.started.get("time")) for each in run.attempts() if each.number > attempt.number]
    progress = instant(run.progress.get("time"))
    if progress and all(progress < start for start in later if start):  # else it is of a later attempt
        found.append(progress)
    return max(found)


def requested_by(cluster: Cluster) -> dict[str, float]:
    """Return the resources that cluster settings request, in total over the nodes.

    Returns:
        Those of gpus, cpus, memory_bytes and limit_seconds that are set.
    """
    gpus = {} if cluster.gpus_per_node is None else {"gpus": cluster.nodes * int(cluster.gpus_per_node)}
    others = {
        "cpus": cluster.tasks * (cluster.cpus_per_task or 0),
        "memory_bytes": cluster.nodes * float(cluster.memory_gb or 0) * _GIB,
        "limit_seconds": 60 * float(cluster.time or 0),
    }
    return numbers_of({**gpus, **{name: value for name, value in others.items() if value}})


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the values of a record that are finite numbers."""
    return {name: value for name, value in record.items() if is_number(value)}


_NUMBERS = ("restarts", "seconds", "cpus", "cpu_seconds", "memory_bytes")


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what is no finite number; empty if one that must exist is missing."""
    if not all(_is_amount(record.get(name)) for name in _NUMBERS):
        return {}
    found, gpus = {name: record[name] for name in _NUMBERS}, record.get("gpus")
    found["host"] = str(record.get("host"))
    found["gpus"] = {
        str(uuid): {name: value for name, value in gpu.items() if _is_amount(value)}
        for uuid, gpu in (gpus.items() if isinstance(gpus, dict) else ())
        if isinstance(gpu, dict) and _is_amount(gpu.get("seconds"))
    }
    return found


def _is_amount(value: Any) -> TypeGuard[float]:
    return is_number(value) and value >= 0
