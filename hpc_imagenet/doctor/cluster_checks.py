"""Checks on the login node: Slurm's commands and configuration, whether it accepts jobs, the workspace."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.doctor.check_result import Finding, StageCluster, fail, gigabytes, ok, warn
from hpc_imagenet.doctor.probe import probe_disk
from hpc_imagenet.launch.slurm_jobs import sbatch

Partitions = Mapping[str, Mapping[str, str]]  # settings of each partition, such as MaxTime, by its name

_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_SLOW_REPLY = 10.0  # s
_ACCOUNTING_DELAY = 10.0  # s that accounting may lag
_WITHOUT_SACCT = "states come from squeue and from the run folders"

# Pattern in a refusal of sbatch, or in a pending job's reason → settings that can cause it; first match.
_CAUSES = (
    (r"account|assoc", ("account", "partition")),
    (r"time ?limit", ("time",)),
    (r"node ?limit", ("nodes",)),
    (r"partition", ("partition",)),
    (r"qos", ("qos",)),
    (r"feature|constraint", ("constraint",)),
    (r"memory", ("memory_gb",)),
    (r"gres|generic resource|gpu", ("gpus_per_node", "sbatch")),
    (r"node count|configuration|\bavailable", ("nodes", "gpus_per_node", "cpus_per_task", "memory_gb")),
    (r"option|reservation|licen|held", ("sbatch",)),
)


def causes(message: str) -> tuple[str, ...]:
    """Return the cluster settings that a message of Slurm can be about; empty if unknown."""
    return next((names for pattern, names in _CAUSES if re.search(pattern, message, re.IGNORECASE)), ())


def check_commands() -> Finding:
    """Check that Slurm's commands are on the PATH."""
    if missing := [name for name in _COMMANDS if not shutil.which(name)]:
        fix = "use a login node, or load the module that provides Slurm; cluster=local needs none"
        return fail(f"not on the PATH: {', '.join(missing)}", fix)
    version = slurm.run_command("sbatch", "--version").stdout.strip()
    return ok(f"{' '.join(_COMMANDS)} ({version or 'unknown version'})")


def check_squeue() -> Finding:
    """Check that the controller replies, and how fast."""
    began = time.monotonic()
    done = slurm.run_command("squeue", "--noheader", f"--user={os.getuid()}", "--format=%i")
    seconds = time.monotonic() - began
    if done.returncode:
        fix = "retry later; set SLURM_CONF if this cluster's slurm.conf is not in /etc/slurm"
        return fail(f"fails ({_last_line(done.stderr)})", fix)
    return (warn if seconds > _SLOW_REPLY else ok)(f"replies after {seconds:.1f} s")


def check_sacct(job_id: str = "") -> Finding:
    """Check that accounting replies, and that it knows a job that has just ended, if one is given.

    Accounting is optional: only the states of some ended jobs depend on it.
    """
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State"]
    command += [f"--jobs={job_id}"] if job_id else ["--starttime=now-1minutes"]
    deadline = time.monotonic() + _ACCOUNTING_DELAY
    while True:
        done = slurm.run_command(*command)  # fails if it is not on the PATH
        state = done.stdout.strip().lower().replace("_", " ")
        if done.returncode:
            return warn(f"fails ({_last_line(done.stderr)}): {_WITHOUT_SACCT}")
        if not job_id:
            return ok("replies")
        if state and state.split()[0] not in ("running", "pending", "completing"):
            return ok(f"knows the probe: {state}")
        if time.monotonic() > deadline:
            return warn(f"does not know that the probe ended: {_WITHOUT_SACCT}")
        time.sleep(0.2)


def partitions() -> Partitions:
    """Return the partitions by `scontrol show partition`; empty if it fails."""
    lines = slurm.run_command("scontrol", "show", "partition", "--oneliner").stdout.splitlines()
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    return {each["PartitionName"]: each for each in found if each.get("PartitionName")}


def slurm_settings() -> dict[str, str]:
    """Return the settings by `scontrol show config`; empty if it fails."""
    text = slurm.run_command("scontrol", "show", "config").stdout
    return {name: value.strip() for name, value in re.findall(r"^(\w+)\s*=\s*(.*)$", text, re.MULTILINE)}


def check_arrays(settings: Mapping[str, str]) -> Finding:
    """Report the largest sweep that fits into one job array."""
    if "MaxArraySize" not in settings:
        return warn("scontrol show config does not print MaxArraySize")
    return ok(f"at most {slurm.max_array_size()} jobs (MaxArraySize); a larger sweep is split")


def check_requeue(cluster: Cluster, settings: Mapping[str, str]) -> Finding:
    """Check that Slurm restarts our jobs after a node failure or a preemption."""
    if "no-requeue" in sbatch.extra_sbatch_options(cluster):
        return warn("cluster.sbatch turns requeue off: use the command retry after a preemption")
    default = ", although JobRequeue=0 here" if settings.get("JobRequeue") == "0" else ""
    return ok(f"jobs request it, at most cluster.max_requeues={cluster.max_requeues} times{default}")


def check_preemption(cluster: Cluster, settings: Mapping[str, str], known: Partitions) -> Finding:
    """Report what a preemption does to a training."""
    if not settings:
        return warn("scontrol show config fails")
    kind, mode = settings.get("PreemptType", ""), settings.get("PreemptMode", "")
    if kind.endswith("none") or mode == "OFF":
        return ok("jobs are not preempted")
    usable = usable_partitions(cluster, known)
    if kind.endswith("partition_prio"):
        mode = next((each["PreemptMode"] for each in usable.values() if "PreemptMode" in each), mode)
    if mode == "OFF":
        return ok(f"not in partition {', '.join(usable)}")
    if "CANCEL" in mode:
        return warn("preempted jobs are cancelled: retry RUN resumes from the last checkpoint")
    if "REQUEUE" not in mode:
        return ok(f"preempted jobs are suspended and continue later (PreemptMode={mode})")
    grace = max((int(g) for each in usable.values() if (g := each.get("GraceTime", "")).isdigit()), default=0)
    if grace:
        return ok(f"preempted jobs save a checkpoint within {grace} s (GraceTime) and are requeued")
    fix = "a preemption can cost as much work as train.checkpoint_every_minutes"
    return warn("preempted jobs are requeued without a warning (GraceTime=0)", fix)


def check_accepted(target: StageCluster, known: Partitions, folder: Path) -> Finding:
    """Check by `sbatch --test-only` that Slurm accepts a job of a stage; nothing is submitted."""
    cluster, time_setting = target.cluster, target.setting("time")
    if cluster.time is None:
        return fail("has no time limit", f"set it in minutes, such as {time_setting}=1440")
    job = sbatch.ArrayTask("doctor", target.stage, target.stage, cluster, ())
    message = sbatch.test_only(sbatch.sbatch_script([job], folder))
    if "to start at" not in message:
        names = causes(message) or ("partition", "account", "qos")
        fix = " or ".join(f"{target.setting(name)}={_value_text(getattr(cluster, name))}" for name in names)
        choice = f" (partitions: {', '.join(known)})" if known and "partition" in names else ""
        return fail(f"Slurm refuses the job ({message})", f"change {fix}{choice}")
    usable = usable_partitions(cluster, known)
    limits = [_minutes(each.get("MaxTime", "")) for each in usable.values()]
    finite = [limit for limit in limits if limit is not None]
    # Without EnforcePartLimits Slurm accepts such a job and never starts it.
    if usable and len(finite) == len(limits) and cluster.time > max(finite):
        fix = f"set {time_setting}={max(finite)}; a training continues in a new job by itself"
        return fail(f"{time_setting}={cluster.time} exceeds partition {', '.join(usable)}'s limit", fix)
    found = "Slurm accepts the job"
    if start := re.search(r"to start at (\S+).*?on nodes? (\S+)(?: in partition (\S+))?", message):
        found += f" and would start it at {start[1].replace('T', ' ')} on {start[2]}"
        found += f" in partition {start[3]}" if start[3] else ""
    closed = [f"{name} is {s.lower()}" for name in usable if (s := usable[name].get("State", "UP")) != "UP"]
    return warn(f"{found}, but partition {', '.join(closed)}") if closed else ok(found)


def check_workspace(config: Config) -> Finding:
    """Create the workspace's folder of runs and check that it is writable and has free space."""
    folder, other = Path(config.workspace), "another folder: workspace=FOLDER"
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return fail(f"{folder} cannot be created ({error.strerror})", f"choose {other}")
    disk = probe_disk(folder / "runs")
    found = disk["text"]
    if disk["error"]:
        return fail(f"{folder} is not writable ({disk['error']})", f"choose {other}")
    if disk["full"]:
        return fail(f"{found}: it is full", f"free some space, or choose {other}")
    needed, archives = archive_bytes(config), folder / "archives" / config.dataset.name
    if disk["free"] < needed and not archives.is_dir():
        found += f", less than the {gigabytes(needed)} of dataset {config.dataset.name}"
        return warn(
            found, "if its archives are on this file system already, link them: dataset.source=FOLDER"
        )
    if disk["kind"] == "tmpfs":
        return warn(found, "files in memory are lost when the machine restarts")
    return ok(found)


def archive_bytes(config: Config) -> int:
    """Return the size of the dataset's archives in bytes, as far as it is known."""
    return sum(archive.bytes or 0 for archive in config.dataset.archives.values())


def usable_partitions(cluster: Cluster, known: Partitions) -> Partitions:
    """Return the partitions that jobs of this cluster may use: those set, else the default one."""
    if cluster.partition:
        return {name: known[name] for name in cluster.partition.split(",") if name in known}
    return {name: each for name, each in known.items() if each.get("Default") == "YES"}


def _minutes(text: str) -> int | None:
    """Return Slurm's `1-12:30:00` in minutes; None for UNLIMITED and anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    return int(found[1] or 0) * 1440 + int(found[2]) * 60 + int(found[3]) if found else None


def _value_text(value: object) -> str:
    return "null" if value is None else "…" if isinstance(value, (dict, list)) else str(value)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a message"])[-1]
