"""cluster=auto, options of sbatch, and held jobs, with a fake Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import scripts, write_command


@pytest.mark.slow
def test_cluster_auto_is_slurm_if_slurm_replies(cluster: Cli, commands: Path) -> None:
    done = cluster("+stage=pipeline", "dataset=digits", "cluster.time=60")
    assert "cluster: slurm (Slurm replies)" in done.stdout
    assert len(scripts(commands)) == 4
    # All settings of slurm.yaml are used, not only its executor.
    assert "#SBATCH --gpus-per-node=1\n" in scripts(commands)[3]
    assert "#SBATCH --time=60\n" in scripts(commands)[3]


@pytest.mark.slow
def test_cluster_auto_is_local_without_sbatch(cli: Cli, tmp_path: Path) -> None:
    cli.env["PATH"] = str(tmp_path)
    for words in (("cluster=auto",), ()):
        done = cli("+stage=download", "dataset=digits", "dry_run=true", *words)
        assert "cluster: local (no sbatch is on the PATH)" in done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_held_job_names_the_command_that_releases_it(cluster: Cli, commands: Path) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=slurm")
    row = "1|PENDING|0|0|launch failed requeued held"
    (commands / "queue").write_text(row + "\n")
    (job,) = cluster.jobs()
    assert (job["state"], job["reason"]) == ("queued", "launch failed requeued held: scontrol release 1")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (("cluster.gpus_per_node=a100:4",), ["--gpus-per-node=a100:4", "--ntasks-per-node=4"]),
        (
            ("cluster.gpus_per_node=a100:4", "cluster.gpu_request=gres", "+cluster.sbatch.gres=tmp:1"),
            ["--gres=gpu:a100:4,tmp:1", "--ntasks-per-node=4"],
        ),
        (
            ("cluster.gpus_per_node=4", "cluster.gpu_request=gpus-per-task"),
            ["--gpus-per-task=1", "--ntasks-per-node=4"],
        ),
    ],
)
def test_gpu_request_keeps_one_task_per_gpu_and_no_gpu_for_data_stages(
    cluster: Cli, commands: Path, settings: tuple[str, ...], lines: list[str]
) -> None:
    cluster("+stage=pipeline", "dataset=digits", "cluster=slurm", *settings)
    download, *_, train = scripts(commands)
    for line in lines:
        assert f"#SBATCH {line}\n" in train
    assert "=gpu" not in download
    assert "--gpu" not in download


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ("+cluster.sbatch.gres=gpu:a100:4",),
            "cluster.sbatch.gres=gpu:a100:4 and cluster.gpus_per_node=1 both say how many GPUs train gets",
        ),
        (("+cluster.sbatch.gpus=8",), "cluster.sbatch.gpus=8 and cluster.gpus_per_node=1 both say"),
        (("+cluster.sbatch.tres-per-task=gres/gpu:2",), "gres/gpu:2 and cluster.gpus_per_node=1 both say"),
        (
            ("+cluster.sbatch.mem-per-cpu=4G", "cluster.memory_gb=16"),
            "cluster.sbatch.mem-per-cpu=4G and cluster.memory_gb=16 both request memory for train",
        ),
        (("+cluster.sbatch.mem_per_gpu=4G", "cluster.memory_gb=0"), "and cluster.memory_gb=0 both request"),
        (("+cluster.sbatch.cpus-per-gpu=8",), "cluster.cpus_per_task=8 both request CPUs for train"),
        (
            ("cluster.gpu_request=gpus-per-task", "cluster.gpus_per_node=2", "cluster.tasks_per_node=4"),
            "cluster.tasks_per_node=4",
        ),
    ],
)
def test_contradicting_requests_are_refused(
    cluster: Cli, commands: Path, settings: tuple[str, ...], problem: str
) -> None:
    """Slurm would accept some: of --gpus-per-node=1 --gres=gpu:4 it grants four GPUs and uses one."""
    words = ("datastore.name=digits", "model=resnet18", "recipe=demo", "cluster=slurm")
    assert problem in cluster.refused(*words, *settings)


@pytest.mark.slow
def test_gpus_by_options_of_sbatch_alone(cluster: Cli, commands: Path) -> None:
    """The number of tasks is then set as well; other stages request none."""
    train = '+cluster.stage.train={gpus_per_node: null, tasks_per_node: 4, sbatch: {gpus: "8"}}'
    cluster("+stage=pipeline", "dataset=digits", "cluster=slurm", "cluster.nodes=2", train)
    text = scripts(commands)[3]
    assert "#SBATCH --gpus=8\n" in text
    assert "#SBATCH --ntasks-per-node=4\n" in text
    assert "--gpus" not in scripts(commands)[0]


@pytest.mark.slow
def test_retry_after_too_little_memory_raises_memory_per_cpu(cluster: Cli, commands: Path) -> None:
    words = ("+stage=download", "dataset=digits", "cluster=slurm", "+cluster.sbatch.mem-per-cpu=3G")
    cluster(*words)
    write_command(commands, "sacct", "echo '1|OUT_OF_MEMORY|0:125'")
    (row,) = cluster.jobs()
    assert "out of memory" in row["reason"]
    assert "cluster.sbatch.mem-per-cpu: 3G → 5G" in cluster("retry", row["run"]).stdout
    assert "#SBATCH --mem-per-cpu=5G\n" in scripts(commands)[1]


@pytest.mark.slow
def test_memory_per_cpu_stays_within_the_nodes(cluster: Cli, commands: Path) -> None:
    write_command(commands, "sinfo", "echo 'all*|infinite|16000|1|'; echo 'all*|infinite|9000|9|'")
    words = ("+stage=download", "dataset=digits", "cluster=slurm", "cluster.stage.download.cpus_per_task=4")
    cluster(*words, "+cluster.sbatch.mem-per-cpu=3000M")
    write_command(commands, "sacct", "echo '1|OUT_OF_MEMORY|0:125'")
    assert "mem-per-cpu: 3000M → 4000M" in cluster("retry", "download-digits", "--dry-run").stdout
