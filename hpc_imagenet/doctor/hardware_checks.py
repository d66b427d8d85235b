"""What the nodes have to work with, judged: cores, memory, GPUs, disks of their own.

Pure, as nodes.py is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_imagenet.doctor.check_result import (
    FAIL,
    OK,
    WARN,
    CheckResult,
    ProbeReport,
    by_node,
    free_space_text,
    is_full,
    size_text,
)

TASK_MEMORY = 2**30  # bytes a training task needs to import torch and hold a small network
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cephfs", "fuse.glusterfs", "afs", "wekafs")


def check_cores(seen: ProbeReport) -> CheckResult:
    """Judge the cores that srun gave each task against those asked for."""
    asked, name = seen.cluster.cpus_per_task, seen.setting("cpus_per_task")
    counts = [hello["cores"] for hello in seen.greetings.values()]
    least, most = min(counts), max(counts)
    got = f"{least}" if least == most else f"{least} to {most}"
    if not seen.on_slurm:
        return seen.result("cores", OK, f"{got} on this machine")
    if asked and least < asked:
        return seen.result(
            "cores",
            FAIL,
            f"a task gets {got} of the {asked} that {name} asks for",
            f"take out what binds tasks in {seen.setting('srun')} and {seen.setting('setup')}, try "
            f"'{seen.setting('srun')}=[--cpu-bind=none]', or ask for what the nodes have: {name}={least}",
        )
    if least == 1 and not asked and seen.stage == "train":
        return seen.result(
            "cores", FAIL, "a task gets 1 core, and its loader would starve", f"ask for more: {name}=8"
        )
    return seen.result("cores", OK, f"{got} a task" + (f" ({asked} asked for)" if asked else ""))


def check_memory(seen: ProbeReport) -> CheckResult:
    """Judge what the job may use on each node."""
    name, asked = seen.setting("memory_gb"), seen.cluster.memory_gb
    tasks = max(1, seen.size // max(1, len(seen.nodes) + len(seen.silent)))
    given = [_given(report["memory"]) for report in seen.reports.values() if "memory" in report]
    known = [each for each in given if each]
    if not known:
        return seen.result("memory", WARN, "the nodes do not say how much there is")
    least = min(known)
    found = by_node(seen, lambda report: _memory_words(report.get("memory", {})))
    if seen.on_slurm and asked and least < 0.95 * asked * 2**30:
        return seen.result(
            "memory", FAIL, found, f"less than {name}={asked:g}: the nodes have no more to give"
        )
    if seen.stage == "train" and least < TASK_MEMORY * tasks:
        return seen.result(
            "memory",
            FAIL,
            f"{found} for {tasks} {'task' if tasks == 1 else 'tasks'} of training",
            f"ask for more: {name}={16 * tasks}"
            if seen.on_slurm
            else "ask for more: --mem of the allocation",
        )
    return seen.result("memory", OK, found)


def check_gpus(seen: ProbeReport) -> CheckResult:
    """Judge whether as many GPUs answer torch (else the driver) as were asked for."""
    name, tasks = seen.setting("gpus_per_node"), seen.cluster.tasks_per_node or 1
    told = [report for report in seen.reports.values() if "gpus" in report]
    found = by_node(seen, _gpu_words)
    cards = min((len(report["gpus"]["cards"]) for report in told), default=0)
    have = min((_gpu_count(report) for report in told), default=0)
    if tasks > 1 and all(hello.get("visible") == 1 for hello in seen.greetings.values()):
        have *= tasks  # each is bound to one of its own
    asked = seen.cluster.gpus_per_node
    if asked is None:  # training takes what is there: by --gres of cluster.sbatch, or of this machine
        given = max((report["gpus"]["given"] or 0 for report in told), default=0)
        asked = given or (tasks if cards or have else 0)
    elif asked == 0 and have:
        return seen.result("GPUs", OK, f"not used ({name}=0): {found}")
    if not asked:
        why = f" ({name}=0)" if seen.cluster.gpus_per_node == 0 else ""
        return seen.result("GPUs", OK, f"none{why}: training runs on CPUs")
    if have >= max(asked, tasks):
        return seen.result("GPUs", OK, found)
    if have >= asked:
        return seen.result(
            "GPUs",
            FAIL,
            f"{tasks} tasks share {have}: {found}",
            f"one task a GPU: {seen.setting('tasks_per_node')}={have}",
        )
    wanted = f"{asked} asked for, {have} answer{'s' if have == 1 else ''} ({found})"
    if cards > have:
        return seen.result(
            "GPUs",
            FAIL,
            wanted,
            "install a torch that is built for this driver (python -m pip install torch, from pytorch.org)",
        )
    return seen.result(
        "GPUs",
        FAIL,
        wanted,
        f"choose nodes with GPUs and their driver by {seen.setting('partition')}, "
        f"{seen.setting('constraint')} or {seen.setting('sbatch')}; or {name}=0",
    )


def check_scratch(seen: ProbeReport) -> CheckResult:
    """Judge the nodes' own disk."""
    name = seen.setting("scratch")
    also = "; ".join(
        f"{key} is {worst['path']}: {free_space_text(worst)}"
        for key in ("$SLURM_TMPDIR", "$TMPDIR")
        if (worst := _tightest(seen, key))
    )
    worst = _tightest(seen, "cluster.scratch")
    if worst is None:
        tail = f" (but {also})" if also else ""
        return seen.result(
            "scratch", WARN, f"{name} is not set: nothing is put on the nodes' own disks{tail}"
        )
    on = f" on {worst['node']}, the least" if len(seen.nodes) > 1 else ""
    found = f"{worst['path']}: {free_space_text(worst)}{on}" + (f"; {also}" if also else "")
    if worst["error"]:
        return seen.result(
            "scratch",
            FAIL,
            f"{worst['path']} on {worst['node']}: {worst['error']}",
            f"{name}=FOLDER on the nodes' own disk, or null; {seen.setting('setup')} can make it: mkdir -p …",
        )
    if is_full(worst):
        return seen.result("scratch", FAIL, f"{found}: it is full", f"make room, or another {name}=FOLDER")
    if worst["kind"] in _NETWORK:
        return seen.result(
            "scratch", WARN, found, f"this is a network file system, not the nodes' own: {name}"
        )
    if worst["free"] < seen.archives:
        return seen.result("scratch", WARN, found, f"less than the dataset's {size_text(seen.archives)}")
    return seen.result("scratch", OK, found)


def _tightest(seen: ProbeReport, name: str) -> dict[str, Any] | None:
    """Return what the node with the least room found of a folder (see `probe.disk`), and which it is.

    One that cannot be used or is full comes first; None where nobody was asked.
    """
    told = [
        {**report["disks"][name], "node": report["node"]}
        for _, report in sorted(seen.reports.items())
        if name in report.get("disks", {})
    ]
    return min(told, key=lambda disk: (not disk["error"], not is_full(disk), disk["free"] or 0), default=None)


def _given(memory: Mapping[str, Any]) -> float | None:
    known = [memory[name] for name in ("limit", "slurm") if memory.get(name)]
    return min(known) if known else memory.get("total")


def _memory_words(memory: Mapping[str, Any]) -> str:
    given, total = _given(memory), memory.get("total")
    if given is None:
        return ""
    where = (
        "cgroup" if memory.get("limit") == given else "Slurm's word" if memory.get("slurm") == given else ""
    )
    return size_text(given) + (f" ({where}) of {size_text(total)}" if where and total else "")


def _gpu_count(report: Mapping[str, Any]) -> int:
    for told in report.get("packages", ()):
        if told["package"] == "torch" and not told["error"]:
            return len(told["gpus"])
    return len(report["gpus"]["cards"])


def _gpu_words(report: Mapping[str, Any]) -> str:
    if "gpus" not in report:
        return "not asked"
    cards, given = report["gpus"]["cards"], report["gpus"]["given"]
    torch = next((told for told in report.get("packages", ()) if told["package"] == "torch"), None)
    words = []
    if cards:
        card = cards[0]
        holds = f"{card['memory'] / 1024:.0f} GiB, " if card["memory"] else ""
        words.append(f"{len(cards)} x {card['name']} ({holds}driver {card['driver']})")
    elif torch and torch.get("gpus"):
        words.append(f"{len(torch['gpus'])} x {torch['gpus'][0]}")
    else:
        words.append(report["gpus"]["error"] or "the driver names none")
    if given is not None:
        words.append(f"Slurm gave {given}")
    if torch and not torch["error"]:
        built = f"built for {torch['cuda']}" if torch.get("cuda") else "built without GPUs"
        words.append(f"torch, {built}, sees {len(torch['gpus'])}")
    return ", ".join(words)
