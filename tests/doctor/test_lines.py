"""The doctor: each line that can fail, on made-up reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.doctor import cluster_checks, node_checks
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN, CheckResult, ProbeReport

GB = 10**9
VERSIONS = {"torch": "2.11.0", "pytorch-lightning": "2.6.6"}
HOME = {"python": "3.11.7", "executable": "/p/python", "package": "0.1.0", "code": "/c", "versions": VERSIONS}


def healthy() -> dict[str, Any]:
    """Return what two nodes with two tasks each tell when all is well."""
    hellos, reports = {}, {}
    for rank in range(4):
        node, first = f"n{rank // 2 + 1}", rank % 2 == 0
        hellos[rank] = {
            **{"rank": rank, "size": 4, "nodes": 2, "node": node, "first": first, "nodelist": "n[1-2]"},
            **{"cores": 8, "ports": [12345, 50000 + rank] if first else [], "taken": "", "sent": 0.0},
            **{name: HOME[name] for name in ("python", "executable", "package", "code")},
        }
        if first:
            reports[rank] = {
                "rank": rank,
                "node": node,
                "clock": {"sent": 0.0, "seen": 0.1, "answered": 0.1, "back": 0.2},
                "disks": {
                    "workspace": disk("/w", "nfs4"),
                    "cluster.scratch": disk("/scratch", "xfs"),
                },
                "peers": {"nodes": 1, "failed": []},
                "memory": {"total": 512 * GB, "limit": 64 * 2.0**30, "slurm": 64 * 2.0**30},
                "internet": {"host": "image-net.org", "proxy": "", "status": 200, "error": ""},
                "gpus": {
                    "given": 2,
                    "cards": [{"name": "H200", "driver": "570.1", "memory": 143771}] * 2,
                    "error": "",
                },
                "packages": [
                    {
                        "package": "torch",
                        "version": "2.11.0",
                        "error": "",
                        "cuda": "13.0",
                        "gpus": ["H200"] * 2,
                    },
                    {"package": "pytorch-lightning", "version": "2.6.6", "error": ""},
                ],
            }
    return {"hellos": hellos, "reports": reports}


def disk(
    path: str, kind: str, free: int = 900 * GB, inodes: int | None = 10**7, error: str = ""
) -> dict[str, Any]:
    return {"path": path, "kind": kind, "free": free, "inodes": inodes, "error": error}


def cluster(**settings: Any) -> Cluster:
    usual = {"nodes": 2, "gpus_per_node": 2, "cpus_per_task": 8, "memory_gb": 64, "scratch": "/scratch"}
    return Cluster(executor="slurm", **{**usual, **settings})


def seen(told: dict[str, Any], **settings: Any) -> ProbeReport:
    return ProbeReport(
        stage="train",
        cluster=cluster(**settings),
        overlaid=frozenset({"partition"}),
        size=4,
        home=HOME,
        archives=155 * GB,
        source="https://image-net.org/data",
        **told,
    )


def judged(seen: ProbeReport) -> dict[str, CheckResult]:
    return {line.check: line for line in node_checks.check_nodes(seen)}


def test_nothing_is_wrong_with_what_is_well() -> None:
    lines = judged(seen(healthy()))
    assert {line.status for line in lines.values()} == {OK}, lines
    assert list(lines) == [
        *("workspace", "python", "packages", "cores", "memory", "GPUs", "scratch"),
        *("internet", "clocks", "network"),
    ]
    assert not any(line.fix for line in lines.values())
    assert "2 x H200 (140 GiB, driver 570.1)" in lines["GPUs"].found


def nodes_told(
    key: str, value: Any, which: str = "reports", rank: int = 2
) -> Callable[[dict[str, Any]], None]:
    """Return a change of one report; ` / ` in the key leads into it."""

    def change(told: dict[str, Any]) -> None:
        at: Any = told[which][rank]
        *path, last = (int(name) if name.isdigit() else name for name in key.split(" / "))
        for name in path:
            at = at[name]
        at[last] = value

    return change


def lost(which: str, rank: int) -> Callable[[dict[str, Any]], None]:
    return lambda told: told[which].pop(rank)


CASES: dict[str, tuple[Callable[[dict[str, Any]], None], str, str, tuple[str, ...]]] = {
    "a task said nothing": (lost("hellos", 3), "workspace", FAIL, ("1 of 4 tasks", "workspace=FOLDER")),
    "a node stopped": (lost("reports", 2), "workspace", FAIL, ("n2 began", "cluster.memory_gb")),
    "not writable": (
        nodes_told("disks / workspace", disk("/w", "nfs4", error="Read-only file system")),
        *("workspace", FAIL, ("n2: Read-only file system", "workspace=FOLDER")),
    ),
    "nothing of ours was seen": (nodes_told("clock", None), "workspace", WARN, ("a node saw nothing",)),
    "seen late": (
        nodes_told("clock", {"sent": 0.0, "seen": 20.0, "answered": 20.0, "back": 40.0}),
        *("workspace", WARN, ("within 40.0 s",)),
    ),
    "another python": (
        nodes_told("python", "3.9.1", "hellos"),
        *("python", FAIL, ("n2: python 3.9.1 (here 3.11.7)", "cluster.setup")),
    ),
    "another checkout": (nodes_told("code", "/old", "hellos"), "python", FAIL, ("/old (here /c)",)),
    "another torch": (
        nodes_told("packages / 0", {"package": "torch", "version": "2.6.0", "error": "", "gpus": ["a"] * 2}),
        *("packages", FAIL, ("n2: torch 2.6.0 (here 2.11.0)",)),
    ),
    "no lightning": (
        nodes_told("packages / 1 / error", "PackageNotFoundError: none"),
        *("packages", FAIL, ("n2: pytorch-lightning: PackageNotFoundError",)),
    ),
    "one core": (
        nodes_told("cores", 1, "hellos", 3),
        *("cores", FAIL, ("1 to 8 of the 8 that cluster.cpus_per_task", "cluster.srun=[--cpu-bind=none]")),
    ),
    "little memory": (
        nodes_told("memory / limit", 8 * 2.0**30),
        *("memory", FAIL, ("n2: 8.6 GB (cgroup)", "less than cluster.memory_gb=64")),
    ),
    "a GPU does not answer": (
        nodes_told("packages / 0 / gpus", ["H200"]),
        *("GPUs", FAIL, ("2 asked for, 1 answers", "built for this driver")),
    ),
    "no driver": (
        lambda told: [
            nodes_told("gpus", {"given": 2, "cards": [], "error": "no nvidia-smi"}, rank=rank)(told)
            or nodes_told("packages / 0 / gpus", [], rank=rank)(told)
            for rank in (0, 2)
        ],
        *("GPUs", FAIL, ("0 answer (no nvidia-smi, Slurm gave 2", "cluster.stage.train.partition")),
    ),
    "no scratch": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "", 0, error="no such folder")),
        *("scratch", FAIL, ("/scratch on n2: no such folder", "cluster.scratch=FOLDER")),
    ),
    "scratch is full": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "xfs", 10**6)),
        *("scratch", FAIL, ("on n2", "full", "cluster.scratch=FOLDER")),
    ),
    "scratch has no files left": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "xfs", inodes=3)),
        *("scratch", FAIL, ("3 files free",)),
    ),
    "scratch is shared": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "lustre", 8 * GB)),
        *("scratch", WARN, ("network file system",)),
    ),
    "scratch is small": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "xfs", 80 * GB)),
        *("scratch", WARN, ("155.0 GB",)),
    ),
    "no internet": (
        lambda told: told["reports"][0]["internet"].update(status=None, error="timed out"),
        *("internet", FAIL, ("not reachable from n1 (timed out)", "cluster.stage.download.partition=")),
    ),
    "a clock is wrong": (
        nodes_told("clock", {"sent": 60.0, "seen": 0.1, "answered": 0.1, "back": 60.2}),
        *("clocks", FAIL, ("n2 is 60 s ahead", "+cluster.sbatch.exclude=n2")),
    ),
    "a name is none": (
        nodes_told("peers / failed", ["n1 is no name here"]),
        *("network", FAIL, ("from n2: n1 is no name here", "cluster.nodes=1")),
    ),
    "a node's files are not seen by another": (
        nodes_told("peers / nodes", 0),
        *("network", FAIL, ("from n2: does not see the files of 1",)),
    ),
    "the port is taken": (
        nodes_told("taken", "port 12345: Address already in use", "hellos"),
        *("network", FAIL, ("n2: port 12345", "ask again")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_line_fails_alone_and_says_what_to_set(case: str) -> None:
    change, check, mark, words = CASES[case]
    told = healthy()
    change(told)
    lines = judged(seen(told))
    line = lines[check]
    assert line.status == mark, line
    assert line.fix
    for word in words:
        assert word in line.found + line.fix, line
    wrong = {line.check for line in lines.values() if line.status == FAIL}
    assert wrong <= {check}, lines
    assert "\n" not in line.found + line.fix


@pytest.mark.parametrize(
    ("settings", "check", "word"),
    [
        ({"cpus_per_task": None}, "cores", "cluster.cpus_per_task=8"),
        ({"memory_gb": None}, "memory", "cluster.memory_gb=32"),
        ({"tasks_per_node": 4}, "GPUs", "cluster.tasks_per_node=2"),
    ],
)
def test_what_is_not_asked_for_may_be_too_little(settings: dict[str, Any], check: str, word: str) -> None:
    told = healthy()
    for hello in told["hellos"].values():
        hello["cores"] = 1 if check == "cores" else 8
    for report in told["reports"].values():
        if check == "memory":
            report["memory"] = {"total": 512 * GB, "limit": None, "slurm": 200 * 2.0**20}
    line = judged(seen(told, **settings))[check]
    assert (line.status, word in line.fix) == (FAIL, True), line


def test_gpus_that_no_setting_counts() -> None:
    """`--gres` among the further options of sbatch gives some as well; training takes what is there."""
    told = healthy()
    usual = {"gpus_per_node": None, "tasks_per_node": 2, "sbatch": {"gres": "gpu:2"}}
    assert judged(seen(told, **usual))["GPUs"].status == OK
    for report in told["reports"].values():
        report["packages"][0]["gpus"] = []
    assert "2 asked for, 0 answer" in judged(seen(told, **usual))["GPUs"].found
    for report in told["reports"].values():
        report["gpus"] = {"given": 0, "cards": [], "error": "no nvidia-smi"}
    assert judged(seen(told, **usual))["GPUs"].found == "none: training runs on CPUs"


def test_tasks_that_are_bound_to_a_gpu_each() -> None:
    told = healthy()
    for report in told["reports"].values():
        report["packages"][0]["gpus"] = ["H200"]
    assert judged(seen(told, tasks_per_node=2))["GPUs"].status == FAIL
    for hello in told["hellos"].values():
        hello["visible"] = 1
    assert judged(seen(told, tasks_per_node=2))["GPUs"].status == OK


def test_a_clock_is_judged_by_what_is_certain() -> None:
    """A slow file system makes the way there and back long, and says nothing about the clock."""
    told = healthy()
    told["reports"][2]["clock"] = {"sent": 0.0, "seen": 9.0, "answered": 9.0, "back": 9.1}
    assert judged(seen(told))["clocks"].status == OK
    told["reports"][2]["clock"] = {"sent": -60.0, "seen": 9.0, "answered": 9.0, "back": -50.9}
    line = judged(seen(told))["clocks"]
    assert line.status == FAIL
    assert "n2 is 64 s behind" in line.found


@pytest.mark.parametrize(
    ("log", "check", "word"),
    [
        (None, "workspace", "workspace=FOLDER"),
        ("slurmstepd-n2: error: Could not open stdout file /w: No such file", "workspace", "not every node"),
        ("slurmstepd: error: execve(): /p/python: No such file or directory", "python", "/p/python"),
        ("/p/python: No module\nModuleNotFoundError: No module named 'submitit'", "python", "'submitit'"),
        ('srun: error: Invalid numeric value "" for --cpus-per-task.', "probe", "cluster.cpus_per_task"),
        ("Segmentation fault", "probe", "Segmentation fault"),
        ("", "probe", "exit code 7"),
    ],
)
def test_a_probe_that_told_nothing(log: str | None, check: str, word: str) -> None:
    line = node_checks.explain_no_report(seen({}), "/w", log, "Slurm: failed (exit code 7)")
    assert (line.check, line.status) == (check, FAIL)
    assert word in line.found + line.fix


@pytest.mark.parametrize(
    ("config", "partition", "mark", "word"),
    [
        ("PreemptType=preempt/none", "", OK, "not preempted"),
        (
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
            "PreemptMode=OFF",
            OK,
            "not in partition",
        ),
        (
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
            "GraceTime=0",
            WARN,
            "without a warning",
        ),
        ("PreemptType=preempt/qos\nPreemptMode=CANCEL", "GraceTime=0", WARN, "retry"),
        ("PreemptType=preempt/partition_prio\nPreemptMode=GANG,SUSPEND", "", OK, "wait and go on"),
        ("", "", WARN, "does not answer"),
    ],
)
def test_what_a_preemption_would_do(config: str, partition: str, mark: str, word: str) -> None:
    settings = dict(line.split("=") for line in config.splitlines())
    told = dict(pair.split("=") for pair in partition.split()) | {"Default": "YES"}
    line = cluster_checks.check_preemption(cluster(), settings, {"debug": told})
    assert (line.status, word in line.found) == (mark, True), line


def test_a_job_that_is_not_to_be_requeued() -> None:
    assert (
        cluster_checks.check_requeues(cluster(), {"JobRequeue": "0"}).status == OK
    )  # our jobs ask for it themselves
    assert (
        cluster_checks.check_requeues(cluster(sbatch={"no_requeue": True}), {"JobRequeue": "1"}).status
        == WARN
    )
    assert cluster_checks.check_requeues(cluster(sbatch={"requeue": False}), {}).status == WARN
