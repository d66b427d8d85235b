"""The login side: Slurm's commands, what Slurm says of itself and of our jobs, and the workspace."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from hpc_imagenet.config.schema import Cluster, Config
from hpc_imagenet.doctor.check_result import (
    FAIL,
    OK,
    WARN,
    CheckResult,
    free_space_text,
    is_full,
    setting,
    size_text,
)
from hpc_imagenet.doctor.probe import probe_disk
from hpc_imagenet.launch import sbatch, slurm

LOGIN = "login"  # where these lines belong
_NEEDED = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_SLOW = 10.0  # s for an answer of squeue

# What sbatch says → the settings that it may be about; the first that fits.
_REFUSALS = (
    (r"account", ("account", "partition")),
    (r"partition", ("partition",)),
    (r"qos", ("qos",)),
    (r"feature", ("constraint",)),
    (r"time ?limit", ("time",)),
    (r"memory", ("memory_gb",)),
    (r"gres|generic resource|gpu", ("gpus_per_node", "sbatch")),
    (r"node count|configuration|available", ("nodes", "gpus_per_node", "cpus_per_task", "memory_gb")),
    (r"option|reservation|licen", ("sbatch",)),
)


def check_commands() -> CheckResult:
    """Return whether Slurm's commands are on the PATH."""
    missing = [name for name in _NEEDED if not shutil.which(name)]
    if missing:
        return CheckResult(
            LOGIN,
            "commands",
            FAIL,
            f"no {', '.join(missing)} on the PATH",
            "go to a login node, or load the module that has Slurm; cluster=local needs none",
        )
    version = slurm.run_command("sbatch", "--version").stdout.strip()
    return CheckResult(LOGIN, "commands", OK, f"{' '.join(_NEEDED)} ({version or 'of an unknown version'})")


def check_squeue() -> CheckResult:
    """Return whether the queue answers."""
    began = time.monotonic()
    done = slurm.run_command("squeue", "--noheader", f"--user={os.getuid()}", "--format=%i")
    took = time.monotonic() - began
    if done.returncode:
        return CheckResult(
            LOGIN,
            "squeue",
            FAIL,
            f"does not answer ({_last(done.stderr)})",
            "ask again; SLURM_CONF must name this cluster's slurm.conf where that is not /etc/slurm",
        )
    if took > _SLOW:
        return CheckResult(LOGIN, "squeue", WARN, f"answers after {took:.0f} s", "jobs will be as slow")
    return CheckResult(LOGIN, "squeue", OK, f"answers within {took:.1f} s")


def check_sacct() -> CheckResult:
    """Return whether accounting answers; nothing but the certainty of some states depends on it."""
    found = "does not answer"
    if not shutil.which("sacct"):
        found = "is not on the PATH"
    else:
        done = slurm.run_command(
            "sacct", "--noheader", "--allocations", "--starttime=now-1minutes", "--format=JobID"
        )
        if not done.returncode:
            return CheckResult(LOGIN, "sacct", OK, "answers")
        found += f" ({_last(done.stderr)})"
    return CheckResult(LOGIN, "sacct", WARN, f"{found}: states come from squeue and the runs' own record")


def check_accounting(job_id: str, seconds: float = 10.0) -> CheckResult:
    """Return whether accounting knows a job that has just ended; it may lag by some seconds."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"]
    end, said = time.monotonic() + seconds, ""
    while shutil.which("sacct") and time.monotonic() < end:
        done = slurm.run_command(*command)
        said = done.stdout.strip() or said
        if done.returncode or (said and said.split()[0] not in ("RUNNING", "PENDING", "COMPLETING")):
            break
        time.sleep(0.2)
    if said:
        return CheckResult("", "sacct", OK, f"knows the probe: {said.lower().replace('_', ' ')}")
    return CheckResult(
        "", "sacct", WARN, "does not know the probe: states come from squeue and the runs' own record"
    )


def partitions() -> dict[str, dict[str, str]]:
    """Return what scontrol tells of each partition, by its names, such as MaxTime and GraceTime."""
    found = {}
    for line in slurm.run_command("scontrol", "show", "partition", "--oneliner").stdout.splitlines():
        told = dict(re.findall(r"(\S+?)=(\S*)", line))
        if name := told.get("PartitionName"):
            found[name] = told
    return found


def slurm_settings() -> dict[str, str]:
    """Return `scontrol show config` by names; empty where it does not answer."""
    text = slurm.run_command("scontrol", "show", "config").stdout
    return {name: value.strip() for name, value in re.findall(r"^(\w+)\s*=\s*(.*)$", text, re.MULTILINE)}


def check_accepted(
    stage: str,
    cluster: Cluster,
    overlaid: Iterable[str],
    known: Mapping[str, Mapping[str, str]],
    folder: Path,
) -> CheckResult:
    """Return whether Slurm would take a job of this stage as it is set; nothing is submitted."""
    overlaid = frozenset(overlaid)

    def name(setting_name: str) -> str:
        return setting(stage, setting_name, overlaid)

    if cluster.time is None:
        return CheckResult(
            LOGIN, stage, FAIL, "has no time limit", f"give its minutes, such as {name('time')}=1440"
        )
    told = sbatch.test_only(
        sbatch.sbatch_script([sbatch.ArrayTask("doctor", stage, stage, cluster, ())], folder)
    )
    start = re.search(r"to start at (\S+).*?on nodes? (\S+)(?: in partition (\S+))?", told)
    if not start and "to start at" not in told:
        why = next((names for pattern, names in _REFUSALS if re.search(pattern, told, re.IGNORECASE)), None)
        mend = [
            f"{name(each)}={_shown(getattr(cluster, each))}"
            for each in why or ("partition", "account", "qos")
        ]
        there = f" (partitions: {', '.join(known)})" if known and (why is None or "partition" in why) else ""
        return CheckResult(
            LOGIN, stage, FAIL, f"Slurm refuses it ({told})", f"change {' or '.join(mend)}{there}"
        )
    found = "Slurm takes it"
    if start:
        found += f", and would start it at {start[1].replace('T', ' ')} on {start[2]}"
        found += f" in partition {start[3]}" if start[3] else ""
    mine = _partitions_of(cluster, known)
    limits = {each: _minutes(told.get("MaxTime", "")) for each, told in mine.items()}
    finite = [limit for limit in limits.values() if limit is not None]
    # Without EnforcePartLimits Slurm takes such a job and never starts it.
    if mine and len(finite) == len(limits) and cluster.time > max(finite):
        return CheckResult(
            LOGIN,
            stage,
            FAIL,
            f"{name('time')}={cluster.time} is more than partition {', '.join(limits)} gives",
            f"set {name('time')}={max(finite)}; a training goes on from there by itself",
        )
    closed = [each for each, told in mine.items() if told.get("State", "UP") != "UP"]
    if closed:
        return CheckResult(
            LOGIN,
            stage,
            WARN,
            f"{found}, but partition {', '.join(closed)} is {mine[closed[0]]['State'].lower()}",
        )
    return CheckResult(LOGIN, stage, OK, found)


def check_arrays(config: Mapping[str, str]) -> CheckResult:
    """Return how large a sweep may be before it becomes several arrays."""
    if "MaxArraySize" not in config:
        return CheckResult(LOGIN, "arrays", WARN, "scontrol show config does not tell MaxArraySize")
    most = slurm.max_array_size()
    return CheckResult(
        LOGIN, "arrays", OK, f"{most} jobs at most (MaxArraySize); a larger sweep becomes several"
    )


def check_requeues(cluster: Cluster, config: Mapping[str, str]) -> CheckResult:
    """Return whether Slurm will start our jobs again after a lost node or a preemption."""
    if "no-requeue" in sbatch.extra_sbatch_options(cluster):
        return CheckResult(
            LOGIN,
            "requeue",
            WARN,
            "cluster.sbatch says that jobs are not requeued: retry goes on after a preemption",
        )
    found = f"jobs ask for it, at most cluster.max_requeues={cluster.max_requeues} times"
    if config.get("JobRequeue") == "0":
        found += ", though JobRequeue=0 here"
    return CheckResult(LOGIN, "requeue", OK, found)


def check_preemption(
    cluster: Cluster, config: Mapping[str, str], known: Mapping[str, Mapping[str, str]]
) -> CheckResult:
    """Return what a preemption would do to a training."""
    kind, mode = config.get("PreemptType", ""), config.get("PreemptMode", "")
    mine = _partitions_of(cluster, known)
    if not config:
        return CheckResult(LOGIN, "preemption", WARN, "scontrol show config does not answer")
    if kind.endswith("none") or mode == "OFF":
        return CheckResult(LOGIN, "preemption", OK, "jobs are not preempted")
    if kind.endswith("partition_prio"):
        mode = next((told["PreemptMode"] for told in mine.values() if "PreemptMode" in told), mode)
    if mode == "OFF":
        return CheckResult(LOGIN, "preemption", OK, f"not in partition {', '.join(mine)}")
    if "CANCEL" in mode:
        return CheckResult(
            LOGIN,
            "preemption",
            WARN,
            "preempted jobs are cancelled for good: retry RUN goes on from the last checkpoint",
        )
    if "REQUEUE" not in mode:
        return CheckResult(LOGIN, "preemption", OK, f"preempted jobs wait and go on (PreemptMode={mode})")
    grace = max(
        (int(told["GraceTime"]) for told in mine.values() if told.get("GraceTime", "").isdigit()), default=0
    )
    if not grace:
        return CheckResult(
            LOGIN,
            "preemption",
            WARN,
            "preempted jobs are requeued without a warning (GraceTime=0)",
            "train.checkpoint_every_minutes is what one can cost",
        )
    return CheckResult(
        LOGIN, "preemption", OK, f"preempted jobs save within {grace} s (GraceTime) and are requeued"
    )


def check_workspace(config: Config) -> CheckResult:
    """Make the workspace's folder of runs and return what kind of place it is."""
    place = Path(config.workspace)
    other = "another one: workspace=FOLDER"
    try:
        (place / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return CheckResult(
            LOGIN, "workspace", FAIL, f"{place} cannot be made ({error.strerror})", f"choose {other}"
        )
    found = probe_disk(place / "runs")
    words = f"{place}: {free_space_text(found)}"
    if found["error"]:
        return CheckResult(
            LOGIN, "workspace", FAIL, f"{place} cannot be written ({found['error']})", f"choose {other}"
        )
    if is_full(found):
        return CheckResult(LOGIN, "workspace", FAIL, words, f"it is full: make room, or choose {other}")
    wanted = archive_bytes(config)
    if found["free"] < wanted and not (place / "archives" / config.dataset.name).is_dir():
        name = f"dataset {config.dataset.name}'s {size_text(wanted)}"
        return CheckResult(
            LOGIN,
            "workspace",
            WARN,
            words,
            f"less than {name}, unless they lie on it already: dataset.source=FOLDER is linked",
        )
    if found["kind"] == "tmpfs":
        return CheckResult(
            LOGIN, "workspace", WARN, words, "this is memory, gone at the next start of the machine"
        )
    return CheckResult(LOGIN, "workspace", OK, words)


def archive_bytes(config: Config) -> int:
    """Return the bytes of the dataset's archives, as far as they are known."""
    return sum(archive.bytes or 0 for archive in config.dataset.archives.values())


def nodes_of(nodelist: str) -> list[str]:
    """Return the nodes of a list as Slurm writes it, `n[1-3]`; empty where scontrol does not tell."""
    return slurm.run_command("scontrol", "show", "hostnames", nodelist).stdout.split() if nodelist else []


def _partitions_of(cluster: Cluster, known: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Return those that a job of this cluster may run in: the named ones, else the default."""
    if cluster.partition:
        return {name: known[name] for name in cluster.partition.split(",") if name in known}
    return {name: told for name, told in known.items() if told.get("Default") == "YES"}


def _minutes(text: str) -> int | None:
    """Return Slurm's `1-12:30:00` as minutes; None for UNLIMITED and what is no time."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    return int(found[1] or 0) * 1440 + int(found[2]) * 60 + int(found[3]) if found else None


def _shown(value: object) -> str:
    return "null" if value is None else "…" if isinstance(value, (dict, list)) else str(value)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]
