"""Limits of submitted jobs on a real Slurm that enforces them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import LAB, Lab, LabDoor

DOWNLOADS = ("-m", "+stage=download", "dataset=digits", "cluster=lab", "+cluster.sbatch.hold=true")
NAMES = "dataset.name=" + ",".join("abcdefghij")


@pytest.fixture(scope="module")
def limited_lab() -> Iterator[Lab]:
    """A lab with the QOS `few`, of which a user may have four jobs, and a second account `other`."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        lab = Lab(folder, "AccountingStorageEnforce=associations,limits,qos")
        user = lab.slurm("id", "-un")
        lab.slurm("sacctmgr", "-i", "add", "qos", "few", "MaxSubmitJobsPerUser=4")
        for account in ("mine", "other"):
            lab.slurm("sacctmgr", "-i", "add", "account", account)
            lab.slurm("sacctmgr", "-i", "add", "user", user, f"account={account}")
            lab.slurm("sacctmgr", "-i", "modify", "user", user, "set", "qos+=few")
        yield lab
    finally:
        subprocess.run([LAB, "--dir", folder, "down"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def limited(limited_lab: Lab, tmp_path: Path) -> Iterator[LabDoor]:
    cli = LabDoor(tmp_path / "workspace", limited_lab)
    yield cli
    cli.close()
    limited_lab.reset()


def queue(lab: Lab) -> list[str]:
    return sorted(lab.slurm("squeue", "--noheader", "--array", "--format=%i").split())


def test_sweep_of_a_qos_with_few_submitted_jobs(limited: LabDoor, limited_lab: Lab) -> None:
    done = limited(*DOWNLOADS, NAMES, "cluster.qos=few", "cluster.account=mine")
    reason = "limit of 4 submitted jobs (QOSMaxSubmitJobPerUserLimit)"
    assert f"6 of 10 runs wait: {reason}" in done.stdout
    first = queue(limited_lab)
    assert [job.partition("_")[2] for job in first] == ["0", "1", "2", "3"]  # one array
    assert [row["reason"] for row in limited.jobs()[4:]] == [f"waiting: {reason}"] * 6
    limited_lab.slurm("scancel", first[0], first[1])
    again = limited("retry", *(row["run"] for row in limited.jobs()[4:])).stdout
    assert (again.count("submitted  "), again.count("waiting  ")) == (2, 4)
    assert len(queue(limited_lab)) == 4
    limited_lab.slurm("scancel", *queue(limited_lab)[:2])
    # The same command again sends more, too: first those that were cancelled.
    again = limited(*DOWNLOADS, NAMES, "cluster.qos=few", "cluster.account=mine").stdout
    assert [again.count(f"\n{word}  ") for word in ("submitted", "already running", "waiting ")] == [2, 2, 6]
    assert len(queue(limited_lab)) == 4
    assert [row["attempt"] for row in limited.jobs()] == [2] * 4 + [1] * 6


def test_refused_account_lists_those_of_the_user(limited: LabDoor) -> None:
    error = limited(*DOWNLOADS, "dataset.name=a", "cluster.account=nowhere", code=2).stderr
    assert "Invalid account or account/partition combination specified; yours are " in error
    assert {"mine", "other"} <= set(error.partition("yours are ")[2].partition(":")[0].split(", "))
    assert error.strip().endswith(": set cluster.account=")


def test_limit_of_the_user_in_an_account(limited: LabDoor, limited_lab: Lab) -> None:
    user = limited_lab.slurm("id", "-un")
    where = ("where", f"name={user}", "account=mine")
    limited_lab.slurm("sacctmgr", "-i", "modify", "user", *where, "set", "MaxSubmitJobs=3")
    try:
        done = limited(*DOWNLOADS, NAMES, "cluster.account=mine")
        assert "7 of 10 runs wait: limit of 3 submitted jobs (AssocMaxSubmitJobLimit)" in done.stdout
        # The same command with another account sends the rest.
        done = limited(*DOWNLOADS, NAMES, "cluster.account=other")
        assert done.stdout.count("already running") == 3
        assert len(queue(limited_lab)) == 10
    finally:
        limited_lab.slurm("sacctmgr", "-i", "modify", "user", *where, "set", "MaxSubmitJobs=-1")
