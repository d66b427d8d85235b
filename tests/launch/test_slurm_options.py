"""cluster=auto, options of sbatch, and held jobs, with a fake Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import scripts, write_command


def test_cluster_auto_is_slurm_if_slurm_replies(cluster: Cli, commands: Path) -> None:
    done = cluster("+stage=pipeline", "dataset=digits", "cluster.time=60")
    assert "cluster: slurm (Slurm replies)" in done.stdout
    assert len(scripts(commands)) == 4
    # All settings of slurm.yaml are used, not only its executor.
    assert "#SBATCH --gpus-per-node=1\n" in scripts(commands)[3]
    assert "#SBATCH --time=60\n" in scripts(commands)[3]


def test_cluster_auto_is_local_without_sbatch(cli: Cli, tmp_path: Path) -> None:
    cli.env["PATH"] = str(tmp_path)
    for words in (("cluster=auto",), ()):
        done = cli("+stage=download", "dataset=digits", "dry_run=true", *words)
        assert "cluster: local (no sbatch is on the PATH)" in done.stdout


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("echo 'Slurmctld(primary) at head is UP'", "cluster: slurm (Slurm replies)"),
        (
            "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1",
            "cluster: local (sbatch is on the PATH, but Slurm is not configured on this machine)",
        ),
    ],
)
def test_cluster_auto_depends_on_slurms_reply(cluster: Cli, commands: Path, script: str, shown: str) -> None:
    write_command(commands, "scontrol", script)
    assert shown in cluster("+stage=download", "dataset=digits", "dry_run=true").stdout


def test_cluster_auto_is_refused_while_a_configured_slurm_is_down(cluster: Cli, commands: Path) -> None:
    write_command(commands, "scontrol", "echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    error = cluster.refused("+stage=download", "dataset=digits")
    assert "Slurm does not reply (Slurmctld(primary) at head is DOWN)" in error
    assert "cluster=local" in error


def test_a_held_job_names_the_command_that_releases_it(cluster: Cli, commands: Path) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=slurm")
    row = "1|PENDING|0|0|launch failed requeued held"
    (commands / "queue").write_text(row + "\n")
    (job,) = cluster.jobs()
    assert (job["state"], job["reason"]) == ("queued", "launch failed requeued held: scontrol release 1")


def test_sbatch_options_take_lists_flags_and_nothing_that_sbatch_refuses(
    cluster: Cli, commands: Path
) -> None:
    words = ("+stage=download", "dataset=digits", "cluster=slurm", "cluster.gpus_per_node=a100:4")
    error = cluster.refused(*words, "+cluster.sbatch.foo=1")
    assert "cluster.sbatch: unrecognized option '--foo=1'" in error
    assert "is not a value for sbatch" in cluster.refused(*words, "+cluster.sbatch.gres={a: 1}")
    assert not scripts(commands)
    options = (
        "+cluster.sbatch.exclude=[n1,n2]",
        "+cluster.sbatch.exclusive=true",
        "+cluster.sbatch.nice=null",
    )
    cluster("+stage=pipeline", *words[1:], *options)
    text = scripts(commands)[3]
    assert "#SBATCH --exclude=n1,n2\n#SBATCH --exclusive\n" in text
    assert "#SBATCH --gpus-per-node=a100:4\n" in text
    assert "nice" not in text
