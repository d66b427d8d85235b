"""Slurm 20.11 to 26.05: the same jobs in the words and columns of each version, and of other kinds of sites.

The lines are what the functions of src/squeue/print.c of a version print for our options; see the comments.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import scripts, write_command

from hpc_imagenet.cluster import slurm
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, QUEUED, RUNNING


@pytest.fixture
def slurm_path(commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    slurm._reply_cache.clear()
    return commands


def lines(*rows: tuple[str, ...]) -> str:
    """Return squeue's lines for rows of id, state, restarts, reason and exit code (not padded if empty)."""
    widths = [width for _, width in slurm._COLUMNS]
    text = [
        "".join(f"{cell:{w}}" if cell else "" for cell, w in zip(row, widths, strict=True)) for row in rows
    ]
    return "\n".join(text) + "\n"


def test_exit_codes_before_and_since_23_02(slurm_path: Path) -> None:
    """Before 23.02 the status of wait(); since then CODE:SIGNAL, or nothing at all."""
    (slurm_path / "old").write_text(
        lines(("7", "FAILED", "0", "NonZeroExitCode", "768"), ("8", "FAILED", "1", "None", "9"))
    )
    (slurm_path / "new").write_text(
        lines(
            ("7", "FAILED", "0", "NonZeroExitCode", "3:0"),
            ("8", "FAILED", "1", "None", "0:9"),
            ("9", "PENDING", "0", "launch failed requeued held", ""),
        )
    )
    for version in ("old", "new"):
        write_command(slurm_path, "squeue", f"cat $here/{version}")
        found = slurm.query_jobs(["7", "8", "9"])
        assert found["7"] == slurm.JobStatus(FAILED, "Slurm: failed (exit code 3:0)")
        assert found["8"] == slurm.JobStatus(FAILED, "Slurm: failed (exit code 0:9)", 1)
    assert found["9"] == slurm.JobStatus(QUEUED, "launch failed requeued held: scontrol release 9")


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("EXPEDITING", "None", QUEUED),  # since 25.11
        ("RESV_DEL_HOLD", "ReservationDeleted", QUEUED),
        ("REQUEUE_HOLD", "job requeued in held state", QUEUED),
        ("PENDING", "launch failure limit exceeded requeued held", QUEUED),  # since 23.11
        ("PENDING", "user env retrieval failed requeued held", QUEUED),  # since 26.05
        ("SIGNALING", "None", RUNNING),
        ("BOOT_FAIL", "None", FAILED),
    ],
)
def test_states_and_reasons_of_all_versions(slurm_path: Path, state: str, reason: str, expected: str) -> None:
    (slurm_path / "queue").write_text(f"12_3|{state}|0|0|{reason}\n")
    status = slurm.query_jobs(["12_3"])["12_3"]
    assert status.state == expected
    assert ("scontrol release 12_3" in status.reason) == ("held" in reason)


def test_job_of_a_federation_that_another_cluster_runs(slurm_path: Path) -> None:
    """The cluster that it was sent to revokes its own copy."""
    write_command(
        slurm_path,
        "squeue",
        """[[ "$*" == *--federation* ]] && cat $here/siblings || cat $here/local""",
    )
    (slurm_path / "local").write_text(lines(("67109080", "REVOKED", "0", "None", "0:0")))
    (slurm_path / "siblings").write_text(lines(("67109080", "RUNNING", "0", "None", "0:0")))
    assert slurm.query_jobs(["67109080"])["67109080"].state == RUNNING
    (slurm_path / "siblings").write_text(lines(("67109080", "REVOKED", "0", "None", "0:0")))
    assert slurm.query_jobs(["67109080"])["67109080"].state == CANCELLED


def test_parts_of_a_heterogeneous_job(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm_path / "queue").write_text("123+0|RUNNING|0|0|None\n123+1|PENDING|0|0|None\n")
    assert slurm.query_jobs(["123"])["123"].state == RUNNING
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    write_command(slurm_path, "squeue", "echo RUNNING; echo RUNNING")
    assert slurm.own_job_state() == "RUNNING"
    write_command(slurm_path, "squeue", "echo 2026-11-29T10:00:00; echo 2026-11-29T10:00:00")
    assert slurm.end_time() is not None


@pytest.mark.parametrize("text", ["N/A", "Unknown", "NONE", "INVALID", "UNLIMITED", ""])
def test_times_that_are_none(slurm_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    write_command(slurm_path, "squeue", f"echo '{text}'")
    assert slurm.end_time() is None
    assert slurm.expected_start("123") is None


@pytest.mark.slow
def test_cluster_behind_the_same_login_node(cluster: Cli, commands: Path) -> None:
    """SLURM_CLUSTERS reaches all commands; sbatch then names the cluster after the id."""
    words = ("+stage=download", "dataset=digits", "cluster=slurm")
    assert "export SLURM_CLUSTERS=big" in cluster.refused(*words, "+cluster.sbatch.clusters=big")
    text = (commands / "sbatch").read_text()
    (commands / "sbatch").write_text(text.replace("job $((n + 1))", "job $((n + 1)) on cluster big"))
    write_command(commands, "sacct", 'echo "$@" >> $here/sacct-words; echo "1|TIMEOUT|0:0"')
    cluster.env["SLURM_CLUSTERS"] = "big"
    cluster(*words)
    assert (commands / "env").read_text() == "SLURM_CLUSTERS=big\n"
    assert len(scripts(commands)) == 1
    (row,) = cluster.jobs()
    assert (row["job_id"], row["reason"]) == ("1", "Slurm: timeout (exit code 0:0)")
    assert "--clusters=big" in (commands / "sacct-words").read_text()


def test_accounting_that_is_disabled(slurm_path: Path) -> None:
    write_command(slurm_path, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    (slurm_path / "queue").write_text("1|RUNNING|0|0|None\n")
    assert set(slurm.query_jobs(["1", "2"])) == {"1"}
    write_command(
        slurm_path, "sacctmgr", "echo 'You are not running a supported accounting_storage' >&2; exit 1"
    )
    assert slurm.user_associations("account") == []


@pytest.mark.slow
def test_refused_account_and_qos_name_those_of_the_user(cluster: Cli, commands: Path) -> None:
    words = ("+stage=download", "dataset=digits", "cluster=slurm", "cluster.account=x")
    write_command(
        commands, "sacctmgr", '[[ "$*" == *format=account* ]] && echo physics && echo maths || echo a,b'
    )
    for problem, choices in (
        (
            "Invalid account or account/partition combination specified",
            "physics, maths: set cluster.account=",
        ),
        ("Invalid qos specification", "a, b: set cluster.qos="),
    ):
        write_command(
            commands, "sbatch", f"echo 'sbatch: error: Batch job submission failed: {problem}' >&2; exit 1"
        )
        assert f"{problem}; yours are {choices}" in cluster(*words, code=2).stderr
