"""The process stage where there is no room: asked first, and mended by more room whatever was taken since."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import ask, refused
from test_process import dataset, downloaded, small

from hpc_imagenet.stages import process

__all__ = ["small"]  # a fixture


def test_bytes_and_inodes_are_asked_for_first(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = downloaded(tmp_path, small, "folders")
    Room = namedtuple("Room", "f_bavail f_frsize f_files f_favail")
    sizes = [member.stat().st_size for member in small.iterdir()]
    room = Room(sum(sizes), 1, 10**6, 10**6)  # too little once each file is rounded up to blocks
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    assert "bytes and" in refused(process, config)
    inodes = 3 * 40 + 12 + 2 * (3 + 3)
    room = Room(10**9, 1, 10**6, inodes - 1)
    told = refused(process, config)
    assert f"{inodes} inodes and {inodes - 1} are free" in told
    assert not list(dataset(config).rglob("*.JPEG"))
    assert not (dataset(config) / "manifest.json").exists()
    room = Room(10**9, 1, 10**6, inodes)
    ask(process, config)
    (dataset(config) / "train").rename(dataset(config) / ".train.partial")
    room = Room(10**9, 1, 10**6, 3)  # of train nothing is left to do but meta.bin
    ask(process, config)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system with the options of `request.param`, and a workspace whose datasets lie there."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"no right to mount a file system with {request.param}")
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "datasets").symlink_to(mount)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize(
    ("disk", "layout", "words", "more"),
    [
        ("size=300k", "folders", "no room for the class folders", "size=10m"),
        ("size=10m,nr_inodes=100", "folders", "144 inodes and", "nr_inodes=400"),
        ("size=120k", "shards", "no room for the shards", "size=10m"),
    ],
    indirect=["disk"],
)
def test_a_disk_that_fills_up(
    tmp_path: Path,
    small: Path,
    disk: Path,
    layout: str,
    words: str,
    more: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = downloaded(tmp_path / "workspace", small, layout)
    config.process.shard_size = 40_000 / 2**30
    assert words in refused(process, config)
    # Free when asked, taken by somebody else meanwhile.
    monkeypatch.setattr("hpc_imagenet.io.disk.require", lambda *_: None)
    assert "No space left" in refused(process, config)
    assert not (dataset(config) / "manifest.json").exists()
    assert not (dataset(config) / "train").exists()
    assert layout == "folders" or not list(dataset(config).rglob(".*.tmp"))
    subprocess.run(["mount", "-o", f"remount,{more}", str(disk)], check=True)
    assert ask(process, config)["images"] == 132
    assert layout == "folders" or len(list(dataset(config).rglob("*.tar"))) > 4
