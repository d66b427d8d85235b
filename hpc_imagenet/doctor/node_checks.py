"""Checks of what a probe reported from the nodes; see `_CHECKS` for the list."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hpc_imagenet.doctor.check_result import (
    NO_RESULT,
    Finding,
    ProbeReport,
    fail,
    gigabytes,
    node_names,
    ok,
    warn,
)

_TASK_MEMORY = 2**30  # bytes that a training task needs to import torch and hold a small network
_NETWORK_DISKS = re.compile(r"nfs4?|lustre|gpfs|beegfs|ceph(fs)?|fuse\.glusterfs|wekafs|afs")

# Pattern in the log of a probe without reports → failed check and fix; first match. Setting names in braces
# become full names.
_LOG_ERRORS = {
    r"[Cc]ould not open std(out|err) file": ("workspace", "not every node sees it: set workspace=FOLDER"),
    r"execve.*No such file|python[\w./]*: (not found|No such file|command not found)": (
        *("python", "install the package on a file system that the nodes share, or load python in {setup}"),
    ),
    r"(ModuleNotFound|Import)Error": (
        *("python", "install the package where the nodes see it; {setup} may change PYTHONPATH"),
    ),
    r"srun: (error|fatal)": ("probe", "srun failed: check {srun}, {setup} and {cpus_per_task}"),
}


def check_nodes(probe: ProbeReport) -> list[tuple[str, Finding]]:
    """Return name and finding of each check that applies; at least one task of the probe has reported."""
    findings = [(name, check(probe)) for name, check in _CHECKS]
    return [(name, finding) for name, finding in findings if finding is not None]


def explain_no_report(probe: ProbeReport, workspace: str, log: str | None, ended: str) -> tuple[str, Finding]:
    """Return the check that failed, and its finding, for a probe that ran and sent no report.

    `log` is the stderr of the job, or None if there is no such file; `ended` is Slurm's reason for its end.
    """
    if log is None:
        found = f"{workspace} is not shared with the nodes: no file that the job wrote is here ({ended})"
        return "workspace", fail(found, "choose a folder that login and nodes see: workspace=FOLDER")
    lines = [line.strip() for line in log.splitlines() if line.strip()] or [ended]
    errors = ((pattern, line) for pattern in _LOG_ERRORS for line in lines if re.search(pattern, line))
    pattern, line = next(errors, ("", lines[-1]))
    check, fix = _LOG_ERRORS.get(pattern, ("probe", "check {setup} and what it printed"))
    names = {name: probe.setting(name) for name in ("setup", "srun", "cpus_per_task")}
    return check, fail(f"the probe ended without a report ({line})", fix.format(**names))


def _check_workspace(probe: ProbeReport) -> Finding:
    if missing := probe.size - len(probe.tasks):
        nodes = f" (none on {node_names(probe.missing_nodes)})" if probe.missing_nodes else ""
        fix = "their nodes may not see the workspace or python: set workspace=FOLDER on a shared file system "
        fix += f"or exclude those nodes by {probe.setting('constraint')}="
        return fail(f"{missing} of {probe.size} tasks wrote no report into it{nodes}", fix)
    complete = [report["node"] for report in probe.node_reports()]
    if unfinished := [node for node in probe.nodes if node not in complete]:
        fix = "read the log of the probe, named below: if it says killed or oom, raise "
        fix += probe.setting("memory_gb")
        return fail(f"{node_names(unfinished)} started and did not finish", fix)
    if errors := probe.by_node("disks", lambda disks: str(disks["workspace"]["error"])):
        return fail(errors, "choose a folder that the nodes can write: workspace=FOLDER")
    kinds = {report["disks"]["workspace"]["kind"] for report in probe.node_reports()} - {""}
    return ok(f"visible and writable from {node_names(probe.nodes)} ({', '.join(sorted(kinds))})")


def _check_python(probe: ProbeReport) -> Finding:
    login, different = probe.login, {}
    compared = ("package", "code") if probe.cluster.container else ("python", "package", "code")
    for task in probe.tasks.values():
        names = [name for name in compared if task[name] != login[name]]
        if names:
            different[task["node"]] = ", ".join(f"{name} {task[name]} (here {login[name]})" for name in names)
    if different:
        fix = f"the nodes use another installation: share one, and check {probe.setting('setup')}"
        return fail("; ".join(f"{node}: {text}" for node, text in different.items()), fix)
    if probe.cluster.container:
        found = next(iter(probe.tasks.values()))["python"]
        return ok(f"{found} in the container, hpc_imagenet {login['package']} as here")
    return ok(f"{login['python']} and hpc_imagenet {login['package']}, as here")


def _check_packages(probe: ProbeReport) -> Finding | None:
    login = probe.login["versions"]

    def different(packages: Mapping[str, Any]) -> list[str]:
        versions = {} if probe.cluster.container else packages["versions"]
        return [
            f"{name} {each} (here {login[name]})" for name, each in versions.items() if each != login[name]
        ]

    def problems(packages: Mapping[str, Any]) -> str:
        return ", ".join([*different(packages), *filter(None, [packages["error"]])])

    if not probe.node_reports("packages"):
        return None
    if found := probe.by_node("packages", problems):
        reports = [report["packages"] for report in probe.node_reports("packages")]
        errors = [each["error"] for each in reports if each["error"]]
        if not any(map(different, reports)) and all(NO_RESULT in error for error in errors):
            fix = "the import is slow there, since the file system is cold or busy: run the doctor again"
            if probe.on_slurm and not probe.cluster.container:
                fix += f", or use a container image, which is one file: {probe.setting('container')}"
            return fail(found, fix)
        fix = f"install the pinned versions where the nodes see them (make); check {probe.setting('setup')}"
        return fail(found, fix)
    if probe.cluster.container:
        return ok("torch, torchvision and pytorch-lightning can be imported in the container")
    return ok(f"{', '.join(f'{name} {login[name]}' for name in login)} can be imported, as here")


def _check_cores(probe: ProbeReport) -> Finding:
    requested, name = probe.cluster.cpus_per_task, probe.setting("cpus_per_task")
    counts = [task["cores"] for task in probe.tasks.values()]
    least = min(counts)
    found = f"{least}" if least == max(counts) else f"{least} to {max(counts)}"
    if not probe.on_slurm:
        return ok(f"{found} on this machine")
    if requested and least < requested:
        srun, setup = probe.setting("srun"), probe.setting("setup")
        fix = f"remove options that bind tasks from {srun} and {setup}, try '{srun}=[--cpu-bind=none]', or "
        fix += f"request what the nodes have: {name}={least}"
        return fail(f"a task gets {found} of the {requested} requested by {name}", fix)
    if least == 1 and not requested and probe.stage == "train":
        return fail("a task gets 1 core, too few for its loader workers", f"request more: {name}=8")
    return ok(f"{found} per task" + (f" ({requested} requested)" if requested else ""))


def _check_memory(probe: ProbeReport) -> Finding | None:
    least = min((report["memory"]["usable"] for report in probe.node_reports()), default=None)
    if least is None:
        return None
    name, requested = probe.setting("memory_gb"), probe.cluster.memory_gb
    found = probe.by_node(
        "memory", lambda m: f"{gigabytes(m['usable'])} of the node's {gigabytes(m['total'])}"
    )
    if probe.on_slurm and requested and least < 0.95 * requested * 2**30:
        return fail(f"{found}, less than {name}={requested:g} GiB", f"set {name} to what the nodes have")
    tasks = max(1, probe.size // (len(probe.nodes) + len(probe.missing_nodes)))
    if probe.stage == "train" and least < _TASK_MEMORY * tasks:
        more = f"{name}={16 * tasks}" if probe.on_slurm else "--mem of the allocation"
        return fail(f"{found}, too little for training (tasks per node: {tasks})", f"request more: {more}")
    return ok(found)


def _check_gpus(probe: ProbeReport) -> Finding | None:
    reports = [report["gpus"] for report in probe.node_reports("gpus")]
    if not reports:
        return None
    name, tasks = probe.setting("gpus_per_node"), probe.cluster.tasks_per_node or 1
    found = probe.by_node("gpus", _gpu_text)
    by_driver, usable = min(len(gpus["driver"]) for gpus in reports), min(map(_usable_gpus, reports))
    if tasks > 1 and all(task["visible_gpus"] == 1 for task in probe.tasks.values()):
        usable *= tasks  # each task sees only the GPU that it is bound to
    requested = probe.cluster.gpus_per_node
    if requested is None:  # a training uses what it finds: by --gres in cluster.sbatch, or this machine's
        granted = max(gpus["granted"] or 0 for gpus in reports)
        requested = granted or (tasks if by_driver or usable else 0)
    if not requested:
        return ok(f"none requested ({found}): training runs on CPUs")
    problems = {each["node"]: _gpu_problem(each["gpus"]) for each in probe.node_reports("gpus")}
    broken = {node: problem for node, problem in problems.items() if problem}
    if usable >= max(requested, tasks):
        return warn(found, _gpu_fix(probe, broken)) if broken else ok(found)
    if usable >= requested:
        fix = f"use one task per GPU: {probe.setting('tasks_per_node')}={usable}"
        return fail(f"{tasks} tasks share {usable}: {found}", fix)
    found = f"{requested} requested, {usable} usable ({found})"
    if broken:
        return fail(found, _gpu_fix(probe, broken))
    if by_driver > usable:
        return fail(found, f"install a torch {_BUILT_FOR_DRIVER}")
    options = ", ".join(probe.setting(option) for option in ("partition", "constraint", "sbatch"))
    return fail(found, f"choose nodes with GPUs and a driver by {options}; or set {name}=0")


# Pattern in the problem of a node's GPUs → fix; first match. On Slurm {choose} becomes how to choose other
# nodes, and {leave} how to leave these out.
_BUILT_FOR_DRIVER = "built for this driver: the head of constraints.txt says how"
_GPU_FIXES = {
    r"driver on your system is too old|driver version is insufficient": (
        f"install a torch {_BUILT_FOR_DRIVER}{{choose}}"
    ),
    r"no kernel image|invalid device function": (
        "install a torch with kernels for these GPUs (the pinned one has them from Turing on): the head of "
        "constraints.txt says how{choose}"
    ),
    r"found no nvidia driver": (  # although NVML or nvidia-smi lists its GPUs
        "torch cannot load the driver's libcuda.so.1 there: install the whole driver, or let a container's "
        "runtime add it{choose}"
    ),
    r"system not yet initialized": (
        "GPUs with NVSwitch need the fabric manager of the node (nvidia-fabricmanager), which does not run: "
        "have it started{leave}"
    ),
    r"out of memory|busy or unavailable": (
        "another process uses the GPU: run the doctor again when it has ended{leave}"
    ),
    "": "the GPU or its driver is broken: report it to the administrators{leave}",
}


def _gpu_fix(probe: ProbeReport, problems: Mapping[str, str]) -> str:
    """Return what to do about the first of the problems with GPUs, given by node."""
    problem = next(iter(problems.values()))
    fix = next(fix for pattern, fix in _GPU_FIXES.items() if re.search(pattern, problem, re.IGNORECASE))
    choose = leave = ""
    if probe.on_slurm:
        choose = f", or choose other nodes by {probe.setting('partition')} or {probe.setting('constraint')}"
        leave = (
            f", and leave {node_names(list(problems))} out by {probe.setting('sbatch')}.exclude until then"
        )
    return fix.format(choose=choose, leave=leave)


def _gpu_problem(gpus: Mapping[str, Any]) -> str:
    """Return why torch cannot use some GPUs, else the error of nvidia-smi where torch finds any; or empty."""
    if problem := gpus.get("problem"):
        return str(problem)
    missing = gpus["error"].startswith("no nvidia-smi")  # as on nodes with GPUs of AMD
    return f"nvidia-smi: {gpus['error']}" if gpus["error"] and gpus["torch"] and not missing else ""


def _usable_gpus(gpus: Mapping[str, Any]) -> int:
    return len(gpus["driver"] if gpus["torch"] is None else gpus["torch"])


def _gpu_text(gpus: Mapping[str, Any]) -> str:
    names = gpus["driver"] or gpus["torch"]
    parts = [f"{len(names)} x {names[0]}" if names else gpus["error"] or "the driver lists none"]
    if gpus["granted"] is not None:
        parts.append(f"Slurm granted {gpus['granted']}")
    if gpus["torch"] is not None:
        built = f"built for {gpus['cuda']}" if gpus["cuda"] else "built without GPU support"
        problem = _gpu_problem(gpus)
        count = len(gpus["torch"])
        parts.append(f"torch, {built}, " + (f"can use {count}: {problem}" if problem else f"finds {count}"))
    return ", ".join(parts)


def _check_scratch(probe: ProbeReport) -> Finding | None:
    if not probe.node_reports("gpus"):
        return None  # only the probe of the training checks it
    name, disk = probe.setting("scratch"), _worst_disk(probe, "cluster.scratch")
    others = [(key, _worst_disk(probe, key)) for key in ("$SLURM_TMPDIR", "$TMPDIR")]
    also = "; ".join(f"{key} is {each['text']}" for key, each in others if each)
    if disk is None:
        hint = f" ({also})" if also else ""
        return warn(f"{name} is not set: no shards are copied to the nodes' own disks{hint}")
    if disk["error"]:
        # For all users, unless a variable makes it the folder of one user or one job.
        mkdir = "mkdir -p …" if "$" in str(probe.cluster.scratch) else "mkdir -p -m 1777 …"
        fix = f"set {name}=FOLDER on the nodes' own disk, or null; to create it, add {mkdir} to "
        return fail(f"{disk['path']} on {disk['node']}: {disk['error']}", fix + probe.setting("setup"))
    where = f" on {disk['node']}, the least" if len(probe.nodes) > 1 else ""
    found = f"{disk['text']}{where}" + (f"; {also}" if also else "")
    if disk["full"]:
        return fail(f"{found}: it is full", f"free some space, or set another {name}=FOLDER")
    if _NETWORK_DISKS.fullmatch(disk["kind"]):
        return warn(found, f"this is a network file system, not the nodes' own disk: change {name}")
    if disk["free"] < probe.archives:
        return warn(found, f"less than the {gigabytes(probe.archives)} of the dataset")
    return ok(found)


def _worst_disk(probe: ProbeReport, name: str) -> dict[str, Any] | None:
    """Return `probe.probe_disk` of the node with an error, a full disk or the least free space."""
    reports = [report for report in probe.node_reports() if name in report["disks"]]
    disks = [{**report["disks"][name], "node": report["node"]} for report in reports]
    return min(disks, key=lambda disk: (not disk["error"], not disk["full"], disk["free"]), default=None)


def _check_source(probe: ProbeReport) -> Finding | None:
    for report in probe.node_reports("source"):
        disk, partition = report["source"], "cluster.stage.download.partition=…"
        if disk["error"]:
            fix = f"set dataset.source=FOLDER that the nodes of the download stage see, or {partition}"
            return fail(f"{disk['path']}: {disk['error']} on {report['node']}", fix)
        return ok(f"{disk['path']} is readable; no internet needed")
    return None


def _check_internet(probe: ProbeReport) -> Finding | None:
    for report in probe.node_reports("internet"):
        reply = report["internet"]
        proxy = f" through the proxy {reply['proxy']}" if reply["proxy"] else ""
        if reply["status"] is not None:
            return ok(f"{reply['host']} replies to {report['node']}{proxy} (HTTP {reply['status']})")
        fix = "set https_proxy"
        if probe.on_slurm:
            fix = "choose a partition with internet: cluster.stage.download.partition=…, or set a proxy: "
            fix += "cluster.stage.download.setup=['export https_proxy=…']"
        found = f"{reply['host']} is not reachable from {report['node']}{proxy} ({reply['error']})"
        return fail(found, f"{fix}, or use a folder with the archives: dataset.source=FOLDER")
    if probe.source and not probe.node_reports("source"):
        return warn(f"not checked: {probe.source} is no http(s) URL")
    return None


def _check_network(probe: ProbeReport) -> Finding | None:
    if len(probe.nodes) + len(probe.missing_nodes) < 2:
        return None
    peers = {report["node"]: report["peer"] for report in probe.node_reports("peer")}
    if errors := "; ".join(f"from {node}: {peer['error']}" for node, peer in peers.items() if peer["error"]):
        fix = "training on several nodes needs their host names and open ports between them: set another "
        fix += f"{probe.setting('partition')}, or {probe.setting('nodes')}=1; if the port is in use, run the "
        fix += "doctor again: its next job has another port"
        return fail(errors, fix)
    if len(peers) < 2:
        return warn("not checked: fewer than two nodes reported", "see the check of the workspace")
    (host, port), *_ = [(peer["host"], peer["port"]) for peer in peers.values()]
    first = host if host in peers else probe.nodes[0]
    others = node_names([node for node in peers if node != first])
    by = "by name" if host in peers else f"by its address {host}, since the name does not resolve,"
    return ok(f"{others} connected to {first} {by} on port {port}, as a training would")


_CHECKS: tuple[tuple[str, Callable[[ProbeReport], Finding | None]], ...] = (
    ("workspace", _check_workspace),
    ("python", _check_python),
    ("packages", _check_packages),
    ("cores", _check_cores),
    ("memory", _check_memory),
    ("GPUs", _check_gpus),
    ("scratch", _check_scratch),
    ("source", _check_source),
    ("internet", _check_internet),
    ("network", _check_network),
)
