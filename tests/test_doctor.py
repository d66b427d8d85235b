"""The doctor: each line that can fail, on made-up reports and on commands that only play Slurm."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from door import Door

from hpc_imagenet import slurm
from hpc_imagenet.config import Cluster
from hpc_imagenet.doctor import examine, login, nodes, probe, sent
from hpc_imagenet.doctor.line import UNSURE, WELL, WRONG, Line, Seen

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
                    "/dev/shm": disk("/dev/shm", "tmpfs"),
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


def seen(told: dict[str, Any], **settings: Any) -> Seen:
    return Seen(
        stage="train",
        cluster=cluster(**settings),
        overlaid=frozenset({"partition"}),
        size=4,
        home=HOME,
        archives=155 * GB,
        source="https://image-net.org/data",
        **told,
    )


def judged(seen: Seen) -> dict[str, Line]:
    return {line.check: line for line in nodes.lines(seen)}


def test_nothing_is_wrong_with_what_is_well() -> None:
    lines = judged(seen(healthy()))
    assert {line.mark for line in lines.values()} == {WELL}, lines
    assert list(lines) == [
        *("workspace", "python", "packages", "cores", "memory", "GPUs", "scratch", "/dev/shm"),
        *("internet", "clocks", "network"),
    ]
    assert not any(line.mend for line in lines.values())
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
    "a task said nothing": (lost("hellos", 3), "workspace", WRONG, ("1 of 4 tasks", "workspace=FOLDER")),
    "a node stopped": (lost("reports", 2), "workspace", WRONG, ("n2 began", "cluster.memory_gb")),
    "not writable": (
        nodes_told("disks / workspace", disk("/w", "nfs4", error="Read-only file system")),
        *("workspace", WRONG, ("n2: Read-only file system", "workspace=FOLDER")),
    ),
    "nothing of ours was seen": (nodes_told("clock", None), "workspace", UNSURE, ("a node saw nothing",)),
    "seen late": (
        nodes_told("clock", {"sent": 0.0, "seen": 20.0, "answered": 20.0, "back": 40.0}),
        *("workspace", UNSURE, ("within 40.0 s",)),
    ),
    "another python": (
        nodes_told("python", "3.9.1", "hellos"),
        *("python", WRONG, ("n2: python 3.9.1 (here 3.11.7)", "cluster.setup")),
    ),
    "another checkout": (nodes_told("code", "/old", "hellos"), "python", WRONG, ("/old (here /c)",)),
    "another torch": (
        nodes_told("packages / 0", {"package": "torch", "version": "2.6.0", "error": "", "gpus": ["a"] * 2}),
        *("packages", WRONG, ("n2: torch 2.6.0 (here 2.11.0)",)),
    ),
    "no lightning": (
        nodes_told("packages / 1 / error", "PackageNotFoundError: none"),
        *("packages", WRONG, ("n2: pytorch-lightning: PackageNotFoundError",)),
    ),
    "one core": (
        nodes_told("cores", 1, "hellos", 3),
        *("cores", WRONG, ("1 to 8 of the 8 that cluster.cpus_per_task", "cluster.srun=[--cpu-bind=none]")),
    ),
    "little memory": (
        nodes_told("memory / limit", 8 * 2.0**30),
        *("memory", WRONG, ("n2: 8.6 GB (cgroup)", "less than cluster.memory_gb=64")),
    ),
    "a GPU does not answer": (
        nodes_told("packages / 0 / gpus", ["H200"]),
        *("GPUs", WRONG, ("2 asked for, 1 answers", "built for this driver")),
    ),
    "no driver": (
        lambda told: [
            nodes_told("gpus", {"given": 2, "cards": [], "error": "no nvidia-smi"}, rank=rank)(told)
            or nodes_told("packages / 0 / gpus", [], rank=rank)(told)
            for rank in (0, 2)
        ],
        *("GPUs", WRONG, ("0 answer (no nvidia-smi, Slurm gave 2", "cluster.stage.train.partition")),
    ),
    "no scratch": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "", 0, error="no such folder")),
        *("scratch", WRONG, ("/scratch on n2: no such folder", "cluster.scratch=FOLDER")),
    ),
    "scratch is full": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "xfs", 10**6)),
        *("scratch", WRONG, ("on n2", "full", "cluster.scratch=FOLDER")),
    ),
    "scratch has no files left": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "xfs", inodes=3)),
        *("scratch", WRONG, ("3 files free",)),
    ),
    "scratch is shared": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "lustre", 8 * GB)),
        *("scratch", UNSURE, ("network file system",)),
    ),
    "scratch is small": (
        nodes_told("disks / cluster.scratch", disk("/scratch", "xfs", 80 * GB)),
        *("scratch", UNSURE, ("155.0 GB",)),
    ),
    "no shared memory": (
        nodes_told("disks / /dev/shm", disk("/dev/shm", "tmpfs", 64 * 10**6)),
        *("/dev/shm", UNSURE, ("loader.workers=0",)),
    ),
    "no internet": (
        lambda told: told["reports"][0]["internet"].update(status=None, error="timed out"),
        *("internet", WRONG, ("not reachable from n1 (timed out)", "cluster.stage.download.partition=")),
    ),
    "a clock is wrong": (
        nodes_told("clock", {"sent": 60.0, "seen": 0.1, "answered": 0.1, "back": 60.2}),
        *("clocks", WRONG, ("n2 is 60 s ahead", "+cluster.sbatch.exclude=n2")),
    ),
    "a name is none": (
        nodes_told("peers / failed", ["n1 is no name here"]),
        *("network", WRONG, ("from n2: n1 is no name here", "cluster.nodes=1")),
    ),
    "a node's files are not seen by another": (
        nodes_told("peers / nodes", 0),
        *("network", WRONG, ("from n2: does not see the files of 1",)),
    ),
    "the port is taken": (
        nodes_told("taken", "port 12345: Address already in use", "hellos"),
        *("network", WRONG, ("n2: port 12345", "ask again")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_line_fails_alone_and_says_what_to_set(case: str) -> None:
    change, check, mark, words = CASES[case]
    told = healthy()
    change(told)
    lines = judged(seen(told))
    line = lines[check]
    assert line.mark == mark, line
    assert line.mend
    for word in words:
        assert word in line.found + line.mend, line
    wrong = {line.check for line in lines.values() if line.mark == WRONG}
    assert wrong <= {check}, lines
    assert "\n" not in line.found + line.mend


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
    assert (line.mark, word in line.mend) == (WRONG, True), line


def test_gpus_that_no_setting_counts() -> None:
    """`--gres` among the further options of sbatch gives some as well; training takes what is there."""
    told = healthy()
    usual = {"gpus_per_node": None, "tasks_per_node": 2, "sbatch": {"gres": "gpu:2"}}
    assert judged(seen(told, **usual))["GPUs"].mark == WELL
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
    assert judged(seen(told, tasks_per_node=2))["GPUs"].mark == WRONG
    for hello in told["hellos"].values():
        hello["visible"] = 1
    assert judged(seen(told, tasks_per_node=2))["GPUs"].mark == WELL


def test_a_clock_is_judged_by_what_is_certain() -> None:
    """A slow file system makes the way there and back long, and says nothing about the clock."""
    told = healthy()
    told["reports"][2]["clock"] = {"sent": 0.0, "seen": 9.0, "answered": 9.0, "back": 9.1}
    assert judged(seen(told))["clocks"].mark == WELL
    told["reports"][2]["clock"] = {"sent": -60.0, "seen": 9.0, "answered": 9.0, "back": -50.9}
    line = judged(seen(told))["clocks"]
    assert line.mark == WRONG
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
    line = nodes.nothing(seen({}), "/w", log, "Slurm: failed (exit code 7)")
    assert (line.check, line.mark) == (check, WRONG)
    assert word in line.found + line.mend


def row(job: object, state: str, reason: str = "None") -> str:
    """Return a line of squeue as slurm.py asks for it."""
    cells = {"jobarrayid": str(job), "state": state, "reason": reason}
    return "".join(cells.get(name, "0").ljust(width) for name, width in slurm._COLUMNS)


# A Slurm that starts every job at once, on this machine, as one task, and forgets none.
STUBS = {
    "sbatch": """
case "$1" in
  --version) echo slurm 22.05.8; exit ;;
  --test-only) cat > $here/tested; echo "sbatch: Job 9 to start at 2030-01-01T00:00:00 using 1 \
processors on nodes n1 in partition debug" >&2; exit ;;
esac
n=$(($(ls $here | grep -c '^job\\.') + 1)); cp "$1" $here/job.$n
out=$(sed -n 's/^#SBATCH --output=//p' "$1"); err=$(sed -n 's/^#SBATCH --error=//p' "$1")
echo "RUNNING_ROW" | sed s/@/$n/ > $here/queue.$n
( SLURM_JOB_ID=$n SLURM_CPUS_PER_TASK=1 bash $here/job.$n >> "${out//%j/$n}" 2>> "${err//%j/$n}"
  echo "COMPLETED_ROW" | sed s/@/$n/ > $here/queue.$n ) > /dev/null 2>&1 &
echo Submitted batch job $n""",
    "srun": """
while [[ $1 == --* ]]; do
  case $1 in
    --output) out=$2; shift ;;
    --error) err=$2; shift ;;
  esac
  shift
done
out=${out//%t/0} err=${err//%t/0}
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_STEP_ID=0 SLURM_JOB_NODELIST=n1 SLURMD_NODENAME=n1
exec "$@" >> "${out//%j/$SLURM_JOB_ID}" 2>> "${err//%j/$SLURM_JOB_ID}\"""",
    "squeue": "cat $here/queue.* 2> /dev/null || true",
    "sacct": "echo COMPLETED",
    "scancel": 'echo "$@" >> $here/cancelled',
    "scontrol": """
case "$2" in
  config)
    echo 'MaxArraySize = 1001'; echo 'JobRequeue = 1'
    echo 'PreemptType = preempt/partition_prio'; echo 'PreemptMode = REQUEUE' ;;
  partition)
    echo PartitionName=debug Default=YES MaxTime=01:00:00 State=UP GraceTime=30 PreemptMode=REQUEUE ;;
esac""",
}


class Stage:
    """The commands that play Slurm, and the door in front of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "slurm-bin"
        self.folder.mkdir()
        for name, text in STUBS.items():
            self.plays(name, text)
        self.door = Door(folder / "workspace", path=f"{self.folder}:{os.environ['PATH']}")

    def plays(self, name: str, text: str) -> None:
        path = self.folder / name
        for state in ("RUNNING", "COMPLETED", "FAILED"):
            text = text.replace(f"{state}_ROW", row("@", state))
        path.write_text(f"#!/bin/bash\nhere={self.folder}\n{text}\n")
        path.chmod(0o755)

    def doctor(self, *words: str, code: int = 0) -> dict[tuple[str, str], dict[str, str]]:
        """Return the doctor's lines by place and matter."""
        usual = ("cluster=slurm", "dataset=digits", "cluster.gpus_per_node=0", "cluster.time=30")
        done = self.door("doctor", *usual, *words, "--json", code=code)
        return {(line["where"], line["check"]): line for line in json.loads(done.stdout)}

    @property
    def cancelled(self) -> str:
        path = self.folder / "cancelled"
        return path.read_text() if path.exists() else ""

    @property
    def left(self) -> list[Path]:
        return list((self.door.workspace / "runs/.doctor").glob("*"))


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(examine, "PACKAGES", ("submitit=submitit",))  # torch takes seconds
    monkeypatch.setattr(sent, "LAG", 0.5)
    monkeypatch.setattr(sent, "_EVERY", 0.2)
    slurm.most_of_an_array.cache_clear()
    return Stage(tmp_path)


ONE = "~cluster.stage.download"  # as training: one probe for both


def test_all_is_well_and_nothing_is_left(stage: Stage) -> None:
    lines = stage.doctor("cluster.cpus_per_task=1")
    assert {line["mark"] for line in lines.values()} <= {WELL, UNSURE}, lines
    assert {where for where, _ in lines} == {"login", "download", "train"}
    assert lines["train", "probe"]["found"].startswith("job 1 ran on n1")
    assert "submitit" in lines["train", "packages"]["found"]
    assert lines["train", "sacct"]["mark"] == lines["train", "workspace"]["mark"] == WELL
    assert "30 s (GraceTime)" in lines["login", "preemption"]["found"]
    assert stage.left == []
    assert stage.cancelled == ""
    assert stage.door.jobs() == []  # it is no run
    script = (stage.folder / "job.1").read_text()
    assert "--kill-on-bad-exit=1" in script
    assert "#SBATCH --time=5\n" in script
    assert "aftermath" not in script


@pytest.mark.slow
def test_a_wrong_line_keeps_what_the_probe_printed(stage: Stage) -> None:
    lines = stage.doctor("cluster.cpus_per_task=4096", ONE, "cluster.scratch=/no/where", code=1)
    wrong = {check for (_, check), line in lines.items() if line["mark"] == WRONG}
    assert wrong == {"cores", "scratch"}
    assert list(stage.left[0].glob("train/1_0_log.err"))


def test_lines_for_people(stage: Stage) -> None:
    done = stage.door("doctor", "cluster=slurm", "dataset=digits", "cluster.time=90", code=1)
    assert (
        "cluster.time=90 is more than partition debug gives\n                 → set cluster.time=60"
        in done.stdout
    )
    assert done.stdout.count("✗") == 4  # the probe of a stage that Slurm does not take is not sent
    assert done.stdout.endswith("4 lines are wrong\n")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("sbatch: error: invalid partition specified: gpu", ("cluster.partition=null", "partitions: debug")),
        ("Invalid account or account/partition combination specified", ("cluster.account=null",)),
        ("Invalid qos specification", ("cluster.qos=null",)),
        ("Invalid feature specification", ("cluster.constraint=null",)),
        ("Requested node configuration is not available", ("cluster.nodes=1", "cluster.memory_gb=null")),
        ("Invalid generic resource (gres) specification", ("cluster.gpus_per_node=0",)),
    ],
)
def test_what_slurm_refuses_names_the_setting(stage: Stage, said: str, words: tuple[str, ...]) -> None:
    stage.plays("sbatch", f"[[ $1 == --version ]] || {{ echo '{said}' >&2; exit 1; }}")
    lines = stage.doctor(ONE, code=1)
    line = lines["login", "train"]
    assert line["mark"] == WRONG
    assert said.removeprefix("sbatch: error: ") in line["found"]
    for word in words:
        assert word in line["mend"], line
    assert ("train", "probe") not in lines


def test_a_stage_s_own_setting_is_named_in_full(stage: Stage) -> None:
    stage.plays("sbatch", "[[ $1 == --version ]] || { echo 'invalid partition specified: net' >&2; exit 1; }")
    lines = stage.doctor("+cluster.stage.download.partition=net", code=1)
    assert "cluster.stage.download.partition=net" in lines["login", "download"]["mend"]
    assert "cluster.partition=null" in lines["login", "upload"]["mend"]


def test_sbatch_may_refuse_what_it_took_on_trial(stage: Stage) -> None:
    usual = STUBS["sbatch"].replace(
        "\nn=$((", "\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1\nn=$(("
    )
    stage.plays("sbatch", usual)
    line = stage.doctor(ONE, code=1)["train", "probe"]
    assert line["mark"] == WRONG
    assert "QOSMaxSubmitJobPerUserLimit" in line["found"]


@pytest.mark.slow
def test_a_probe_that_never_starts_is_cancelled(stage: Stage) -> None:
    stage.plays("squeue", f"echo '{row(1, 'PENDING', 'Resources')}'")
    stage.plays("srun", "true")
    line = stage.doctor(ONE, "--timeout=0.5", code=1)["train", "probe"]
    assert line["mark"] == WRONG
    assert "(Resources) and was cancelled" in line["found"]
    assert "--timeout" in line["mend"]
    assert stage.cancelled == "1\n"
    assert stage.left == []


def test_a_reason_that_no_waiting_mends_is_not_waited_for(stage: Stage) -> None:
    stage.plays("squeue", f"echo '{row(1, 'PENDING', 'InvalidQOS')}'")
    stage.plays("srun", "true")
    line = stage.doctor(ONE, "cluster.qos=fast", code=1)["train", "probe"]
    assert "change cluster.qos" in line["mend"]
    assert stage.cancelled == "1\n"


@pytest.mark.slow
def test_a_workspace_that_the_nodes_do_not_have(stage: Stage) -> None:
    # Slurm cannot open the job's output there, and ends it.
    stage.plays(
        "sbatch",
        STUBS["sbatch"].replace("SLURM_JOB_ID=$n SLURM", "true || SLURM").replace("COMPLETED", "FAILED"),
    )
    line = stage.doctor(ONE, code=1)["train", "workspace"]
    assert line["mark"] == WRONG
    assert "is not shared with the nodes" in line["found"]
    assert "workspace=FOLDER" in line["mend"]


@pytest.mark.slow
def test_a_node_without_python(stage: Stage) -> None:
    stage.plays(
        "srun", "echo 'slurmstepd: error: execve(): /x/python: No such file or directory' >&2; exit 2"
    )
    lines = stage.doctor(ONE, code=1)
    assert lines["train", "python"]["mark"] == WRONG
    assert "execve" in lines["train", "python"]["found"]
    assert stage.left


@pytest.mark.slow
def test_what_the_setup_printed_is_shown(stage: Stage) -> None:
    line = stage.doctor(ONE, "cluster.cpus_per_task=1", "cluster.setup=[no-such-module load]")[
        "train", "printed"
    ]
    assert line["mark"] == UNSURE
    assert "no-such-module: command not found" in line["found"]


@pytest.mark.slow
def test_a_login_side_without_accounting_is_no_failure(stage: Stage) -> None:
    stage.plays("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    lines = stage.doctor(ONE, "cluster.cpus_per_task=1")
    for where in ("login", "train"):
        assert lines[where, "sacct"]["mark"] == UNSURE
        assert "squeue" in lines[where, "sacct"]["found"]
    assert "storage is disabled" in lines["login", "sacct"]["found"]


def test_a_queue_that_does_not_answer(stage: Stage) -> None:
    stage.plays("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    lines = stage.doctor(code=1)
    assert "Unable to contact" in lines["login", "squeue"]["found"]
    assert {where for where, _ in lines} == {"login"}


def test_no_slurm_at_all(stage: Stage, tmp_path: Path) -> None:
    stage.door.env["PATH"] = str(tmp_path)
    line = stage.doctor(code=1)["login", "commands"]
    assert "no sbatch, srun, squeue, scontrol, scancel" in line["found"]
    assert "cluster=local" in line["mend"]


def test_a_workspace_that_cannot_be_made(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = stage.doctor(f"workspace={tmp_path}/file/workspace", code=1)
    assert lines["login", "workspace"]["mark"] == WRONG
    assert ("train", "probe") not in lines


@pytest.mark.slow
def test_a_source_that_the_nodes_do_not_see(stage: Stage) -> None:
    words = (
        ONE,
        "dataset=ilsvrc",
        "dataset.name=birds",
        "dataset.source=/no/birds",
        "cluster.cpus_per_task=1",
    )
    line = stage.doctor(*words, code=1)["train", "source"]
    assert line["found"] == "/no/birds: no such folder on n1"
    assert "dataset.source=FOLDER" in line["mend"]


@pytest.mark.parametrize(
    ("config", "partition", "mark", "word"),
    [
        ("PreemptType=preempt/none", "", WELL, "not preempted"),
        (
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
            "PreemptMode=OFF",
            WELL,
            "not in partition",
        ),
        (
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
            "GraceTime=0",
            UNSURE,
            "without a warning",
        ),
        ("PreemptType=preempt/qos\nPreemptMode=CANCEL", "GraceTime=0", UNSURE, "retry"),
        ("PreemptType=preempt/partition_prio\nPreemptMode=GANG,SUSPEND", "", WELL, "wait and go on"),
        ("", "", UNSURE, "does not answer"),
    ],
)
def test_what_a_preemption_would_do(config: str, partition: str, mark: str, word: str) -> None:
    settings = dict(line.split("=") for line in config.splitlines())
    told = dict(pair.split("=") for pair in partition.split()) | {"Default": "YES"}
    line = login.preemption(cluster(), settings, {"debug": told})
    assert (line.mark, word in line.found) == (mark, True), line


def test_a_job_that_is_not_to_be_requeued() -> None:
    assert login.requeues(cluster(), {"JobRequeue": "0"}).mark == WELL  # our jobs ask for it themselves
    assert login.requeues(cluster(sbatch={"no_requeue": True}), {"JobRequeue": "1"}).mark == UNSURE
    assert login.requeues(cluster(sbatch={"requeue": False}), {}).mark == UNSURE


def test_on_this_machine_it_is_a_process(stage: Stage) -> None:
    done = stage.door("doctor", "cluster=local", "dataset=digits")
    assert done.stdout.endswith("all is well\n")
    assert "✓ probe        a process ran on" in done.stdout
    assert "squeue" not in done.stdout
    assert stage.left == []


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("cluster=nowhere",), "cluster=nowhere is unknown"),
        (("cluster.nodez=2",), "near: cluster.nodes"),
        (("cluster=local", "seed=1,2"), "one combination"),
        (("mine",), "mine is no option and no SETTING=VALUE"),
        (("--timeout=soon",), "--timeout"),
    ],
)
def test_a_user_s_mistake_is_one_line(door: Door, words: tuple[str, ...], word: str) -> None:
    assert word in door.refused("doctor", *words)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_cancels_the_probe(stage: Stage, by: signal.Signals) -> None:
    stage.plays("squeue", f"echo '{row(1, 'PENDING', 'Priority')}'")
    stage.plays("srun", "true")
    command = [
        sys.executable,
        "-m",
        "hpc_imagenet",
        "doctor",
        "cluster=slurm",
        "dataset=digits",
        ONE,
        "cluster.time=30",
    ]
    with subprocess.Popen(
        command,
        env=stage.door.env,
        cwd=stage.door.cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        while "probes:" not in (line := process.stdout.readline()):
            assert line, "it ended by itself"
        process.send_signal(by)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the probe was cancelled" in said
    assert "Traceback" not in said
    assert stage.cancelled == "1\n"
    assert stage.left == []


@pytest.fixture
def server() -> Iterator[str]:
    """An HTTP server that has nothing, and its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    server.server_close()


def test_a_server_that_has_nothing_is_reached_all_the_same(server: str) -> None:
    assert probe.internet(server)["status"] == 404


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    found = probe.internet(f"http://127.0.0.1:{port}/")
    assert (found["status"], found["error"]) == (None, "Connection refused")
    # A proxy is asked instead; its password is shown nowhere.
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    found = probe.internet("http://image-net.org/")
    assert found["proxy"] == "127.0.0.1"
    assert found["error"] == "Connection refused"
    assert "secret" not in str(found)


def test_an_import_that_crashes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashes.py").write_text("import os; os.abort()")
    (tmp_path / "submitit_too.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = probe.imports(["submitit_too=submitit", "none=no-such-package", "crashes=submitit", "json=numpy"])
    assert [bool(each["error"]) for each in told] == [False, True, True, True]
    assert "PackageNotFoundError" in told[1]["error"]
    assert "SIGABRT" in told[2]["error"]


def test_a_folder_is_told_as_it_is(tmp_path: Path) -> None:
    found = probe.disk(tmp_path)
    assert found["error"] == ""
    assert found["free"] > 0
    assert found["kind"]
    assert list(tmp_path.iterdir()) == []
    assert probe.disk(tmp_path / "none")["error"] == "no such folder"
    assert probe.kind(Path("/proc/self")) == "proc"


@pytest.mark.slow
def test_old_traces_go(tmp_path: Path, stage: Stage) -> None:
    folder = stage.door.workspace / "runs/.doctor"
    for name in ("old", "new"):
        (folder / name).mkdir(parents=True)
    os.utime(folder / "old", (time.time() - 100_000,) * 2)
    stage.door("doctor", "cluster=local", "dataset=digits")
    assert [path.name for path in stage.left] == ["new"]
