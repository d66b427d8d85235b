"""Resources of the attempts of runs: requested and used, as seff shows them, and their energy.

The tasks record what they use (`runs.usage_records`); of Slurm jobs sacct knows more, also of tasks that were
killed. Its answers about ended jobs are kept in `attempts/<n>/accounting.json`, since clusters delete theirs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from hpc_imagenet.cluster import slurm, slurm_accounting
from hpc_imagenet.cluster.slurm_accounting import JobUsage
from hpc_imagenet.config.schema import cluster_from
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.slurm_jobs.slurm_executor import SlurmExecutor
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.show.attempt_times import intervals, running_hours, seconds_since_1970
from hpc_imagenet.runs.attempt import Attempt, read_record
from hpc_imagenet.runs.store import Run
from hpc_imagenet.runs.usage_records import numbers_of, read_usage, requested_by

ACCOUNTING_FILE = "accounting.json"
_JOULES_PER_KWH = 3.6e6
_GIB = 2**30
_BRIEF = 1 / 60  # hours that an attempt may have run without a record of its energy
_MARGIN = 3600.0  # s by which the clocks of this machine and of Slurm may differ


def resources_of(run: Run, attempt: Attempt, state: str, usage: JobUsage | None) -> dict[str, Any]:
    """Return what an attempt was given and what it used; None where no record has it.

    Args:
        run: the run.
        attempt: one of its attempts.
        state: the state of the run, of its newest attempt, as in `attempt_times.intervals`.
        usage: what Slurm knows of its job (`slurm_usage`).

    Returns:
        hours, cpus, used_cpu_seconds, cpu_efficiency (0 to 1), memory_bytes, used_memory_bytes (peak), gpus,
        gpu_use (0 to 1), gpu_hours, limit_seconds, kwh and energy_of (`GPUs` or `nodes`).
    """
    own, usage = read_usage(attempt), usage or JobUsage()
    requested = _requested(attempt, requested_resources(run.readable_config()))
    hours = running_hours(intervals(attempt, state))
    measured = usage if usage.ended else JobUsage()  # of steps that are running, sacct has 0 or nothing
    used, available = measured.used_cpu_seconds, measured.available_cpu_seconds
    if used is None or not available:
        used, available = own.cpu_seconds, own.available_cpu_seconds
    kwh, energy_of = energy(attempt, usage)
    gpus = gpus_of(attempt, requested, usage)
    return {
        "hours": hours,
        "cpus": usage.cpus or requested.get("cpus") or own.cpus,
        "used_cpu_seconds": used,
        "cpu_efficiency": used / available if used is not None and available else None,
        "memory_bytes": usage.memory_bytes or requested.get("memory_bytes"),
        "used_memory_bytes": measured.used_memory_bytes or own.memory_bytes,
        "gpus": gpus,
        "gpu_use": own.gpu_use if measured.gpu_use is None else measured.gpu_use,
        "gpu_hours": gpus * hours,
        "limit_seconds": usage.limit_seconds or requested.get("limit_seconds"),
        "kwh": kwh,
        "energy_of": energy_of,
    }


def gpus_of(attempt: Attempt, requested: Mapping[str, float], usage: JobUsage | None = None) -> float:
    """Return the number of GPUs of an attempt; runs that share a job have equal shares of its GPUs.

    Args:
        attempt: the attempt.
        requested: `requested_resources` of its run, for an attempt that has not recorded its own.
        usage: what Slurm knows of its job; None: what is kept of that.
    """
    usage, requested = usage or _kept(attempt), _requested(attempt, requested)
    # What a job got, before what it requested: runs that share a loader on this machine get one GPU each.
    count = (usage.gpus if usage else None) or _local_gpus(attempt) or requested.get("gpus")
    if count is None:
        count = read_usage(attempt, *_others_of_job(attempt)).gpus
    return count / _runs_of_job(attempt)


def energy(attempt: Attempt, usage: JobUsage | None) -> tuple[float | None, str]:
    """Return the kWh of an attempt and of what: its `GPUs` (by NVML), else its `nodes` (by Slurm).

    Runs that share a job have equal shares of what its nodes or the same GPUs used.
    """
    own, runs = read_usage(attempt), _runs_of_job(attempt)
    if own.joules is not None:
        share = 1.0
        if runs > 1:  # each has recorded whole GPUs, on which others may have run as well
            requested = requested_resources(Run(attempt.folder.parents[1]).readable_config())
            share = min(1.0, gpus_of(attempt, requested, usage) / own.gpus)
        return share * own.joules / _JOULES_PER_KWH, "GPUs"
    if usage and usage.joules:
        return usage.joules / runs / _JOULES_PER_KWH, "nodes"
    return None, ""


def needs_slurm(attempt: Attempt) -> bool:
    """Whether only Slurm can know the energy of an attempt."""
    return attempt.submitted.get("executor") == SlurmExecutor.name and energy(attempt, None)[0] is None


def energies_of(runs: Iterable[Run]) -> dict[str, tuple[float | None, str]]:
    """Return the kWh of each run over all its attempts, by its id, and of what; see `energy`.

    Slurm is queried only if the cluster measures energy, and only about jobs that did not record their own.
    """
    attempts = {run.id: run.attempts() for run in runs}
    usages: dict[Attempt, JobUsage] = {}
    unmeasured = [attempt for each in attempts.values() for attempt in each if needs_slurm(attempt)]
    if unmeasured and slurm.is_available() and slurm_accounting.records_energy():
        usages = slurm_usage(unmeasured)
    else:
        usages = {attempt: kept for attempt in unmeasured if (kept := _kept(attempt))}
    return {
        run_id: total_energy([(energy(attempt, usages.get(attempt)), _ran(attempt)) for attempt in each])
        for run_id, each in attempts.items()
    }


def total_energy(measured: Sequence[tuple[tuple[float | None, str], float]]) -> tuple[float | None, str]:
    """Return the kWh of several attempts, each with its hours; unknown if one that ran has no record."""
    if any(kwh is None and hours > _BRIEF for (kwh, _), hours in measured):
        return None, ""
    known = [(kwh, of) for (kwh, of), _ in measured if kwh is not None]
    return (sum(kwh for kwh, _ in known), known[-1][1]) if known else (None, "")


def _ran(attempt: Attempt) -> float:
    return running_hours(intervals(attempt))


def slurm_usage(attempts: Sequence[Attempt]) -> dict[Attempt, JobUsage]:
    """Return what Slurm knows of the attempts that are its jobs, with at most a few queries."""
    found, requested = {}, {}
    for attempt in attempts:
        submitted = attempt.submitted
        if submitted.get("executor") != SlurmExecutor.name or not submitted.get("job_id"):
            continue
        if kept := _kept(attempt):
            found[attempt] = kept
        else:
            requested[attempt] = f"{submitted['job_id']}{_step(attempt)}"
    if not requested:
        return found
    times = [seconds_since_1970(attempt.submitted.get("time")) for attempt in requested]
    since = min((time for time in times if time), default=0.0) - _MARGIN
    usages = slurm_accounting.query_usage(requested.values(), max(0.0, since))
    for attempt, job in requested.items():
        if job in usages:
            found[attempt] = usages[job]
            if usages[job].ended and attempt.outcome:
                with contextlib.suppress(OSError):  # the run of another user
                    write_json(attempt.folder / ACCOUNTING_FILE, asdict(usages[job]))
                    os.utime(attempt.folder.parent)  # so that no `EndedRunCache` keeps what it had without it
    return found


def describe_resources(found: dict[str, Any]) -> str:
    """Return the result of `resources_of` in one line."""
    gpus = found["gpus"]
    parts = [
        f"ran {clock(3600 * found['hours'])}"
        + (f" of {clock(found['limit_seconds'])}" if found["limit_seconds"] else ""),
        _share("CPU", found["cpu_efficiency"], _count(found["cpus"], "CPU")),
        _memory(found["used_memory_bytes"], found["memory_bytes"]),
        _share("GPU", found["gpu_use"], _count(gpus, "GPU")) if gpus else "",
        f"{found['gpu_hours']:.2f} GPU-hours" if gpus else "",
        f"{found['kwh']:.3g} kWh of its {found['energy_of']}"
        if found["kwh"] is not None
        else "energy unknown",
    ]
    return " · ".join(part for part in parts if part)


def _share(name: str, share: float | None, of: str) -> str:
    used = "unknown" if share is None else f"{share:.0%}"
    return f"{name} {used}{f' of {of}' if of else ''}"


def _count(number: float | None, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}" if number else ""


def _memory(used: float | None, given: float | None) -> str:
    text = "memory unknown" if used is None else f"memory {_size(used)}"
    if given:
        text += f" of {_size(given)}"
        text += f" ({used / given:.0%})" if used is not None else ""
    return text


def _size(count: float) -> str:
    return f"{count / _GIB:.3g} GiB" if count >= _GIB / 10 else f"{1024 * count / _GIB:.0f} MiB"


def requested_resources(frozen: dict[str, Any]) -> dict[str, float]:
    """Return the resources that a frozen config sets, as `requested_by`; empty for a damaged one."""
    try:
        return requested_by(cluster_from(frozen, frozen["stage"]["name"]))
    except Exception:  # a config of another version: any error of the schema
        return {}


def _requested(attempt: Attempt, present: Mapping[str, float]) -> Mapping[str, float]:
    """Return the resources that an attempt requested, else those of the present config of its run."""
    recorded = attempt.started.get("requested")
    return numbers_of(recorded) if isinstance(recorded, dict) else present


def _runs_of_job(attempt: Attempt) -> int:
    others = attempt.submitted.get("shares_with")
    return 1 + len(others) if isinstance(others, list) else 1


def _others_of_job(attempt: Attempt) -> list[Attempt]:
    """Return the attempts of the runs that share its job: of several GPUs each run sees only its own."""
    submitted, found = attempt.submitted, []
    with contextlib.suppress(OSError, TypeError, ValueError):  # it shares none, or the record is damaged
        for other in submitted.get("shares_with", ()):
            found += Run(attempt.folder.parents[2] / other).attempts()
    return [each for each in found if each.submitted.get("job_id") == submitted.get("job_id")]


def _local_gpus(attempt: Attempt) -> int:
    gpus = read_record(attempt.folder / "process.json").get("gpus")
    return len(gpus) if isinstance(gpus, list) else 0


def _step(attempt: Attempt) -> str:
    """Return `.0`, the step of a run in an allocation of the user; empty if the whole job is this run."""
    step, run = attempt.started.get("step"), Run(attempt.folder.parents[1])
    cluster = run.readable_config().get("cluster") if step else None
    executor = cluster.get("executor") if isinstance(cluster, dict) else None
    return f".{step}" if executor not in (None, SlurmExecutor.name) else ""


def _kept(attempt: Attempt) -> JobUsage | None:
    record = read_record(attempt.folder / ACCOUNTING_FILE)
    names = {entry.name for entry in fields(JobUsage)}
    numbers: dict[str, Any] = {
        name: value
        for name, value in record.items()
        if name in names and (value is None or isinstance(value, (int, float)))
    }
    return replace(JobUsage(), **numbers) if numbers else None
