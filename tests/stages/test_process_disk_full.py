"""The process stage with too little free space: checked up front, and a full disk while it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_stage import run_stage, stage_error
from test_process import config_with_archives, dataset, small

from hpc_imagenet.stages.work import process

pytestmark = pytest.mark.slow

__all__ = ["small"]  # a fixture


def test_free_bytes_and_inodes_are_checked_first(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    FreeSpace = namedtuple("FreeSpace", "f_bavail f_frsize f_files f_favail")
    sizes = [member.stat().st_size for member in small.iterdir()]
    free = FreeSpace(sum(sizes), 1, 10**6, 10**6)  # too little once each file is rounded up to blocks
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    assert "bytes and" in stage_error(process, config)
    inodes = 3 * 40 + 12 + 2 * (3 + 3)
    free = FreeSpace(10**9, 1, 10**6, inodes - 1)
    error = stage_error(process, config)
    assert f"{inodes} inodes and {inodes - 1} are free" in error
    assert not list(dataset(config).rglob("*.JPEG"))
    assert not (dataset(config) / "manifest.json").exists()
    free = FreeSpace(10**9, 1, 10**6, inodes)
    run_stage(process, config)
    (dataset(config) / "train").rename(dataset(config) / ".train.partial")
    free = FreeSpace(10**9, 1, 10**6, 3)  # only meta.bin of train remains to be written
    run_stage(process, config)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system with the options of `request.param`, and a workspace whose datasets are stored on it."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"no permission to mount a file system with {request.param}")
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "datasets").symlink_to(mount)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize(
    ("disk", "layout", "message", "larger"),
    [
        ("size=300k", "folders", "not enough free space for the class folders", "size=10m"),
        ("size=10m,nr_inodes=100", "folders", "144 inodes and", "nr_inodes=400"),
        ("size=120k", "shards", "not enough free space for the shards", "size=10m"),
    ],
    indirect=["disk"],
)
def test_run_resumes_after_a_full_disk_gets_space(
    tmp_path: Path,
    small: Path,
    disk: Path,
    layout: str,
    message: str,
    larger: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_with_archives(tmp_path / "workspace", small, layout)
    config.process.shard_size = 40_000 / 2**30
    assert message in stage_error(process, config)
    # Free space at the check, then used up by another process.
    monkeypatch.setattr("hpc_imagenet.io.disk.require_free_space", lambda *_: None)
    assert "No space left" in stage_error(process, config)
    assert not (dataset(config) / "manifest.json").exists()
    assert not (dataset(config) / "train").exists()
    assert layout == "folders" or not list(dataset(config).rglob(".*.tmp"))
    subprocess.run(["mount", "-o", f"remount,{larger}", str(disk)], check=True)
    assert run_stage(process, config)["images"] == 132
    assert layout == "folders" or len(list(dataset(config).rglob("*.tar"))) > 4
