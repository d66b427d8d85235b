"""doctor --write: a cluster file from Slurm's answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import cluster_for
from hpc_imagenet.doctor.cluster_file import find_partitions, propose

SINFO = """cpu|20|64|256000|(null)|skylake
gpu|8|32+|515000|gpu:a100:4(S:0-1)|a100,ib
gpu|2|48|515000|gpu:a100:4|a100,ib
gpu_short|2|16|128000|gpu:2,tmpdisk:100|
old|4|16|64000|gpu:k80:8|
"""
PARTITIONS = """PartitionName=cpu Default=YES MaxTime=7-00:00:00 State=UP PreemptMode=OFF
PartitionName=gpu Default=NO MaxTime=12:00:00 State=UP PreemptMode=OFF
PartitionName=gpu_short Default=NO MaxTime=UNLIMITED State=UP PreemptMode=REQUEUE
PartitionName=old Default=NO MaxTime=UNLIMITED State=DOWN PreemptMode=OFF
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "sinfo.txt").write_text(SINFO)
    (folder / "partitions.txt").write_text(PARTITIONS)
    write_command(folder, "sinfo", "cat $here/sinfo.txt")
    write_command(folder, "scontrol", '[[ "$*" == *partition* ]] && cat $here/partitions.txt || echo is UP')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_partitions_are_those_that_are_up_with_their_smallest_node(commands: Path) -> None:
    cpu, gpu, short = find_partitions()
    assert (cpu.name, cpu.default, cpu.gpus, cpu.time) == ("cpu", True, 0, 7 * 1440)
    assert (gpu.nodes, gpu.cpus, gpu.gpus, gpu.gpu_types, gpu.time) == (10, 32, 4, ("a100",), 720)
    assert (gpu.features, gpu.preempted) == (("a100", "ib"), False)
    assert (short.gpus, short.gpu_types, short.preempted) == (2, (), True)


@pytest.mark.slow
def test_the_proposal_can_be_used_and_says_where_its_values_come_from(commands: Path, tmp_path: Path) -> None:
    text = propose("mine", find_partitions(), ["physics", "maths"], ["normal", "long"], {})
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(text)
    assert all("#" in line for line in text.splitlines() if not line.startswith("  "))
    assert "others: cpu (20 nodes), gpu_short (2 nodes with 2 GPUs, preemptable)" in text
    assert "account: physics # yours: physics, maths" in text
    (config,) = compose(["cluster=mine"], config_dir=str(tmp_path))
    train, process = cluster_for(config, "train"), cluster_for(config, "process")
    assert (train.partition, train.account, train.gpus_per_node, train.gpu_type) == (
        "gpu",
        "physics",
        4,
        "a100",
    )
    assert (train.cpus_per_task, train.memory_gb, train.time) == (8, 452, 720)
    assert (process.partition, process.gpus_per_node, process.cpus_per_task) == ("cpu", 0, 8)


def test_given_settings_replace_the_proposed_ones(commands: Path) -> None:
    given = {"partition": "gpu_short", "gpus_per_node": "0", "time": "1:00:00", "scratch": "/local"}
    text = propose("mine", find_partitions(), [], [], given)
    for line in ("partition: gpu_short", "gpus_per_node: 0", 'time: "1:00:00"', "scratch: /local"):
        assert f"{line} # as given" in text
    assert "cpus_per_task: 16 #" in text
    assert text.count("{partition: gpu_short,") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--write", "a/b"), "--write a/b: not a file name"),
        (("--write", "mine"), "mine.yaml exists already: change it, remove it, or choose another name"),
        (("--write", "other"), "--write other: not on the PATH: sbatch"),
    ],
)
def test_doctor_write_refuses(cli: Cli, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    cli.env |= {"XDG_CONFIG_HOME": str(tmp_path / "config"), "PATH": str(tmp_path)}
    path = tmp_path / "config" / "hpc_imagenet" / "cluster" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults: [slurm]")
    assert message in cli.refused("doctor", *words)
    assert path.read_text() == "defaults: [slurm]"
