"""Containers: the command of each runtime, and what is refused."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_command, write_slurm

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.slurm_jobs.container import (
    PACKAGE_ROOT,
    check_container,
    container_command,
    find_runtime,
)

CLUSTER = Cluster(executor="slurm", container="/images/my image.sif", gpus_per_node=2, scratch="$TMPDIR/x")


def command(runtime: str, **changes: object) -> str:
    cluster = replace(CLUSTER, container_runtime=runtime, **changes)  # type: ignore[arg-type]
    return container_command(cluster, ["/shared/runs"]).python


def test_both_images_have_what_every_job_needs() -> None:
    files = (PACKAGE_ROOT / "container/Dockerfile", PACKAGE_ROOT / "container/hpc_imagenet.def")
    pattern = re.compile(r"^[^#\n]*pip install (.+?)(?: \\)?$", re.MULTILINE)
    first, second = (pattern.findall(file.read_text()) for file in files)
    assert first == second
    assert [command.split()[-1] for command in first if "--require-hashes" in command] == [
        "container/build-requirements.txt",
        "container/requirements.txt",
    ]
    extras = re.findall(r"^IMAGE_EXTRAS = (.+)$", (PACKAGE_ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"notify", "parquet", "search", "session", "timm"} <= set(extras[0].split())


def test_apptainer_binds_folders_and_gpus() -> None:
    text = command("apptainer", container_args=["--cleanenv"])
    assert text.startswith(f"apptainer exec --nv --bind {PACKAGE_ROOT} --bind ")
    assert text.endswith("--bind /shared/runs --bind \"$TMPDIR/x\" --cleanenv '/images/my image.sif' python3")
    assert "--nv" not in command("singularity", gpus_per_node=0)


@pytest.mark.parametrize(
    ("option", "value", "gpus"),
    [
        ("gres", "lscratch:10,gpu:2", True),
        ("gpus-per-node", "a100:2", True),
        ("gpus_per_task", 1, True),
        ("ntasks-per-gpu", 1, True),
        ("gres", "shard:2", True),
        ("gres", "lscratch:10,mps:50", True),
        ("gres", "mig:1g.5gb:1", True),
        ("tres-per-task", "cpu:4,gres/gpu:1", True),
        ("tres_per_task", "gres/shard=2", True),
        ("gres", "lscratch:10", False),
        ("tres-per-task", "cpu:4", False),
        ("gpus", None, False),
        ("mem-per-gpu", "60G", False),
    ],
)
def test_gpus_are_passed_if_an_option_of_sbatch_requests_them(option: str, value: object, gpus: bool) -> None:
    settings = {"gpus_per_node": None, "sbatch": {option: value}}
    assert ("--nv" in command("apptainer", **settings)) == gpus
    assert ("nvidia.com/gpu" in command("podman", **settings)) == gpus


def test_podman_keeps_the_user_and_the_environment() -> None:
    text = command("podman")
    assert "|| echo --userns=keep-id)" in text  # root already has its own id, and Podman refuses the option
    assert text.startswith('env USER="${USER:-$(id -un)}" podman run --rm --cgroups=disabled')
    assert " --env-host " in text
    assert "--volume=/shared/runs:/shared/runs" in text
    assert "--device=nvidia.com/gpu=all" in text


def test_charliecloud_separates_the_command() -> None:
    assert command("charliecloud").endswith("'/images/my image.sif' -- python3")


def test_pyxis_uses_options_of_srun() -> None:
    found = container_command(replace(CLUSTER, container_runtime="pyxis"), ["/shared/runs"])
    assert found.python == "python3"
    assert found.srun_args[0] == "--container-image=/images/my image.sif"
    assert ",/shared/runs:/shared/runs,/tmp:/tmp" in found.srun_args[2]


def test_auto_takes_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no container runtime is found here: set"):
        find_runtime(replace(CLUSTER, container="image"))
    write_command(tmp_path, "srun", "echo '      --container-image=[USER@][REGISTRY#]IMAGE'")
    assert find_runtime(CLUSTER) == "pyxis"
    write_command(tmp_path, "apptainer", "true")
    assert find_runtime(CLUSTER) == "apptainer"
    with pytest.raises(UserError, match=r"cluster.container=/images/my image.sif: no such file or folder"):
        check_container(CLUSTER)


@pytest.mark.slow
def test_the_script_runs_tasks_inside_and_decides_outside(tmp_path: Path) -> None:
    write_slurm(tmp_path)
    write_command(tmp_path, "apptainer", "true")
    image = tmp_path / "image.sif"
    image.touch()
    cli = Cli(tmp_path / "workspace", path=f"{tmp_path}:{os.environ['PATH']}")
    words = ("+stage=pipeline", "dataset=digits", f"dataset.source={tmp_path}", f"cluster.container={image}")
    assert "is for Slurm jobs" in cli.refused(*words, "cluster=local")
    cli(*words, "cluster=slurm")
    text = (tmp_path / "script.4").read_text()
    task, decision = (line for line in text.splitlines() if "python" in line and "export" not in line)
    assert f"apptainer exec --nv --bind {PACKAGE_ROOT}" in task
    assert f"--bind {tmp_path} {image} python3 -u -m hpc_imagenet" in task
    assert "hpc_imagenet.launch.slurm_jobs.requeue" in decision
    assert "apptainer" not in decision
    assert f"export PYTHONPATH={PACKAGE_ROOT}\n" in text


@pytest.mark.slow
def test_in_an_allocation_the_foreground_starts_its_tasks_inside(tmp_path: Path) -> None:
    write_slurm(tmp_path)
    write_command(tmp_path, "srun", f'printf "%s\\n" "$PYTHONPATH" "$@" > {tmp_path}/words; exit 1')
    write_command(tmp_path, "apptainer", "true")
    image = tmp_path / "an image.sif"
    image.touch()
    cli = Cli(tmp_path / "workspace", path=f"{tmp_path}:{os.environ['PATH']}")
    words = ("+stage=download", "dataset=digits", f"cluster.container='{image}'", "cluster=foreground")
    assert "on this machine start the command itself in the container" in cli.refused(*words)
    cli.env["SLURM_JOB_ID"] = "7"
    cli(*words, code=1)
    path, *started = (tmp_path / "words").read_text().splitlines()
    at = started.index("apptainer")
    assert path == str(PACKAGE_ROOT)
    assert {"--nodes=1", "--ntasks=1"} <= set(started[:at])
    assert started[started.index(str(image)) + 1 :][:4] == [
        "python3",
        "-u",
        "-m",
        "hpc_imagenet.launch.tasks.task",
    ]
