"""The doctor from the command line to the probe, with stubs of Slurm's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import SRUN, queue_row, write_command

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.doctor import probe_job, run
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN

pytestmark = pytest.mark.slow

# This Slurm starts every job at once, on this machine, as one task, and keeps all jobs in the queue.
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
    "srun": SRUN,
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


class StubSlurm:
    """Stubs of Slurm's commands, and a command line that uses them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "slurm-bin"
        self.folder.mkdir()
        for name, text in STUBS.items():
            self.replace(name, text)
        self.cli = Cli(folder / "workspace", path=f"{self.folder}:{os.environ['PATH']}")

    def replace(self, name: str, text: str) -> None:
        for state in ("RUNNING", "COMPLETED", "FAILED"):
            text = text.replace(f"{state}_ROW", queue_row("@", state))
        write_command(self.folder, name, text)

    def doctor(self, *settings: str, code: int = 0) -> dict[tuple[str, str], dict[str, str]]:
        """Return the doctor's results by (where, check)."""
        usual = ("cluster=slurm", "dataset=digits", "cluster.gpus_per_node=0", "cluster.time=30")
        done = self.cli("doctor", *with_defaults(usual, settings), "--json", code=code)
        return {(line["where"], line["check"]): line for line in json.loads(done.stdout)}

    @property
    def cancelled(self) -> str:
        path = self.folder / "cancelled"
        return path.read_text() if path.exists() else ""

    @property
    def left(self) -> list[Path]:
        return list((self.cli.workspace / "runs/.doctor").glob("*"))


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubSlurm:
    monkeypatch.setattr(run, "PACKAGES", ("submitit=submitit",))  # torch takes seconds
    monkeypatch.setattr(probe_job, "FILE_DELAY", 0.5)
    monkeypatch.setattr(probe_job, "QUERY_INTERVAL", 0.2)
    slurm.max_array_size.cache_clear()
    return StubSlurm(tmp_path)


ONE_PROBE = "~cluster.stage.download"  # the settings of training: one probe for both stages


def test_healthy_cluster_leaves_no_files(stub: StubSlurm) -> None:
    lines = stub.doctor("cluster.cpus_per_task=1")
    assert {line["status"] for line in lines.values()} <= {OK, WARN}, lines
    assert {where for where, _ in lines} == {"login", "download", "train"}
    assert lines["train", "probe"]["found"].startswith("job 1 ran on n1")
    assert "submitit" in lines["train", "packages"]["found"]
    assert lines["train", "sacct"]["status"] == lines["train", "workspace"]["status"] == OK
    assert "30 s (GraceTime)" in lines["login", "preemption"]["found"]
    assert stub.left == []
    assert stub.cancelled == ""
    assert stub.cli.jobs() == []  # the probe is not a run
    script = (stub.folder / "job.1").read_text()
    assert "--kill-on-bad-exit=1" in script
    assert "#SBATCH --time=10\n" in script
    assert "hpc_imagenet.launch.slurm_jobs.requeue" not in script


def test_failed_check_keeps_logs(stub: StubSlurm) -> None:
    settings = ["cluster.cpus_per_task=4096", "cluster.scratch=/no/where", "cluster.setup=['echo began >&2']"]
    lines = stub.doctor(*settings, ONE_PROBE, code=1)
    failed = {check for (_, check), line in lines.items() if line["status"] == FAIL}
    assert failed == {"cores", "scratch"}
    assert list(stub.left[0].glob("train/1_0_log.err"))


def test_text_output(stub: StubSlurm) -> None:
    done = stub.cli("doctor", "cluster=slurm", "dataset=digits", "cluster.time=90", code=1)
    assert (
        "cluster.time=90 exceeds partition debug's limit\n                 → set cluster.time=60"
        in done.stdout
    )
    assert done.stdout.count("✗") == 4  # no probe is submitted for a stage that Slurm refuses
    assert done.stdout.endswith("4 checks failed\n")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("sbatch: error: invalid partition specified: gpu", ("cluster.partition=null", "partitions: debug")),
        ("Invalid account or account/partition combination specified", ("cluster.account=null",)),
        ("Invalid qos specification", ("cluster.qos=null",)),
        ("Invalid feature specification", ("cluster.constraint=null",)),
        ("Requested node configuration is not available", ("cluster.nodes=1", "cluster.memory_gb=null")),
        ("Invalid generic resource (gres) specification", ("cluster.gpus_per_node=0",)),
    ],
)
def test_refusal_of_sbatch_names_the_setting(stub: StubSlurm, message: str, words: tuple[str, ...]) -> None:
    stub.replace("sbatch", f"[[ $1 == --version ]] || {{ echo '{message}' >&2; exit 1; }}")
    lines = stub.doctor(ONE_PROBE, code=1)
    line = lines["login", "train"]
    assert line["status"] == FAIL
    assert message.removeprefix("sbatch: error: ") in line["found"]
    for word in words:
        assert word in line["fix"], line
    assert ("train", "probe") not in lines


def test_stage_setting_is_named_in_full(stub: StubSlurm) -> None:
    stub.replace(
        "sbatch", "[[ $1 == --version ]] || { echo 'invalid partition specified: net' >&2; exit 1; }"
    )
    lines = stub.doctor("+cluster.stage.download.partition=net", code=1)
    assert "cluster.stage.download.partition=net" in lines["login", "download"]["fix"]
    assert "cluster.partition=null" in lines["login", "upload"]["fix"]


def test_sbatch_refuses_after_test_only(stub: StubSlurm) -> None:
    usual = STUBS["sbatch"].replace(
        "\nn=$((", "\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1\nn=$(("
    )
    stub.replace("sbatch", usual)
    line = stub.doctor(ONE_PROBE, code=1)["train", "probe"]
    assert line["status"] == FAIL
    assert "QOSMaxSubmitJobPerUserLimit" in line["found"]


def test_pending_probe_is_cancelled_at_timeout(stub: StubSlurm) -> None:
    stub.replace("squeue", f"echo '{queue_row(1, 'PENDING', 'Resources')}'")
    stub.replace("srun", "true")
    line = stub.doctor(ONE_PROBE, "--timeout=0.5", code=1)["train", "probe"]
    assert line["status"] == FAIL
    assert "(Resources) and was cancelled" in line["found"]
    assert "--timeout" in line["fix"]
    assert stub.cancelled == "1\n"
    assert stub.left == []


def test_probe_that_can_never_start_is_cancelled_at_once(stub: StubSlurm) -> None:
    stub.replace("squeue", f"echo '{queue_row(1, 'PENDING', 'InvalidQOS')}'")
    stub.replace("srun", "true")
    line = stub.doctor(ONE_PROBE, "cluster.qos=fast", code=1)["train", "probe"]
    assert "change cluster.qos" in line["fix"]
    assert stub.cancelled == "1\n"


def test_workspace_not_shared(stub: StubSlurm) -> None:
    # Slurm cannot open the job's output file there, and ends the job.
    stub.replace(
        "sbatch",
        STUBS["sbatch"].replace("SLURM_JOB_ID=$n SLURM", "true || SLURM").replace("COMPLETED", "FAILED"),
    )
    line = stub.doctor(ONE_PROBE, code=1)["train", "workspace"]
    assert line["status"] == FAIL
    assert "is not shared with the nodes" in line["found"]
    assert "workspace=FOLDER" in line["fix"]


def test_no_python_on_node(stub: StubSlurm) -> None:
    stub.replace(
        "srun", "echo 'slurmstepd: error: execve(): /x/python: No such file or directory' >&2; exit 2"
    )
    lines = stub.doctor(ONE_PROBE, code=1)
    assert lines["train", "python"]["status"] == FAIL
    assert "execve" in lines["train", "python"]["found"]
    assert stub.left


def test_stderr_of_setup_is_shown(stub: StubSlurm) -> None:
    line = stub.doctor(ONE_PROBE, "cluster.cpus_per_task=1", "cluster.setup=[no-such-module load]")[
        "train", "printed"
    ]
    assert line["status"] == WARN
    assert "no-such-module: command not found" in line["found"]


def test_no_accounting_is_a_warning(stub: StubSlurm) -> None:
    stub.replace("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    lines = stub.doctor(ONE_PROBE, "cluster.cpus_per_task=1")
    for where in ("login", "train"):
        assert lines[where, "sacct"]["status"] == WARN
        assert "squeue" in lines[where, "sacct"]["found"]
    assert "storage is disabled" in lines["login", "sacct"]["found"]


def test_squeue_fails(stub: StubSlurm) -> None:
    stub.replace("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    lines = stub.doctor(code=1)
    assert "Unable to contact" in lines["login", "squeue"]["found"]
    assert {where for where, _ in lines} == {"login"}


def test_no_slurm_commands(stub: StubSlurm, tmp_path: Path) -> None:
    stub.cli.env["PATH"] = str(tmp_path)
    line = stub.doctor(code=1)["login", "commands"]
    assert "not on the PATH: sbatch, srun, squeue, scontrol, scancel" in line["found"]
    assert "cluster=local" in line["fix"]


def test_workspace_cannot_be_created(stub: StubSlurm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = stub.doctor(f"workspace={tmp_path}/file/workspace", code=1)
    assert lines["login", "workspace"]["status"] == FAIL
    assert ("train", "probe") not in lines


def test_source_folder_missing_on_node(stub: StubSlurm) -> None:
    words = (
        ONE_PROBE,
        "dataset=ilsvrc",
        "dataset.name=birds",
        "dataset.source=/no/birds",
        "cluster.cpus_per_task=1",
    )
    line = stub.doctor(*words, code=1)["train", "source"]
    assert line["found"] == "/no/birds: no such folder on n1"
    assert "dataset.source=FOLDER" in line["fix"]


def test_local_probe_is_a_process(stub: StubSlurm) -> None:
    done = stub.cli("doctor", "cluster=local", "dataset=digits")
    assert done.stdout.endswith("no check failed\n")
    assert "✓ probe        a process ran on" in done.stdout
    assert "squeue" not in done.stdout
    assert stub.left == []


def test_local_probe_inside_an_allocation_is_one_process_without_srun(stub: StubSlurm) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n1"}
    stub.cli.env |= {**step, "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    stub.replace("srun", "exit 1")
    done = stub.cli("doctor", "cluster=local", "dataset=digits")
    assert "✓ probe        a process ran on" in done.stdout


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("cluster=nowhere",), "cluster=nowhere is unknown"),
        (("cluster.nodez=2",), "did you mean: cluster.nodes"),
        (("cluster=local", "seed=1,2"), "one combination"),
        (("mine",), "mine is not an option or SETTING=VALUE"),
        (("--timeout=soon",), "--timeout"),
    ],
)
def test_invalid_arguments(cli: Cli, words: tuple[str, ...], word: str) -> None:
    assert word in cli.refused("doctor", *words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_cancels_the_probe(stub: StubSlurm, number: signal.Signals) -> None:
    stub.replace("squeue", f"echo '{queue_row(1, 'PENDING', 'Priority')}'")
    stub.replace("srun", "true")
    command = [
        sys.executable,
        "-m",
        "hpc_imagenet",
        "doctor",
        "cluster=slurm",
        "dataset=digits",
        ONE_PROBE,
        "cluster.time=30",
    ]
    with subprocess.Popen(
        command,
        env=stub.cli.env,
        cwd=stub.cli.cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        while "probes:" not in (line := process.stdout.readline()):
            assert line, "the doctor ended before the signal"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the probe was cancelled" in stderr
    assert "Traceback" not in stderr
    assert stub.cancelled == "1\n"
    assert stub.left == []


def test_old_probe_folders_are_removed(tmp_path: Path, stub: StubSlurm) -> None:
    folder = stub.cli.workspace / "runs/.doctor"
    for name in ("old", "new"):
        (folder / name).mkdir(parents=True)
    os.utime(folder / "old", (time.time() - 100_000,) * 2)
    stub.cli("doctor", "cluster=local", "dataset=digits")
    assert [path.name for path in stub.left] == ["new"]
