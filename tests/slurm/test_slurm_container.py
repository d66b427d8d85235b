"""Jobs in a real container, by Charliecloud and by Podman, on the lab."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import eventually
from lab import LAB, Lab, LabDoor

from hpc_imagenet.launch.slurm_jobs.container import PACKAGE_ROOT

TOP = ("bin", "lib", "lib64", "usr", "sbin")  # of this machine: the image shares its programs
EMPTY = ("dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "tmp", "var", "opt", "srv", "scratch")
PYTHON = Path(sys.executable).parent
FOLDERS = sorted(
    {f"/{name}" for name in TOP}
    | {f"/{path.parts[1]}" for path in (Path(sys.prefix).parent, Path(sys.base_prefix))}
)

# As root without a service manager. Every node has images of its own, on its own disk.
CONTAINERS = """
[engine]
runtime = "crun"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{storage}/tmp"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
"""
STORAGE = """
[storage]
driver = "vfs"
runroot = "{storage}/run"
graphroot = "{storage}/images"
"""
# crun refuses a machine that has cgroups of both versions; a node has mounts of its own.
ONE_CGROUP = "! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The root folder of an image, in which every folder that is bound exists."""
    folder = tmp_path / "image"
    for name in (*TOP, *EMPTY):
        (folder / name).mkdir(parents=True)
    for bound in (PACKAGE_ROOT, Path.home(), Path(sys.prefix).parent, Path(sys.base_prefix)):
        (folder / bound.relative_to("/")).mkdir(parents=True, exist_ok=True)
    for name in ("hosts", "resolv.conf", "passwd", "group"):
        (folder / "etc" / name).touch()
    (folder / "etc" / "inside").touch()
    return folder


def container_settings(runtime: str, image: str, arguments: list[str]) -> tuple[str, ...]:
    given = ",".join(f"'{word}'" for word in arguments)
    return (
        *("dataset=digits", "model=squeezenet1_1", "recipe.epochs=1", f"cluster.container='{image}'"),
        *(f"cluster.container_runtime={runtime}", f"cluster.container_args=[{given}]"),
    )


def run_pipeline(cluster: LabDoor, settings: tuple[str, ...], started: str, setup: list[str]) -> None:
    """Run a pipeline in a container, and check that each of its four jobs was in one."""
    # The file is in the image alone: /etc of a container is not that of the node.
    lines = ",".join(f"'{line}'" for line in (*setup, "test ! -e /etc/inside"))
    cluster("+stage=pipeline", *settings, f"cluster.setup=[{lines}]", "wait=true")
    assert set(cluster.states()) == {"finished"}
    scripts = [path.read_text() for path in cluster.workspace.rglob("*_submission.sh")]
    assert len(scripts) == 4
    assert all(f"{started} python3 -u -m hpc_imagenet" in text for text in scripts)


def submit_template(
    cluster: LabDoor, name: str, settings: tuple[str, ...], variables: dict[str, str]
) -> None:
    """Submit one of the templates in slurm/ to the first node, as by hand."""
    options = (
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "--mem=1G",
        "--time=10",
        "--nodelist=n1",
        "--output=out",
    )
    subprocess.run(
        ["sbatch", *options, LAB.parents[1] / f"{name}.sbatch", *settings],
        env={**cluster.env, **variables, "PATH": f"{PYTHON}:{cluster.env['PATH']}"},
        cwd=cluster.cwd,
        capture_output=True,
        timeout=60,
        check=True,
    )


@pytest.mark.skipif(shutil.which("ch-run") is None, reason="no ch-run: apt install charliecloud")
def test_a_pipeline_runs_in_charliecloud(cluster: LabDoor, folder: Path) -> None:
    cluster.without_forks()
    words = ["ch-run", *(f"--bind=/{name}" for name in TOP), str(folder), "--", "true"]
    skip_unless(words, {"USER": "root"})
    setup = [f"export PATH={PYTHON}:$PATH"]
    settings = container_settings("charliecloud", str(folder), [f"--bind={each}" for each in FOLDERS])
    run_pipeline(cluster, settings, f"{folder} --", setup)


@pytest.mark.skipif(shutil.which("podman") is None, reason="no podman: apt install podman crun")
@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: the lab gives its nodes no ids for rootless Podman"
)
def test_pipeline_templates_and_sessions_run_in_podman(
    cluster: LabDoor, lab: Lab, folder: Path, tmp_path: Path
) -> None:
    cluster.without_forks()
    here = podman_settings(tmp_path / "here", tmp_path / "storage")
    node = podman_settings(tmp_path / "node", Path("/scratch/podman"))
    archive = tmp_path / "image.tar"
    volumes = [f"--volume={each}:{each}" for each in FOLDERS]
    run = " ".join(
        ["podman", "run", "--rm", "--cgroups=disabled", "--network=host", *volumes, "localhost/lab:1", "true"]
    )
    script = f"tar -C {folder} -c . | podman import - localhost/lab:1 && {ONE_CGROUP} && {run}"
    skip_unless(["unshare", "--mount", "bash", "-o", "pipefail", "-c", script], here)
    save = ["podman", "save", "--format=docker-archive", f"--output={archive}", "localhost/lab:1"]
    subprocess.run(save, env={**os.environ, **here}, check=True, capture_output=True)
    setup = [ONE_CGROUP, *(f"export {name}={value}" for name, value in node.items())]
    arguments = [*volumes, f"--env=PATH={PYTHON}:/usr/bin:/bin"]
    settings = container_settings("podman", f"docker-archive:{archive}", arguments)
    run_pipeline(cluster, settings, f"docker-archive:{archive}", setup)

    lab.login("srun", "--nodelist=n1", "sh", "-c", ONE_CGROUP)
    submit_template(cluster, "train", (*settings, "seed=1", "cluster.gpus_per_node=0"), node)
    eventually(lambda: cluster.states() == ["finished"] * 5, 300)
    session = ("session.datastore=digits", "session.listen=address", "session.time=8")
    submit_template(cluster, "session", (*settings, *session), node)
    eventually(lambda: cluster.states()[5:] == ["running"], 300)
    (row,) = [each for each in cluster.jobs() if each["stage"] == "session"]
    shown = cluster("connect", row["run"]).stdout
    (address,) = re.findall(r" -L \d+:(\S+) ", shown)
    (token,) = re.findall(r"lab\?token=(\S+)", shown)
    words = (
        "--silent",
        "--insecure",
        "--max-time",
        "60",
        "--header",
        "Host: localhost",
        "--header",
        f"Authorization: token {token}",
    )
    status = json.loads(lab.login("curl", *words, f"https://{address}/api/status").stdout)
    assert status["kernels"] == 0
    cluster("pause", row["run"])


def podman_settings(folder: Path, storage: Path) -> dict[str, str]:
    """Write Podman's settings for a folder of images; return the variables that name them."""
    folder.mkdir()
    files = {"CONTAINERS_CONF": CONTAINERS, "CONTAINERS_STORAGE_CONF": STORAGE}
    for name, text in files.items():
        (folder / name).write_text(text.format(storage=storage))
    return {name: str(folder / name) for name in files}


def skip_unless(command: list[str], env: dict[str, str]) -> None:
    """Skip the test if a container cannot start on this machine."""
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no container can start here: {done.stderr.decode().strip()[-200:]}")
