"""Messages of a sweep on a real Slurm: to a webhook on the login node, and the mails of Slurm itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from command_line import eventually
from lab import Lab, LabDoor
from webhook import TOKEN, Webhook

TESTS = Path(__file__).resolve().parents[1]


def test_a_sweep_announces_a_failure_and_its_end(lab: Lab, cluster: LabDoor, tmp_path: Path) -> None:
    pytest.importorskip("apprise", reason="apprise is not installed")
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


def test_slurm_mails_the_end_of_a_sweep_once(cluster: LabDoor, tmp_path: Path) -> None:
    mails = tmp_path / "mails"
    settings = ('+cluster.sbatch.mail-type="END,FAIL,TIME_LIMIT"', f"+cluster.sbatch.mail-user={mails}")
    source = f"dataset.source={tmp_path}/${{dataset.name}}"
    cluster("-m", "+stage=download", "dataset=digits", "dataset.name=one,two", source, *settings)
    cluster.until("finished", "finished", seconds=300)
    eventually(mails.exists)
    eventually(lambda: "Ended" in mails.read_text())
    # A further mail of the array would precede that of a later job.
    cluster("+stage=download", "dataset=digits", "dataset.name=three", source, *settings)
    eventually(lambda: mails.read_text().count("Ended") >= 2, 300)
    array, _ = mails.read_text().splitlines()
    assert "COMPLETED" in array
