"""Jobs in a real container, by Charliecloud, on the lab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import LabDoor

from hpc_imagenet.launch.slurm_jobs.container import PACKAGE_ROOT

TOP = ("bin", "lib", "lib64", "usr", "sbin")  # of this machine: the image shares its programs
EMPTY = (
    "dev",
    "etc",
    "home",
    "mnt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "var",
    "opt",
    "srv",
    "scratch",
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image that is a folder; ch-run creates no mount points in it."""
    folder = tmp_path / "image"
    for name in (*TOP, *EMPTY):
        (folder / name).mkdir(parents=True)
    for bound in (PACKAGE_ROOT, Path.home(), Path(sys.prefix).parent, Path(sys.base_prefix)):
        (folder / bound.relative_to("/")).mkdir(parents=True, exist_ok=True)
    for name in ("hosts", "resolv.conf", "passwd", "group"):
        (folder / "etc" / name).touch()
    (folder / "etc" / "inside").touch()
    words = ["ch-run", *(f"--bind=/{name}" for name in TOP), str(folder), "--", "true"]
    tried = subprocess.run(words, env={**os.environ, "USER": "root"}, capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"ch-run cannot start a container here: {tried.stderr.decode().strip()[-200:]}")
    return folder


@pytest.mark.skipif(shutil.which("ch-run") is None, reason="no ch-run: apt install charliecloud")
def test_a_pipeline_runs_in_a_container(cluster: LabDoor, image: Path) -> None:
    prefix, base = Path(sys.prefix).parent, Path(sys.base_prefix)
    folders = {f"/{name}" for name in TOP} | {f"/{path.parts[1]}" for path in (prefix, base)}
    arguments = ",".join(f"'--bind={folder}'" for folder in sorted(folders))
    setup = f"export PATH={Path(sys.executable).parent}:$PATH"
    words = ("dataset=digits", "model=squeezenet1_1", "recipe.epochs=1", f"cluster.container={image}")
    cluster(
        "+stage=pipeline",
        *words,
        "cluster.container_runtime=charliecloud",
        f"cluster.container_args=[{arguments}]",
        # Seen by the container only: /etc is that of the image.
        f"cluster.setup=['{setup}','test ! -e /etc/inside']",
        "wait=true",
    )
    assert set(cluster.states()) == {"finished"}
    scripts = [path.read_text() for path in cluster.workspace.rglob("*_submission.sh")]
    assert len(scripts) == 4
    assert all(f"{image} -- python3 -u -m hpc_imagenet" in text for text in scripts)
