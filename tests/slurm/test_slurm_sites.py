"""Habits of other sites on a real Slurm: requests of GPUs, whole nodes, names that do not resolve."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from command_line import eventually
from lab import LAB, Lab, LabDoor

SMALL = ("model=squeezenet1_1", "dataset=digits", "recipe.epochs=1", "cluster.cpus_per_task=1")


@pytest.fixture
def store(site: LabDoor) -> str:
    return f"datastore.url={site.workspace}/datastores"


@pytest.mark.parametrize(
    ("option", "visible"),
    [("gpus-per-node", ["0,1", "0,1"]), ("gres", ["0,1", "0,1"]), ("gpus-per-task", ["0", "1"])],
)
def test_each_option_that_requests_gpus_gives_every_task_one(
    cluster: LabDoor, store: str, option: str, visible: list[str]
) -> None:
    out = cluster.cwd / "visible"
    out.mkdir()
    # The job ends before the training, for which the machine has no GPUs.
    setup = f"""cluster.setup=["srun sh -c 'echo $CUDA_VISIBLE_DEVICES > {out}/$SLURM_PROCID'", "exit 3"]"""
    gpus = ("cluster.gpus_per_node=2", "cluster.tasks_per_node=null", f"cluster.gpu_request={option}")
    cluster(*SMALL, store, setup, *gpus)
    cluster.until("failed")
    assert [path.read_text().strip() for path in sorted(out.iterdir())] == visible


def test_whole_nodes_of_a_partition_are_compared_with_the_training(cluster: LabDoor, lab: Lab) -> None:
    words = ("doctor", "cluster=lab", "dataset=digits", "cluster.tasks_per_node=null", "--json")

    def check(*settings: str, partition: str = "high") -> dict[str, str]:
        # Slurm refuses a constraint that no node has, so there is no probe.
        where = (f"cluster.partition={partition}", "cluster.constraint=none")
        lines = json.loads(cluster(*words, *where, *settings, code=1).stdout)
        return next((line for line in lines if line["check"] == "whole nodes"), {})

    assert check() == {}
    lab.scontrol("update", "partition=high", "OverSubscribe=EXCLUSIVE")
    try:
        line = check("cluster.gpus_per_node=1")
        assert line["status"] == "warn"
        assert line["found"] == (
            "partition high gives whole nodes of 2 GPUs and 8 CPUs: a training leaves 1 GPU and 6 CPUs idle"
        )
        assert line["fix"] == "set cluster.gpus_per_node=2 cluster.cpus_per_task=4"
        assert check("cluster.gpus_per_node=2", "cluster.cpus_per_task=4")["status"] == "ok"
    finally:
        lab.scontrol("update", "partition=high", "OverSubscribe=NO")
    line = check("+cluster.sbatch.exclusive=true", partition="debug")
    assert line["found"].startswith("cluster.sbatch.exclusive gives whole nodes")


def test_memory_per_cpu_and_per_gpu_without_memory_per_node(cluster: LabDoor, lab: Lab) -> None:
    words = ("+stage=download", "dataset=digits", "cluster.memory_gb=null", "+cluster.sbatch.hold=true")
    cluster(*words, "+cluster.sbatch.mem-per-cpu=300M", "cluster.stage.download.cpus_per_task=2")
    (row,) = cluster.jobs()
    assert lab.job(row["job_id"])["MinMemoryCPU"] == "300M"
    cluster(*words, "dataset.name=other", "+cluster.sbatch.mem-per-gpu=1G", "cluster.gpus_per_node=1")
    # gres/gpu:1024 in later versions
    assert lab.job(cluster.jobs()[1]["job_id"])["MemPerTres"] == "gres:gpu:1024"


def test_training_on_nodes_whose_names_do_not_resolve(site: LabDoor, tmp_path: Path) -> None:
    """Neither the rendezvous nor gloo may need the names: Slurm passes the first node's address."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        lab = Lab(folder)
        # In place: the nodes have this file as their /etc/hosts. Slurm itself has the addresses.
        (folder / "etc/hosts").write_text("127.0.0.1 localhost\n")
        lab.slurm("srun", "--nodelist=n1", "getent", "hosts", "n2", code=2)
        cli = LabDoor(tmp_path / "workspace", lab)
        cli(*SMALL, f"datastore.url={site.workspace}/datastores", "cluster.nodes=2")
        eventually(lambda: cli.states() == ["finished"] or cli.jobs()[0]["reason"] != "", 240)
        (row,) = cli.jobs()
        assert row["state"] == "finished", row["reason"]
        done = cli("doctor", "cluster=lab", "dataset=digits", "cluster.nodes=2", "--json", code=None)
        network = next(line for line in json.loads(done.stdout) if line["check"] == "network")
        assert network["status"] == "ok"
        assert "n2 connected to n1 by its address 10.77.0.11, since the name does not" in network["found"]
        cli.close()
    finally:
        subprocess.run([LAB, "--dir", folder, "down"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def test_sweep_over_two_cluster_files_is_split_and_trained_once(
    cluster: LabDoor, lab: Lab, store: str
) -> None:
    """Two partitions of one Slurm; each starts two such trainings at a time."""
    folder = cluster.cwd / "conf" / "cluster"
    folder.mkdir(parents=True)
    for name, node in (("left", "n1"), ("right", "n2")):
        lab.scontrol("create", f"PartitionName={name}", f"Nodes={node}", "MaxTime=INFINITE", "State=UP")
        text = f"defaults: [lab, _self_]\npartition: {name}\ncpus_per_task: 4\n"
        (folder / f"{name}.yaml").write_text(text)
    try:
        words = ("-m", *SMALL[:-1], store, "seed=range(4)")
        done = cluster(*words, "cluster=left,right")
        assert (
            "2 with cluster.partition=left, all start now; 2 with cluster.partition=right, all" in done.stdout
        )
        rows = cluster.until(*["finished"] * 4, seconds=400)
        assert sorted(row["nodes"] for row in rows) == ["n1", "n1", "n2", "n2"]
        assert len({name for row in rows for name in row["sweeps"]}) == 1
        assert cluster(*words, "cluster=right,left").stdout.count("already finished") == 4
        assert len(json.loads(cluster("report", "--json").stdout)) == 4
    finally:
        for name in ("left", "right"):
            lab.scontrol("delete", f"PartitionName={name}", code=None)
