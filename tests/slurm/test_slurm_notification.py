"""Messages of a sweep on a real Slurm, to a webhook on the login node."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from command_line import eventually
from lab import Lab, LabDoor
from webhook import TOKEN, Webhook

pytest.importorskip("apprise", reason="apprise is not installed")
TESTS = Path(__file__).resolve().parents[1]


def test_a_sweep_announces_a_failure_and_its_end(lab: Lab, cluster: LabDoor, tmp_path: Path) -> None:
    cluster.env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    secret = tmp_path / "webhook.txt"
    secret.touch(0o600)
    with lab.listen() as listener, Webhook().serve(listener) as webhook:
        secret.write_text(webhook.url)
        sweep = ("dataset.name=digits,broken", "sweep=two", f"notify={secret}")
        source = f"dataset.source={tmp_path}/${{dataset.name}}"
        cluster("-m", "+stage=download", "dataset=digits", "dataset.make=failing:one_of_two", source, *sweep)
        eventually(lambda: sorted(cluster.states()) == ["failed", "finished"], 300)
        eventually(lambda: len(webhook.messages) == 2)
        failed, end = webhook.messages
        assert failed["title"].endswith("-download-broken: failed")
        assert end["title"] == "two: 1 of 2 runs finished"
        assert end["type"] == "failure"
        lines = end["message"].splitlines()
        assert [line.split()[1] for line in lines] == ["failed", "finished"]
    for path in cluster.workspace.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
