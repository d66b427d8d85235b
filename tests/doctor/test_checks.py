"""Checks of the doctor, each on made-up reports of a probe or made-up replies of Slurm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.doctor import cluster_checks, node_checks
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN, Finding, ProbeReport

GB = 10**9
VERSIONS = {"torch": "2.11.0", "pytorch-lightning": "2.6.6"}
INSTALLATION = {"python": "3.11.7", "package": "0.1.0", "code": "/c"}
Tasks = dict[int, dict[str, Any]]


def healthy() -> Tasks:
    """Return complete reports of two nodes with two tasks each, without a problem."""
    tasks: Tasks = {}
    for rank in range(4):
        tasks[rank] = {
            **{"size": 4, "node": f"n{rank // 2 + 1}", "nodelist": "n[1-2]", "complete": True},
            **{"cores": 8, "visible_gpus": None, **INSTALLATION},
        }
    for rank in (0, 2):
        tasks[rank] |= {
            "peer": {"host": "n1", "port": 12345, "error": ""},
            "disks": {"workspace": disk("/w", "nfs4"), "cluster.scratch": disk("/scratch", "xfs")},
            "memory": {"total": 512 * GB, "usable": 64 * 2.0**30},
            "internet": {"host": "image-net.org", "proxy": "", "status": 200, "error": ""},
            "gpus": {
                **{"granted": 2, "driver": ["H200 (143771 MiB, driver 570.1)"] * 2, "error": ""},
                **{"torch": ["H200"] * 2, "cuda": "13.0"},
            },
            "packages": {"versions": dict(VERSIONS), "error": ""},
        }
    return tasks


def disk(path: str, kind: str, free: int = 900 * GB, full: bool = False, error: str = "") -> dict[str, Any]:
    text = f"{path}: {error or 'free space'}"
    return {"path": path, "kind": kind, "free": free, "full": full, "error": error, "text": text}


def cluster(**settings: Any) -> Cluster:
    usual = {"nodes": 2, "gpus_per_node": 2, "cpus_per_task": 8, "memory_gb": 64, "scratch": "/scratch"}
    return Cluster(executor="slurm", **{**usual, **settings})


def probe(tasks: Tasks, **settings: Any) -> ProbeReport:
    return ProbeReport(
        stage="train",
        cluster=cluster(**settings),
        overrides=frozenset({"partition"}),
        size=4,
        login={**INSTALLATION, "versions": VERSIONS},
        archives=155 * GB,
        source="https://image-net.org/data",
        tasks=tasks,
    )


def findings(tasks: Tasks, **settings: Any) -> dict[str, Finding]:
    return dict(node_checks.check_nodes(probe(tasks, **settings)))


def test_healthy_nodes_pass_every_check() -> None:
    found = findings(healthy())
    assert {finding.status for finding in found.values()} == {OK}, found
    assert list(found) == [
        *("workspace", "python", "packages", "cores", "memory", "GPUs", "scratch", "internet", "network"),
    ]
    assert not any(finding.fix for finding in found.values())
    assert "2 x H200 (143771 MiB, driver 570.1)" in found["GPUs"].found


def change(key: str, value: Any, rank: int = 2) -> Callable[[Tasks], None]:
    """Return a function that changes one report; ` / ` separates the keys of nested mappings."""

    def apply(tasks: Tasks) -> None:
        mapping: Any = tasks[rank]
        *keys, last = key.split(" / ")
        for each in keys:
            mapping = mapping[each]
        mapping[last] = value

    return apply


def gpus(torch: int, problem: str, *ranks: int, **values: Any) -> Callable[[Tasks], None]:
    """Return a function that lets torch use the first GPUs alone on the nodes of some tasks."""

    def apply(tasks: Tasks) -> None:
        for rank in ranks or (2,):
            tasks[rank]["gpus"] |= {"torch": ["H200"] * torch, "problem": problem, **values}

    return apply


def no_driver(tasks: Tasks) -> None:
    for rank in (0, 2):
        tasks[rank]["gpus"] |= {"driver": [], "error": "no nvidia-smi", "torch": []}


def keep_first_report(tasks: Tasks) -> None:
    """Remove all that the first task of the second node writes when it is complete."""
    for key in set(tasks[2]) - set(tasks[3]):
        del tasks[2][key]
    tasks[2]["complete"] = False


CASES: dict[str, tuple[Callable[[Tasks], object], str, str, tuple[str, ...]]] = {
    "task without a report": (lambda t: t.pop(3), "workspace", FAIL, ("1 of 4 tasks", "workspace=FOLDER")),
    "node did not finish": (keep_first_report, "workspace", FAIL, ("n2 started", "cluster.memory_gb")),
    "workspace not writable": (
        change("disks / workspace", disk("/w", "nfs4", error="Read-only file system")),
        *("workspace", FAIL, ("n2: Read-only file system", "workspace=FOLDER")),
    ),
    "other python": (
        change("python", "3.9.1"),
        *("python", FAIL, ("n2: python 3.9.1 (here 3.11.7)", "cluster.setup")),
    ),
    "other checkout": (change("code", "/old"), "python", FAIL, ("/old (here /c)",)),
    "other torch": (
        change("packages / versions / torch", "2.6.0"),
        *("packages", FAIL, ("n2: torch 2.6.0 (here 2.11.0)",)),
    ),
    "no lightning": (
        change("packages / error", "import of pytorch_lightning: ModuleNotFoundError: none"),
        *("packages", FAIL, ("n2: import of pytorch_lightning: ModuleNotFoundError",)),
    ),
    "one core": (
        change("cores", 1, 3),
        *("cores", FAIL, ("1 to 8 of the 8 requested by cluster.cpus_per_task", "srun=[--cpu-bind=none]")),
    ),
    "little memory": (
        change("memory / usable", 8 * 2.0**30),
        *("memory", FAIL, ("n2: 8.6 GB of the node's 512.0 GB", "less than cluster.memory_gb=64")),
    ),
    "GPU that torch cannot use": (
        change("gpus / torch", ["H200"]),
        *("GPUs", FAIL, ("2 requested, 1 usable", "built for this driver")),
    ),
    "driver is too old": (
        gpus(0, "The NVIDIA driver on your system is too old (found version 12040)", 0, 2),
        *("GPUs", FAIL, ("2 requested, 0 usable", "found version 12040", "built for this driver")),
    ),
    "no libcuda": (
        gpus(0, "Found no NVIDIA driver on your system", 0, 2),
        *("GPUs", FAIL, ("can use 0: Found no NVIDIA driver", "libcuda.so.1")),
    ),
    "no fabric manager": (
        gpus(0, "Error 802: system not yet initialized"),
        *(
            "GPUs",
            FAIL,
            ("n2: 2 x H200", "0: Error 802", "nvidia-fabricmanager", "n2 out by cluster.sbatch.ex"),
        ),
    ),
    "GPU without kernels": (
        gpus(0, "GPU 0 1: CUDA error: no kernel image is available for execution on the device", 0, 2),
        *("GPUs", FAIL, ("GPU 0 1: CUDA error: no kernel image", "from Turing on", "cluster.constraint")),
    ),
    "broken GPU": (
        gpus(1, "GPU 1: CUDA error: uncorrectable ECC error encountered"),
        *(
            "GPUs",
            FAIL,
            ("1 usable", "finds 2; n2:", "GPU 1: CUDA error", "n2 out by cluster.sbatch.exclude"),
        ),
    ),
    "GPU in use": (
        gpus(1, "GPU 1: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        *("GPUs", FAIL, ("GPU 1: CUDA error", "another process")),
    ),
    "lost GPU": (
        gpus(
            1, "", driver=[], error="Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost"
        ),
        *("GPUs", FAIL, ("1 usable", "nvidia-smi: Unable to determine the device handle", "broken")),
    ),
    "slow import": (
        change("packages / error", "import of torch: no result within 300 s"),
        *("packages", FAIL, ("n2: import of torch: no result", "the import is slow", "cluster.container")),
    ),
    "slow import of another torch": (
        lambda tasks: tasks[2].update(
            packages={"versions": {"torch": "1"}, "error": "no result within 300 s"}
        ),
        *("packages", FAIL, ("n2: torch 1 (here 2.11.0), no result", "install the pinned versions")),
    ),
    "no driver": (
        no_driver,
        *("GPUs", FAIL, ("0 usable (no nvidia-smi, Slurm granted 2", "cluster.stage.train.partition")),
    ),
    "no scratch": (
        change("disks / cluster.scratch", disk("/scratch", "", 0, error="no such folder")),
        *("scratch", FAIL, ("/scratch on n2: no such folder", "cluster.scratch=FOLDER")),
    ),
    "scratch is full": (
        change("disks / cluster.scratch", disk("/scratch", "xfs", full=True)),
        *("scratch", FAIL, ("on n2", "full", "cluster.scratch=FOLDER")),
    ),
    "scratch is shared": (
        change("disks / cluster.scratch", disk("/scratch", "lustre", 8 * GB)),
        *("scratch", WARN, ("network file system",)),
    ),
    "scratch is small": (
        change("disks / cluster.scratch", disk("/scratch", "xfs", 80 * GB)),
        *("scratch", WARN, ("155.0 GB",)),
    ),
    "no internet": (
        lambda tasks: tasks[0]["internet"].update(status=None, error="timed out"),
        *("internet", FAIL, ("not reachable from n1 (timed out)", "cluster.stage.download.partition=")),
    ),
    "unknown host name": (
        change("peer / error", "n1:12345: Name or service not known"),
        *("network", FAIL, ("from n2: n1:12345: Name or service not known", "cluster.nodes=1")),
    ),
    "port in use": (
        change("peer / error", "n1:12345: Address already in use", 0),
        *("network", FAIL, ("from n1: n1:12345: Address already in use", "run the doctor again")),
    ),
    "second node without a peer": (change("peer", None), "network", WARN, ("not checked",)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_problem_fails_one_check_and_names_the_setting(case: str) -> None:
    apply, check, status, words = CASES[case]
    tasks = healthy()
    apply(tasks)
    found = findings(tasks)
    assert found[check].status == status, found
    assert found[check].fix
    for word in words:
        assert word in found[check].found + found[check].fix, found[check]
    assert {name for name, finding in found.items() if finding.status == FAIL} <= {check}, found
    assert "\n" not in found[check].found + found[check].fix


@pytest.mark.parametrize(
    ("settings", "check", "word"),
    [
        ({"cpus_per_task": None}, "cores", "cluster.cpus_per_task=8"),
        ({"memory_gb": None}, "memory", "cluster.memory_gb=32"),
        ({"tasks_per_node": 4}, "GPUs", "cluster.tasks_per_node=2"),
    ],
)
def test_defaults_of_the_cluster_can_be_too_small(settings: dict[str, Any], check: str, word: str) -> None:
    tasks = healthy()
    for task in tasks.values():
        task["cores"] = 1 if check == "cores" else 8
        if check == "memory" and "memory" in task:
            task["memory"] = {"total": 512 * GB, "usable": 200 * 2.0**20}
    finding = findings(tasks, **settings)[check]
    assert (finding.status, word in finding.fix) == (FAIL, True), finding


def test_gpus_without_gpus_per_node() -> None:
    """`--gres` in cluster.sbatch also grants GPUs; a training uses what it finds."""
    tasks = healthy()
    usual = {"gpus_per_node": None, "tasks_per_node": 2, "sbatch": {"gres": "gpu:2"}}
    assert findings(tasks, **usual)["GPUs"].status == OK
    for rank in (0, 2):
        tasks[rank]["gpus"]["torch"] = []
    assert "2 requested, 0 usable" in findings(tasks, **usual)["GPUs"].found
    for rank in (0, 2):
        tasks[rank]["gpus"] |= {"granted": 0, "driver": [], "error": "no nvidia-smi"}
    finding = findings(tasks, **usual)["GPUs"]
    assert finding.status == OK
    assert finding.found.startswith("none requested (no nvidia-smi, Slurm granted 0")


def test_a_broken_gpu_that_a_training_may_get_is_a_warning() -> None:
    tasks = healthy()
    gpus(1, "GPU 1: CUDA error: uncorrectable ECC error encountered")(tasks)
    finding = findings(tasks, gpus_per_node=1)["GPUs"]
    assert (finding.status, "broken" in finding.fix) == (WARN, True), finding


def test_gpus_of_amd_have_no_nvidia_smi() -> None:
    tasks = healthy()
    gpus(2, "", 0, 2, driver=[], error="no nvidia-smi (No such file or directory)")(tasks)
    assert findings(tasks)["GPUs"] == Finding(OK, "2 x H200, Slurm granted 2, torch, built for 13.0, finds 2")


def test_gpus_that_are_not_used() -> None:
    finding = findings(healthy(), gpus_per_node=0)["GPUs"]
    assert finding.status == OK
    assert finding.found.startswith("none requested (2 x H200")


def test_tasks_bound_to_one_gpu_each() -> None:
    tasks = healthy()
    for rank in (0, 2):
        tasks[rank]["gpus"]["torch"] = ["H200"]
    assert findings(tasks, tasks_per_node=2)["GPUs"].status == FAIL
    for task in tasks.values():
        task["visible_gpus"] = 1
    assert findings(tasks, tasks_per_node=2)["GPUs"].status == OK


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
def test_explain_probe_without_reports(log: str | None, check: str, word: str) -> None:
    name, finding = node_checks.explain_no_report(probe({}), "/w", log, "Slurm: failed (exit code 7)")
    assert (name, finding.status) == (check, FAIL)
    assert word in finding.found + finding.fix


@pytest.mark.parametrize(
    ("config", "partition", "status", "word"),
    [
        ("PreemptType=preempt/none", "", OK, "not preempted"),
        (
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
            *("PreemptMode=OFF", OK, "not in partition"),
        ),
        (
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
            *("GraceTime=0", WARN, "without a warning"),
        ),
        ("PreemptType=preempt/qos\nPreemptMode=CANCEL", "GraceTime=0", WARN, "retry"),
        ("PreemptType=preempt/partition_prio\nPreemptMode=GANG,SUSPEND", "", OK, "suspended and continue"),
        ("", "", WARN, "fails"),
    ],
)
def test_preemption(config: str, partition: str, status: str, word: str) -> None:
    settings = dict(line.split("=") for line in config.splitlines())
    known = {"debug": dict(pair.split("=") for pair in partition.split()) | {"Default": "YES"}}
    finding = cluster_checks.check_preemption(cluster(), settings, known)
    assert (finding.status, word in finding.found) == (status, True), finding


@pytest.mark.parametrize(
    ("sbatch", "settings", "status"),
    [
        ({}, {"JobRequeue": "0"}, OK),  # our jobs request it themselves
        ({"no_requeue": True}, {"JobRequeue": "1"}, WARN),
        ({"requeue": False}, {}, WARN),
    ],
)
def test_requeue_turned_off(sbatch: dict[str, bool], settings: dict[str, str], status: str) -> None:
    assert cluster_checks.check_requeue(cluster(sbatch=sbatch), settings).status == status


def test_a_missing_scratch_folder_is_made_for_all_users_unless_it_is_of_one() -> None:
    for scratch, mkdir in (("/local", "add mkdir -p -m 1777 … to"), ("/local/$USER", "add mkdir -p … to")):
        tasks = healthy()
        tasks[2]["disks"]["cluster.scratch"] = disk("/local/me", "", 0, error="no such folder")
        assert mkdir in findings(tasks, scratch=scratch)["scratch"].fix
