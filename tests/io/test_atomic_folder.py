"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_imagenet.io.atomic_files import atomic_folder

DAY = 86_400.0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is replaced
    with atomic_folder(out) as folder:
        (folder / "file").write_bytes(b"x")
        assert names(out) == []
    assert names(tmp_path) == ["out"]
    assert names(out) == ["file"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out") as folder:
        (folder / "missing/file").write_bytes(b"x")
    assert names(tmp_path) == []


def test_folder_of_a_killed_process_is_removed_after_a_day(tmp_path: Path) -> None:
    """Neither what another process may be writing, nor that of another name, nor a file, nor a link."""
    killed, recent, other, linked = (
        tmp_path / name for name in (".a[1].0.tmp", ".a[1].1.tmp", ".a1.0.tmp", "linked")
    )
    for folder in (killed, recent, other, linked):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    file, link = tmp_path / ".a[1].2.tmp", tmp_path / ".a[1].3.tmp"
    file.write_bytes(b"x")
    link.symlink_to(linked)
    two_days_ago = killed.stat().st_mtime - 2 * DAY
    for path in (killed, other, linked, file):
        os.utime(path, (two_days_ago, two_days_ago))
    with atomic_folder(tmp_path / "a[1]"):
        pass
    kept = (recent, other, linked, file, link, tmp_path / "a[1]")
    assert names(tmp_path) == sorted(path.name for path in kept)
    assert names(linked) == ["file"]
