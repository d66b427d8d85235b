"""What of a run `pull` brings, with a program in place of ssh, which runs commands on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.config.host import Host
from hpc_imagenet.remote import pull
from hpc_imagenet.runs.checkpoints import INITIAL


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_checkpoint_that_a_run_began_with_is_left_there(
    checkpoints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    there = tmp_path / "there" / "12ab34cd-resnet18"
    for name in ("run.json", INITIAL, "checkpoints/best.ckpt", f"notebooks/{INITIAL}"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("content")
    shell = tmp_path / "ssh"
    shell.write_text('#!/bin/sh\nshift; exec sh -c "$*"\n')
    shell.chmod(0o755)
    listed = json.dumps([{"run": there.name, "folder": str(there)}])
    monkeypatch.setattr(pull, "output_on_host", lambda host, words: (0, listed.encode()))
    monkeypatch.setattr(pull, "open_connection", lambda host: str(shell))
    assert pull.pull_runs(Host("host", "folder", "python3"), [there.name], tmp_path, checkpoints, False) == 0
    here = tmp_path / "runs" / there.name
    assert f"pulled  {there.name}  {here}" in capsys.readouterr().out
    found = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    kept = {"checkpoints/best.ckpt"} if checkpoints else set()
    assert found == {"run.json", f"notebooks/{INITIAL}", *kept}
