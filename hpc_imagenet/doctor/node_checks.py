"""What the nodes have in common with the login side and with one another, judged.

Pure: it reads no disk and asks nobody. What a report holds is told by probe.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hpc_imagenet.doctor import hardware_checks
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN, CheckResult, ProbeReport, by_node, node_names

SKEW = 3.0  # s between two clocks from which on times in logs mislead
SLOW = 10.0  # s until a file of a node is seen here from which on states lag behind


def check_nodes(seen: ProbeReport) -> list[CheckResult]:
    """Return all that is to be said of what one probe reports; some of its tasks did."""
    judged = [_workspace(seen), _python(seen)]
    if any("packages" in report for report in seen.reports.values()):
        judged.append(_packages(seen))
    judged += [hardware_checks.check_cores(seen), hardware_checks.check_memory(seen)]
    if any("gpus" in report for report in seen.reports.values()):
        judged += [hardware_checks.check_gpus(seen), hardware_checks.check_scratch(seen)]
    if seen.source:
        judged.append(_internet(seen))
    judged.append(_clocks(seen))
    if len(seen.nodes) + len(seen.silent) > 1:
        judged.append(_peers(seen))
    return judged


def explain_no_report(seen: ProbeReport, workspace: str, log: str | None, ended: str) -> CheckResult:
    """Return why a probe that ran told nothing at all.

    Args:
        seen: the probe, without hellos.
        workspace: the folder that the nodes should see.
        log: what the job printed as errors; None where it left no log.
        ended: Slurm's word for its end.
    """
    words = [line.strip() for line in (log or "").splitlines() if line.strip()]
    last = words[-1] if words else ""
    if log is None:
        return seen.result(
            "workspace",
            FAIL,
            f"{workspace} is not shared with the nodes: what the job wrote there is not here ({ended})",
            "choose a folder that login and nodes see: workspace=FOLDER",
        )
    for line in words:
        if re.search(r"[Cc]ould not open std(out|err) file", line):
            return seen.result(
                "workspace",
                FAIL,
                f"not every node sees {workspace} ({line})",
                "choose a folder that login and all nodes see: workspace=FOLDER",
            )
        if re.search(r"execve.*No such file|python[\w./]*: (not found|No such file|command not found)", line):
            return seen.result(
                "python",
                FAIL,
                f"no {seen.home['executable']} on the nodes ({line})",
                f"install the package on a file system that the nodes share, or where "
                f"{seen.setting('setup')} makes it appear",
            )
        if re.search(r"(ModuleNotFound|Import)Error", line):
            return seen.result(
                "python",
                FAIL,
                f"the package cannot be imported there ({line})",
                f"install it where the nodes see it; {seen.setting('setup')} may hide it by another "
                "PYTHONPATH or environment",
            )
    if re.search(r"srun: (error|fatal)", log):
        said = next(line for line in words if re.search(r"srun: (error|fatal)", line))
        return seen.result(
            "probe",
            FAIL,
            f"srun did not start it ({said})",
            f"look at {seen.setting('srun')}, {seen.setting('setup')} and {seen.setting('cpus_per_task')}",
        )
    return seen.result(
        "probe",
        FAIL,
        f"it ended before it could tell anything ({last or ended})",
        f"look at {seen.setting('setup')} and at what it printed",
    )


def _workspace(seen: ProbeReport) -> CheckResult:
    missing = seen.size - len(seen.greetings)
    if missing:
        where = f" (none from {node_names(seen.silent)})" if seen.silent else ""
        return seen.result(
            "workspace",
            FAIL,
            f"{missing} of {seen.size} tasks left no word in it{where}",
            "their node may not see the workspace or python: workspace=FOLDER on a file system that all "
            f"nodes share, or keep those nodes out by {seen.setting('constraint')}=",
        )
    if unfinished := [node for node in seen.nodes if node not in _told(seen)]:
        return seen.result(
            "workspace",
            FAIL,
            f"{node_names(unfinished)} began and did not come to an end",
            f"what the job printed says more; too little {seen.setting('memory_gb')} is a usual cause",
        )
    places = [report["disks"]["workspace"] for report in seen.reports.values()]
    if any(place["error"] for place in places):
        errors = by_node(seen, lambda report: str(report["disks"]["workspace"]["error"]))
        return seen.result("workspace", FAIL, errors, "choose one that nodes can write: workspace=FOLDER")
    trips = [clock["back"] - clock["sent"] for clock in _clocks_of(seen)]
    kinds = ", ".join(sorted({place["kind"] for place in places} - {""}))
    found = f"visible and writable from {node_names(seen.nodes)}" + (f" ({kinds})" if kinds else "")
    if len(trips) < len(seen.reports):
        return seen.result(
            "workspace",
            WARN,
            f"{found}, but a node saw nothing of what was written here",
            "caches of this file system may hold states back for a while; another workspace=FOLDER may not",
        )
    found += f"; each side saw the other's file within {max(trips):.1f} s"
    if max(trips) > SLOW:
        return seen.result("workspace", WARN, found, "states will lag so much behind")
    return seen.result("workspace", OK, found)


def _python(seen: ProbeReport) -> CheckResult:
    home = seen.home

    def tell(hello: Mapping[str, Any]) -> str:
        other = [
            f"{name} {hello[name]} (here {home[name]})"
            for name in ("python", "package", "code")
            if hello[name] != home[name]
        ]
        return ", ".join(other)

    differing = {hello["node"]: text for hello in seen.greetings.values() if (text := tell(hello))}
    if differing:
        return seen.result(
            "python",
            FAIL,
            "; ".join(f"{node}: {text}" for node, text in differing.items()),
            f"the nodes run another installation: share one, and look at {seen.setting('setup')}",
        )
    return seen.result("python", OK, f"{home['python']} and hpc_imagenet {home['package']}, as here")


def _packages(seen: ProbeReport) -> CheckResult:
    def tell(report: Mapping[str, Any]) -> str:
        wrong = []
        for told in report.get("packages", ()):
            name, here = told["package"], seen.home["versions"].get(told["package"])
            if told["error"]:
                wrong.append(f"{name}: {told['error']}")
            elif told["version"] != here:
                wrong.append(f"{name} {told['version']} (here {here or 'not installed'})")
        return ", ".join(wrong)

    if any(tell(report) for report in seen.reports.values()):
        return seen.result(
            "packages",
            FAIL,
            by_node(seen, tell),
            f"install the pinned ones where the nodes see them (make), and look at {seen.setting('setup')}",
        )
    versions = [f"{name} {version}" for name, version in seen.home["versions"].items()]
    return seen.result("packages", OK, f"{', '.join(versions)} can be imported, as here")


def _internet(seen: ProbeReport) -> CheckResult:
    told = next((report for report in seen.reports.values() if {"internet", "source"} & report.keys()), {})
    partition = "cluster.stage.download.partition=…"
    if "source" in told:
        disk = told["source"]
        if disk["error"]:
            return seen.result(
                "source",
                FAIL,
                f"{disk['path']}: {disk['error']} on {told['node']}",
                f"dataset.source=FOLDER that the download stage's nodes see, or {partition}",
            )
        return seen.result("source", OK, f"{disk['path']} can be read; the internet is not needed")
    if "internet" not in told:
        return seen.result("internet", WARN, f"not asked: {seen.source} is no http(s) address")
    answer = told["internet"]
    way = f" through the proxy {answer['proxy']}" if answer["proxy"] else ""
    if answer["status"] is None:
        return seen.result(
            "internet",
            FAIL,
            f"{answer['host']} is not reachable from {told['node']}{way} ({answer['error']})",
            f"choose a partition that reaches it: {partition}, or a proxy by cluster.stage.download.setup="
            "['export https_proxy=…'], or have the archives in a folder: dataset.source=FOLDER"
            if seen.on_slurm
            else "set https_proxy, or have the archives in a folder: dataset.source=FOLDER",
        )
    return seen.result(
        "internet", OK, f"{answer['host']} answers {told['node']}{way} (HTTP {answer['status']})"
    )


def _clocks(seen: ProbeReport) -> CheckResult:
    told = [(report["node"], report["clock"]) for report in seen.reports.values() if report.get("clock")]
    if not told:
        return seen.result("clocks", WARN, "not compared: no file came back in time")
    worst, doubt, node = 0.0, 0.0, ""
    widest = 0.0
    for name, at in told:
        ahead = ((at["sent"] - at["seen"]) + (at["back"] - at["answered"])) / 2  # of the node, s
        slack = ((at["back"] - at["sent"]) - (at["answered"] - at["seen"])) / 2
        widest = max(widest, abs(ahead) + slack)
        if abs(ahead) - slack > abs(worst) - doubt or not node:
            worst, doubt, node = ahead, slack, name
    if abs(worst) - doubt > SKEW:
        return seen.result(
            "clocks",
            FAIL,
            f"that of {node} is {abs(worst):.0f} s {'ahead of' if worst > 0 else 'behind'} this one",
            "nothing to set here: tell your centre (NTP), for times in logs mislead; until then leave it "
            f"out: +{seen.setting('sbatch')}.exclude={node}",
        )
    return seen.result("clocks", OK, f"agree with this one within {widest:.1f} s")


def _peers(seen: ProbeReport) -> CheckResult:
    others = len(seen.nodes) + len(seen.silent) - 1
    taken = {hello["node"]: hello["taken"] for hello in seen.greetings.values() if hello["taken"]}
    ports = sorted(
        {port for hello in seen.greetings.values() if hello["first"] for port in hello["ports"][:1]}
    )
    if taken:
        return seen.result(
            "network",
            FAIL,
            "; ".join(f"{node}: {why}" for node, why in taken.items()),
            "another program sits on the port of this job; the next job has another: ask again",
        )

    def tell(report: Mapping[str, Any]) -> str:
        peers = report.get("peers", {"nodes": 0, "failed": []})
        unseen = others - peers["nodes"]
        words = [f"does not see the files of {unseen} others"] if unseen > 0 else []
        return ", ".join(words + list(peers["failed"]))

    if any(tell(report) for report in seen.reports.values()):
        return seen.result(
            "network",
            FAIL,
            "; ".join(
                f"from {report['node']}: {tell(report)}" for report in seen.reports.values() if tell(report)
            ),
            "training on several nodes needs their host names and open ports between them: another "
            f"{seen.setting('partition')}, or {seen.setting('nodes')}=1",
        )
    if not seen.reports:
        return seen.result("network", WARN, "not tried: the nodes did not come so far")
    ports_told = f"on port {ports[0]}, where a training would meet, and on a free one" if ports else ""
    return seen.result(
        "network", OK, f"{node_names(seen.nodes)} reach one another by name {ports_told}".rstrip()
    )


def _told(seen: ProbeReport) -> set[str]:
    return {report["node"] for report in seen.reports.values()}


def _clocks_of(seen: ProbeReport) -> list[Mapping[str, float]]:
    return [report["clock"] for report in seen.reports.values() if report.get("clock")]
