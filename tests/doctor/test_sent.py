"""The doctor from the door to the probe, on commands that only play Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from door import Door

from hpc_imagenet.doctor import probe_job, run
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN
from hpc_imagenet.launch import slurm


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
    monkeypatch.setattr(run, "PACKAGES", ("submitit=submitit",))  # torch takes seconds
    monkeypatch.setattr(probe_job, "LAG", 0.5)
    monkeypatch.setattr(probe_job, "_EVERY", 0.2)
    slurm.max_array_size.cache_clear()
    return Stage(tmp_path)


ONE = "~cluster.stage.download"  # as training: one probe for both


def test_all_is_well_and_nothing_is_left(stage: Stage) -> None:
    lines = stage.doctor("cluster.cpus_per_task=1")
    assert {line["status"] for line in lines.values()} <= {OK, WARN}, lines
    assert {where for where, _ in lines} == {"login", "download", "train"}
    assert lines["train", "probe"]["found"].startswith("job 1 ran on n1")
    assert "submitit" in lines["train", "packages"]["found"]
    assert lines["train", "sacct"]["status"] == lines["train", "workspace"]["status"] == OK
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
    wrong = {check for (_, check), line in lines.items() if line["status"] == FAIL}
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
    assert line["status"] == FAIL
    assert said.removeprefix("sbatch: error: ") in line["found"]
    for word in words:
        assert word in line["fix"], line
    assert ("train", "probe") not in lines


def test_a_stage_s_own_setting_is_named_in_full(stage: Stage) -> None:
    stage.plays("sbatch", "[[ $1 == --version ]] || { echo 'invalid partition specified: net' >&2; exit 1; }")
    lines = stage.doctor("+cluster.stage.download.partition=net", code=1)
    assert "cluster.stage.download.partition=net" in lines["login", "download"]["fix"]
    assert "cluster.partition=null" in lines["login", "upload"]["fix"]


def test_sbatch_may_refuse_what_it_took_on_trial(stage: Stage) -> None:
    usual = STUBS["sbatch"].replace(
        "\nn=$((", "\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1\nn=$(("
    )
    stage.plays("sbatch", usual)
    line = stage.doctor(ONE, code=1)["train", "probe"]
    assert line["status"] == FAIL
    assert "QOSMaxSubmitJobPerUserLimit" in line["found"]


@pytest.mark.slow
def test_a_probe_that_never_starts_is_cancelled(stage: Stage) -> None:
    stage.plays("squeue", f"echo '{row(1, 'PENDING', 'Resources')}'")
    stage.plays("srun", "true")
    line = stage.doctor(ONE, "--timeout=0.5", code=1)["train", "probe"]
    assert line["status"] == FAIL
    assert "(Resources) and was cancelled" in line["found"]
    assert "--timeout" in line["fix"]
    assert stage.cancelled == "1\n"
    assert stage.left == []


def test_a_reason_that_no_waiting_mends_is_not_waited_for(stage: Stage) -> None:
    stage.plays("squeue", f"echo '{row(1, 'PENDING', 'InvalidQOS')}'")
    stage.plays("srun", "true")
    line = stage.doctor(ONE, "cluster.qos=fast", code=1)["train", "probe"]
    assert "change cluster.qos" in line["fix"]
    assert stage.cancelled == "1\n"


@pytest.mark.slow
def test_a_workspace_that_the_nodes_do_not_have(stage: Stage) -> None:
    # Slurm cannot open the job's output there, and ends it.
    stage.plays(
        "sbatch",
        STUBS["sbatch"].replace("SLURM_JOB_ID=$n SLURM", "true || SLURM").replace("COMPLETED", "FAILED"),
    )
    line = stage.doctor(ONE, code=1)["train", "workspace"]
    assert line["status"] == FAIL
    assert "is not shared with the nodes" in line["found"]
    assert "workspace=FOLDER" in line["fix"]


@pytest.mark.slow
def test_a_node_without_python(stage: Stage) -> None:
    stage.plays(
        "srun", "echo 'slurmstepd: error: execve(): /x/python: No such file or directory' >&2; exit 2"
    )
    lines = stage.doctor(ONE, code=1)
    assert lines["train", "python"]["status"] == FAIL
    assert "execve" in lines["train", "python"]["found"]
    assert stage.left


@pytest.mark.slow
def test_what_the_setup_printed_is_shown(stage: Stage) -> None:
    line = stage.doctor(ONE, "cluster.cpus_per_task=1", "cluster.setup=[no-such-module load]")[
        "train", "printed"
    ]
    assert line["status"] == WARN
    assert "no-such-module: command not found" in line["found"]


@pytest.mark.slow
def test_a_login_side_without_accounting_is_no_failure(stage: Stage) -> None:
    stage.plays("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    lines = stage.doctor(ONE, "cluster.cpus_per_task=1")
    for where in ("login", "train"):
        assert lines[where, "sacct"]["status"] == WARN
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
    assert "cluster=local" in line["fix"]


def test_a_workspace_that_cannot_be_made(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = stage.doctor(f"workspace={tmp_path}/file/workspace", code=1)
    assert lines["login", "workspace"]["status"] == FAIL
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
    assert "dataset.source=FOLDER" in line["fix"]


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


@pytest.mark.slow
def test_old_traces_go(tmp_path: Path, stage: Stage) -> None:
    folder = stage.door.workspace / "runs/.doctor"
    for name in ("old", "new"):
        (folder / name).mkdir(parents=True)
    os.utime(folder / "old", (time.time() - 100_000,) * 2)
    stage.door("doctor", "cluster=local", "dataset=digits")
    assert [path.name for path in stage.left] == ["new"]
