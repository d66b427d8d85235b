"""Files that one writer creates, on file systems that repeat a request."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_imagenet.io.atomic_files import read_json, write_json_once


def test_a_link_whose_reply_was_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends the request again, and the server answers that the file exists."""
    real = os.link

    def link_twice(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert write_json_once(tmp_path / "claim.json", 1)
    assert not write_json_once(tmp_path / "claim.json", 2)
    assert read_json(tmp_path / "claim.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]
