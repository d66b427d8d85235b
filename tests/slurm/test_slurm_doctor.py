"""The doctor on a real Slurm: all checks pass on a healthy cluster, and each introduced fault is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command_line import eventually
from lab import Lab, LabDoor

ROOT = Path(__file__).resolve().parents[2]
Lines = dict[tuple[str, str], dict[str, str]]

# The lab does not limit the cores of a task, so this srun starts it on one core.
ONE_CORE = """\
srun() {
  local words=() word bind=taskset
  for word in "$@"; do
    if [[ $bind && $word == */python* ]]; then words+=($bind -c CORE); bind=; fi
    words+=("$word")
  done
  command srun "${words[@]}"
}
""".replace("CORE", str(min(os.sched_getaffinity(0))))


def doctor(cluster: LabDoor, *settings: str, code: int = 0) -> Lines:
    """Return the doctor's lines by `where` and `check`."""
    done = cluster("doctor", "cluster=lab", "dataset=digits", *settings, "--json", code=code)
    return {(line["where"], line["check"]): line for line in json.loads(done.stdout)}


def failed(lines: Lines) -> set[tuple[str, str]]:
    return {key for key, line in lines.items() if line["status"] == "fail"}


@pytest.fixture
def source(lab: Lab) -> Iterator[str]:
    """URL of a server that the nodes reach."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with lab.listen() as listener:
        server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://login:{listener.getsockname()[1]}/archives"
        server.shutdown()
        thread.join()


def test_all_checks_pass_on_two_nodes(lab: Lab, cluster: LabDoor, source: str) -> None:
    settings = (
        "cluster.nodes=2",
        "cluster.tasks_per_node=2",
        f"dataset.source={source}",
        "dataset.make=null",
    )
    lines = doctor(cluster, *settings)
    assert failed(lines) == set(), lines
    for where, check, found in (
        ("login", "commands", lab.slurm("sinfo", "--version").split()[1]),
        ("login", "sacct", "replies"),
        ("login", "arrays", "128 jobs"),
        ("login", "train", "on n[1-2] in partition debug"),
        ("train", "probe", "ran on n1 n2"),
        ("train", "workspace", "visible and writable from n1 n2"),
        ("train", "packages", "can be imported"),
        ("train", "cores", "2 per task (2 requested)"),
        ("train", "memory", "2.1 GB"),
        ("train", "scratch", "/scratch"),
        ("train", "network", "n2 connected to n1 by name"),
        ("train", "sacct", "completed"),
        ("download", "internet", "login replies to n1 (HTTP 200)"),
    ):
        line = lines[where, check]
        assert line["status"] == "ok", line
        assert found in line["found"], line
    assert list((cluster.workspace / "runs/.doctor").iterdir()) == []
    assert cluster.jobs() == []


def test_missing_internet_is_found(cluster: LabDoor) -> None:
    lines = doctor(cluster, "dataset.source=http://10.255.255.1:9/x", "dataset.make=null", code=1)
    assert failed(lines) == {("download", "internet")}
    assert "cluster.stage.download.partition=" in lines["download", "internet"]["fix"]


def test_unknown_partition_is_found_and_nothing_submitted(lab: Lab, cluster: LabDoor) -> None:
    lines = doctor(cluster, "cluster.partition=gpu", code=1)
    assert failed(lines) == {("login", stage) for stage in ("download", "process", "upload", "train")}
    assert "cluster.partition=gpu (partitions: debug, low, high)" in lines["login", "train"]["fix"]
    assert not lab.slurm("squeue", "--noheader")


def test_task_with_one_core_is_found(cluster: LabDoor, tmp_path: Path) -> None:
    (tmp_path / "one-core.sh").write_text(ONE_CORE)
    lines = doctor(cluster, f"cluster.setup=[source {tmp_path}/one-core.sh]", code=1)
    assert failed(lines) == {("train", "cores")}
    assert "a task gets 1 of the 2 requested by cluster.cpus_per_task" in lines["train", "cores"]["found"]


def test_workspace_not_shared_with_the_nodes_is_found(cluster: LabDoor) -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))  # local to each node
    try:
        lines = doctor(cluster, f"workspace={folder}/workspace", code=1)
    finally:
        shutil.rmtree(folder)
    assert failed(lines) == {("train", "workspace"), ("download", "workspace")}
    assert "is not shared with the nodes" in lines["train", "workspace"]["found"]


def test_missing_scratch_and_gpus_are_found(cluster: LabDoor) -> None:
    lines = doctor(cluster, "cluster.scratch=/no/where", "cluster.gpus_per_node=2", code=1)
    assert failed(lines) == {("train", "scratch"), ("train", "GPUs")}
    assert "/no/where on n1: no such folder" in lines["train", "scratch"]["found"]
    assert "Slurm granted 2" in lines["train", "GPUs"]["found"]  # the lab's GPUs are fake, without a driver


def test_rendezvous_port_in_use_is_found(lab: Lab, cluster: LabDoor, tmp_path: Path) -> None:
    """A training on two nodes would hang if another process held its rendezvous port."""
    ready = tmp_path / "ready"
    holder = tmp_path / "holder.py"
    holder.write_text(
        "import os, pathlib, socket, time\n"
        "from hpc_imagenet.cluster.dist_env import _port\n"
        "job = int(os.environ['SLURM_JOB_ID'])\n"
        "kept = [socket.create_server(('', _port(job + n))) for n in range(1, 20)]\n"
        f"pathlib.Path({str(ready)!r}, os.environ['SLURMD_NODENAME']).touch()\n"
        "time.sleep(300)\n"
    )
    ready.mkdir()
    lab.sbatch(f"PYTHONPATH={ROOT} srun {sys.executable} {holder}", "--nodes=4")
    eventually(lambda: len(list(ready.iterdir())) == 4, 60)
    lines = doctor(cluster, "cluster.nodes=2", code=1)
    assert failed(lines) == {("train", "network")}
    assert "Address already in use" in lines["train", "network"]["found"]


def test_full_queue_is_found_and_interrupt_cancels_the_probes(lab: Lab, cluster: LabDoor) -> None:
    lab.sbatch("sleep 600", "--nodes=4", "--exclusive")
    eventually(lambda: "RUNNING" in lab.slurm("squeue", "--noheader", "--format=%T"), 60)
    lines = doctor(cluster, "--timeout=3", code=1)
    assert failed(lines) == {("train", "probe"), ("download", "probe")}
    assert "did not start within" in lines["train", "probe"]["found"]
    assert len(lab.slurm("squeue", "--noheader").splitlines()) == 1

    command = [sys.executable, "-m", "hpc_imagenet", "doctor", "cluster=lab", "dataset=digits"]
    with subprocess.Popen(
        command, env=cluster.env, cwd=cluster.cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        while "probes:" not in (line := process.stdout.readline()):
            assert line, "the doctor ended before the interrupt"
        assert len(lab.slurm("squeue", "--noheader").splitlines()) == 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(lab.slurm("squeue", "--noheader").splitlines()) == 1


def test_inside_an_allocation_the_probe_runs_by_srun(lab: Lab, cluster: LabDoor, tmp_path: Path) -> None:
    command = f"{sys.executable} -m hpc_imagenet doctor cluster=foreground dataset=digits --json"
    options = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        "--mem=4G",
        f"--output={tmp_path}/report",
    )
    report = tmp_path / "report"
    script = f"HPC_IMAGENET_WORKSPACE={cluster.workspace} {command} > {report}; touch {report}.whole"
    lab.sbatch(script, *options)
    eventually(Path(f"{report}.whole").exists, 120)
    lines = {line["check"]: line for line in json.loads(report.read_text())}
    assert "fail" not in {line["status"] for line in lines.values()}
    assert "n2 connected to n1 by name" in lines["network"]["found"]


def test_a_proposed_cluster_file_is_proved_and_becomes_the_default(
    lab: Lab, cluster: LabDoor, tmp_path: Path
) -> None:
    folder = tmp_path / "config" / "hpc_imagenet"
    cluster.env["XDG_CONFIG_HOME"] = str(folder.parent)
    # The lab's nodes claim GPUs, CPUs and memory that this machine does not have.
    real = ["cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.memory_gb=8G"]
    done = cluster("doctor", "--write", "mine", "dataset=digits", *real)
    assert "made it the default cluster" in done.stdout
    assert (folder / "hpc_imagenet.yaml").read_text() == "cluster: mine\n"
    assert "partition: debug # debug (4 nodes with 2 GPUs)" in (folder / "cluster" / "mine.yaml").read_text()
    shown = cluster("+stage=download", "dataset=digits", "wait=true").stdout
    assert shown.startswith("cluster: slurm · ")
    assert [row["state"] for row in cluster.jobs()] == ["finished"]
    assert "exists already" in cluster("doctor", "--write", "mine", code=2).stderr
