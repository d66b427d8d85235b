"""doctor --write: a cluster file from Slurm's answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from command_line import Cli
from fake_slurm import write_command

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import cluster_for
from hpc_imagenet.doctor.check_result import FAIL, OK
from hpc_imagenet.doctor.cluster_file import find_partitions, propose, write_cluster_file

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
    ("name", "value", "expected"),
    [
        ("setup", "[module load cuda/12:x]", ["module load cuda/12:x"]),
        ("setup", "['export A=b: c']", ["export A=b: c"]),
        ("sbatch", "{exclusive:true,exclude:[n1,n2]}", {"exclusive": True, "exclude": ["n1", "n2"]}),
        ("sbatch", "{", "{"),  # which the checks refuse
    ],
)
def test_given_lists_and_mappings_stay_such(commands: Path, name: str, value: str, expected: object) -> None:
    text = propose("mine", find_partitions(), [], [], {name: value})
    assert yaml.safe_load(text)[name] == expected


def test_data_stages_prefer_a_partition_that_is_long_enough(commands: Path) -> None:
    nodes = ["debug|2|64|64000|(null)|", "slow|2|16|64000|(null)|", "gpu|8|32|64000|gpu:4|"]
    (commands / "sinfo.txt").write_text("\n".join(nodes))
    (commands / "partitions.txt").write_text("PartitionName=debug Default=YES MaxTime=00:30:00 State=UP\n")
    stages = yaml.safe_load(propose("mine", find_partitions(), [], [], {}))["stage"]
    assert {each["partition"] for each in stages.values()} == {"slow"}
    assert "time" not in stages["download"]


@pytest.mark.parametrize(
    ("given", "time"), [({}, 30), ({"time": "0:20:00"}, None), ({"time": "2-0"}, 30), ({"time": "null"}, 30)]
)
def test_data_stages_stay_within_their_partition(
    commands: Path, given: dict[str, str], time: int | None
) -> None:
    (commands / "sinfo.txt").write_text("debug|2|64|64000|(null)|\ngpu|8|32|64000|gpu:4|\n")
    (commands / "partitions.txt").write_text("PartitionName=debug MaxTime=00:30:00 State=UP\n")
    stages = yaml.safe_load(propose("mine", find_partitions(), [], [], given))["stage"]
    assert stages["download"]["partition"] == "debug"
    assert {each.get("time") for each in stages.values()} == {time}


@pytest.mark.parametrize(
    ("resources", "gpus", "requested"),
    [
        ("gpu:1g.5gb:7", 7, 7),
        ("gpu:3g.20gb:2,gpu:1g.5gb:3", 5, 5),
        ("gpu:a100:4(S:0-1)", 4, "a100:4"),
        ("craynetwork:4,gpu:8(S:0-1)", 8, 8),
    ],
)
def test_gpus_of_a_node_are_counted(commands: Path, resources: str, gpus: int, requested: object) -> None:
    (commands / "sinfo.txt").write_text(f"gpu|2|64|64000|{resources}|\n")
    (found,) = find_partitions()
    assert found.gpus == gpus
    assert yaml.safe_load(propose("mine", [found], [], [], {}))["gpus_per_node"] == requested


@pytest.mark.parametrize("status", [OK, FAIL])
def test_doctor_write_leaves_stdout_to_json(
    commands: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: str,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("sbatch", "srun", "squeue", "scancel", "sacctmgr"):
        write_command(commands, name, "true")

    def checks(settings: list[str], folder: str) -> list[dict[str, str]]:
        print("[]")
        return [{"check": "gpu", "status": status}]

    assert write_cluster_file("mine", [], checks, as_json=True) == (status == FAIL)
    printed = capsys.readouterr()
    assert printed.out == "[]\n"
    assert "wrote " in printed.err


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
