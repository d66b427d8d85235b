"""Checkpoints of a run: second names and copies of them."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from hpc_imagenet.runs.checkpoints import link_or_copy


def test_copy_of_a_checkpoint_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "best.ckpt", tmp_path / "initial.ckpt"
    source.write_bytes(bytes(100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            link_or_copy(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [source]
    link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
