"""What Slurm's accounting knows about ended and running jobs: time, CPU, memory, GPU use, energy.

The sums are those of seff: the CPU time of all steps against the allocated CPUs times the elapsed time, and
the highest memory of a step against the allocated memory.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hpc_imagenet.cluster import slurm

_FIELDS = (
    *("JobID", "ElapsedRaw", "TotalCPU", "AllocCPUS", "NTasks", "MaxRSS", "ReqTRES", "AllocTRES"),
    *("TRESUsageInTot", "TRESUsageInAve", "ConsumedEnergyRaw", "TimelimitRaw", "End"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_NO_VALUE = {2**32 - 1, 2**32 - 2, 2**64 - 1, 2**64 - 2}  # Slurm's INFINITE and NO_VAL
_JOBS_PER_QUERY = 500  # a command line has a limit


@dataclass(frozen=True)
class JobUsage:
    """What a job was given and used, over all its starts; None where Slurm did not record it.

    Attributes:
        ended: whether the job and its steps have ended, so that the values do not change any more.
        seconds: time in which it was running.
        cpus, memory_bytes, gpus: allocated, in total over its nodes.
        limit_seconds: its time limit.
        used_cpu_seconds: CPU time of all steps.
        available_cpu_seconds: allocated CPUs times elapsed time.
        used_memory_bytes: highest of the starts, over all tasks of a step.
        gpu_use: share of the time in which a GPU computed, 0 to 1; with AcctGatherProfile or gpuutil only.
        joules: energy of the nodes (ConsumedEnergy), also of other jobs on them.
    """

    ended: bool = False
    seconds: float = 0
    cpus: float | None = None
    memory_bytes: float | None = None
    gpus: float | None = None
    limit_seconds: float | None = None
    used_cpu_seconds: float | None = None
    available_cpu_seconds: float | None = None
    used_memory_bytes: float | None = None
    gpu_use: float | None = None
    joules: float | None = None


@dataclass
class _Start:
    """The lines of one start of a job: the allocation's, and those of its steps."""

    allocation: dict[str, str]
    steps: list[dict[str, str]] = field(default_factory=list)


def query_usage(job_ids: Iterable[str], since: float | None = None) -> dict[str, JobUsage]:
    """Return the usage of jobs by id, from sacct; jobs that it does not know are missing.

    Args:
        job_ids: ids such as `123`, `123_4` for the task of an array, or `123.0` for one step alone,
            which has no values of its own if its allocation was requeued: the starts number steps anew.
        since: s since 1970 before which no job was submitted; a database may know older jobs of the same id.
    """
    ids = sorted(set(job_ids))
    found: dict[str, JobUsage] = {}
    if not shutil.which("sacct"):
        return found
    # --duplicates: a requeued job has a record of every start.
    command = ["sacct", "--noheader", "--parsable2", "--duplicates", f"--format={','.join(_FIELDS)}"]
    if since is not None:
        command.append(f"--starttime={datetime.fromtimestamp(since):%Y-%m-%dT%H:%M:%S}")
    for at in range(0, len(ids), _JOBS_PER_QUERY):
        some = ids[at : at + _JOBS_PER_QUERY]
        jobs = ",".join(sorted({job.partition(".")[0] for job in some}))
        found |= parse_usage(slurm.run_command(*command, f"--jobs={jobs}").stdout, some)
    return found


def parse_usage(output: str, job_ids: Iterable[str]) -> dict[str, JobUsage]:
    """Return the usage of jobs and steps in the lines of sacct that `query_usage` requests."""
    starts: dict[str, list[_Start]] = {}
    for line in output.splitlines():
        row = dict(zip(_FIELDS, line.split("|"), strict=False))
        job, dot, _ = row["JobID"].partition(".")
        if not dot:
            starts.setdefault(job, []).append(_Start(row))
        elif job in starts:
            starts[job][-1].steps.append(row)
    found = {}
    for name in job_ids:
        if known := starts.get(name.partition(".")[0]):
            found[name] = _usage(known, name if "." in name else None)
    return found


def records_energy() -> bool:
    """Whether the cluster measures the energy of its nodes: AcctGatherEnergyType is set."""
    output = slurm.run_command("scontrol", "show", "config").stdout
    found = re.search(r"^AcctGatherEnergyType\s*=\s*(\S+)", output, re.MULTILINE)
    return found is not None and found[1].rpartition("/")[2] not in ("none", "(null)")


def _usage(starts: Sequence[_Start], only_step: str | None) -> JobUsage:
    last = starts[-1].allocation
    tres = _tres(last.get("AllocTRES") or last.get("ReqTRES", ""))
    used: dict[str, list[float]] = {"cpu": [], "available": [], "memory": [], "joules": []}
    gpu_shares, seconds = [], 0.0
    for start in starts:
        steps = [step for step in start.steps if only_step in (None, step["JobID"])]
        if only_step and (not steps or len(starts) > 1):
            continue  # of an allocation that was requeued: each start may number another run like this
        whole = steps[0] if only_step else start.allocation
        elapsed = _number(whole.get("ElapsedRaw")) or 0.0
        seconds += elapsed
        if elapsed and (cpu := _seconds(whole.get("TotalCPU", ""))):  # 0: not measured, as on a lost node
            used["cpu"].append(cpu)
            used["available"].append(elapsed * (_number(whole.get("AllocCPUS")) or 0))
        used["memory"] += [memory for step in steps if (memory := _memory(step))]
        # All steps of a node measure the whole node: the largest, not their sum.
        joules = [_number(line.get("ConsumedEnergyRaw")) or 0 for line in (whole, *steps)]
        used["joules"] += [joules[0] or max(joules)] if max(joules) else []
        gpu_shares += [
            (_number(step.get("ElapsedRaw")) or 0, use / 100)
            for step in steps
            if (use := _number(_tres(step.get("TRESUsageInAve", "")).get("gres/gpuutil")))
        ]
    limit, weight = _number(last.get("TimelimitRaw")), sum(length for length, _ in gpu_shares)
    return JobUsage(
        ended=all(
            row.get("End") not in (None, "", "Unknown")  # of a cancelled job its steps end after it
            for start in starts
            for row in (start.allocation, *start.steps)
        ),
        seconds=seconds,
        cpus=_number(tres.get("cpu")),
        memory_bytes=_bytes(tres.get("mem", "")),
        gpus=_number(tres.get("gres/gpu")),
        limit_seconds=None if limit is None else 60 * limit,
        used_cpu_seconds=sum(used["cpu"]) if used["cpu"] else None,
        available_cpu_seconds=sum(used["available"]) if used["available"] else None,
        used_memory_bytes=max(used["memory"], default=None),
        gpu_use=sum(length * use for length, use in gpu_shares) / weight if weight else None,
        joules=sum(used["joules"]) if used["joules"] else None,
    )


def _memory(step: dict[str, str]) -> float | None:
    """Return the bytes of all tasks of a step at their peaks."""
    if total := _bytes(_tres(step.get("TRESUsageInTot", "")).get("mem", "")):
        return total
    peak = _bytes(step.get("MaxRSS", ""))
    return None if peak is None else peak * (_number(step.get("NTasks")) or 1)


def _tres(text: str) -> dict[str, str]:
    """Return the resources of `cpu=4,mem=8G,gres/gpu=2` by name."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name: value for name, equals, value in pairs if equals}


def _bytes(text: str) -> float | None:
    found = re.fullmatch(r"([\d.]+)([KMGTP]?)", text)
    return float(found[1]) * _UNITS[found[2]] if found else None


def _seconds(text: str) -> float | None:
    """Return the s of [DD-[HH:]]MM:SS[.mmm]."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 86_400 * days + 3600 * hours + 60 * minutes + seconds


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if value not in _NO_VALUE else None
