"""What becomes of the jobs of a command if sbatch refuses one of them, with a fake Slurm."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import SBATCH, scripts, write_command

from hpc_imagenet.runs.attempt import FAILED
from hpc_imagenet.runs.store import RunStore


@pytest.mark.slow
def test_sbatch_error_is_one_line_and_what_needs_the_job_is_cancelled(cluster: Cli, commands: Path) -> None:
    write_command(
        commands, "sbatch", "echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1"
    )
    done = cluster("+stage=pipeline", "dataset=digits", "cluster=slurm", code=2)
    (line,) = done.stderr.strip().splitlines()
    assert line == "error: sbatch refused download-digits: invalid partition specified: nowhere"
    assert [row.split()[0] for row in done.stdout.splitlines()[1:]] == ["refused"] + 3 * ["cancelled"]
    rows = cluster.jobs()
    assert [row["state"] for row in rows] == ["failed"] + 3 * ["cancelled"]
    assert "invalid partition" in rows[0]["reason"]
    for needed, row in itertools.pairwise(rows):
        assert row["reason"] == f"needs {needed['run']}, which was not submitted: fix that, then retry"


def submit_two(cluster: Cli, commands: Path, error: str) -> subprocess.CompletedProcess[str]:
    """Submit two pipelines, of a and b; sbatch replies to the job process-a with an error."""
    refusal = f"grep -qs -e =process-a$ $1 && {{ echo 'sbatch: error: {error}' >&2; exit 1; }}\n"
    write_command(commands, "sbatch", refusal + SBATCH)
    done = cluster("-m", "+stage=pipeline", "dataset.name=a,b", "cluster=slurm", code=2)
    assert f"error: sbatch refused process-a: {error}" in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    ["Unable to contact slurm controller (connect failure)", "Zero Bytes were transmitted or received"],
)
def test_nothing_more_is_submitted_to_a_controller_that_does_not_answer(
    cluster: Cli, commands: Path, error: str
) -> None:
    done = submit_two(cluster, commands, error)
    assert len(scripts(commands)) == 1  # the array of both downloads
    assert [row.split()[0] for row in done.stdout.splitlines()[1:]].count("submitted") == 2
    others = [run for run in RunStore(cluster.workspace).all() if run.info["stage"] != "download"]
    assert len(others) >= 4
    for run in others:
        assert run.attempt
        assert run.attempt.outcome
        assert (run.attempt.outcome.state, error in run.attempt.outcome.reason) == (FAILED, True)


@pytest.mark.slow
def test_refused_job_keeps_no_other_from_being_submitted_and_printed(cluster: Cli, commands: Path) -> None:
    done = submit_two(cluster, commands, "Requested node configuration is not available")
    labels = {run.id: run.info["label"] for run in RunStore(cluster.workspace).all()}
    actions = {labels[row.split()[1]]: row.split()[0] for row in done.stdout.splitlines()[1:]}
    assert {"refused", "cancelled", "submitted"} == set(actions.values())
    assert actions["process-a"] == "refused"
    assert (actions["upload-a"], actions["upload-b"]) == ("cancelled", "submitted")
