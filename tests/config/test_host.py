"""Which host a command line is carried out on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from recorded_runs import create_run

import hpc_imagenet
from hpc_imagenet.config.host import Host, find_host, without_host
from hpc_imagenet.config.input.stored_settings import SENT
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import RunStore

Store = Callable[[str, str], None]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Write a file of the user's settings; the project's folder is empty."""
    user = tmp_path / "config/hpc_imagenet"
    (user / "cluster").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("HPC_IMAGENET_CLUSTER", raising=False)
    return lambda name, text: (user / name).write_text(text) and None


def address(*arguments: str) -> str | None:
    host = find_host(arguments)
    return host.address if host else None


def test_host_of_a_cluster_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_host(["jobs"]) is None
    store(
        "cluster/mine.yaml",
        "defaults: [slurm, _self_]\nhost: me@login.centre.org\nhost_folder: /scratch/me\n",
    )
    store("cluster/other.yaml", "defaults: [mine, _self_]\nhost_python: /opt/python\n")
    assert find_host(["jobs"]) is None
    assert find_host(["cluster=mine"]) == Host("me@login.centre.org", "/scratch/me")
    assert find_host(["cluster=other"]) == Host("me@login.centre.org", "/scratch/me", "/opt/python")
    store("hpc_imagenet.yaml", "cluster: mine")
    assert address("jobs") == "me@login.centre.org"
    assert address("jobs", "cluster=local") is None
    assert address("jobs", "cluster.host=b") == "b"
    assert address("jobs", "cluster.host=null") is None
    monkeypatch.setenv("HPC_IMAGENET_CLUSTER", "local")
    assert address("jobs") is None
    monkeypatch.delenv("HPC_IMAGENET_CLUSTER")
    monkeypatch.setenv(SENT, "/sent")  # as on the host
    assert address("jobs") is None


def test_stored_host_applies_to_cluster_files_that_only_the_host_has(store: Store) -> None:
    store("hpc_imagenet.yaml", "cluster: there_only\ncluster.host: a\n")
    assert address("jobs") == address("cluster=another") == "a"
    store("hpc_imagenet.yaml", "cluster: there_only\n")
    with pytest.raises(UserError, match="cluster=there_only is unknown"):
        address("jobs", "cluster=there_only")
    assert address("jobs") is None
    store("hpc_imagenet.yaml", "cluster: there_only\ncluster.host: a\n")
    assert address("cluster=slurm") is None  # this file, without what is stored for another


def test_a_project_without_the_host_that_the_user_has_stored(store: Store) -> None:
    store("hpc_imagenet.yaml", "cluster.host: a\ncluster.host_folder: /f\n")
    Path("hpc_imagenet.yaml").write_text("cluster.host_folder:\n")
    assert find_host(["jobs"]) == Host("a")
    Path("hpc_imagenet.yaml").write_text("cluster.host: null\n")
    assert find_host(["jobs"]) is None


def test_config_dir(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine/cluster").mkdir(parents=True)
    (tmp_path / "mine/cluster/c.yaml").write_text("host: a")
    for option in ([f"--config-dir={tmp_path}/mine"], ["-cd", f"{tmp_path}/mine"]):
        assert address("jobs", *option, "cluster=c") == "a"
        assert without_host(["logs", *option, "cluster=c", "cluster.host=a", "RUN", "-f"]) == [
            "logs",
            "RUN",
            "-f",
        ]
    with pytest.raises(UserError, match="no such folder"):
        find_host(["--config-dir", "nowhere", "cluster=c"])


@pytest.mark.parametrize("text", ["-oProxyCommand=x", "a:/folder", "a b", "a:22"])
def test_other_addresses_are_refused(store: Store, text: str) -> None:
    with pytest.raises(UserError, match="must be user@host or a name"):
        find_host([f"cluster.host={text}"])


@pytest.mark.slow
def test_retry_of_a_run_of_this_machine_instead_of_the_stored_host(cli: Cli) -> None:
    attempt = create_run(RunStore(cli.workspace), "model=resnet18", "cluster=local").new_attempt()
    attempt.submit("local")
    attempt.end("failed", "no space left")
    assert "cluster=local selects a file" in cli.refused("retry", cli.runs()[0], "cluster=local")
    (cli.cwd / "hpc_imagenet.yaml").write_text("cluster.host: unreachable.invalid\n")
    for word in ("cluster=local", "cluster.host=null"):
        done = cli("retry", "--dry-run", cli.runs()[0], word)
        assert done.stdout.startswith(cli.runs()[0])
        assert word not in done.stdout
    error = cli.refused("retry", "--dry-run", cli.runs()[0], "cluster=slurm")
    assert "cluster=slurm selects a file" in error


def test_pull_needs_a_host(cli: Cli) -> None:
    assert "cluster.host, which is not set: add" in cli.refused("pull", "run")


@pytest.mark.slow
def test_python_submits_on_this_machine_only(store: Store) -> None:
    store("hpc_imagenet.yaml", "cluster: local\ncluster.host: a\n")
    with pytest.raises(UserError, match=r"cluster.host=a is for the command line"):
        hpc_imagenet.submit("dataset=digits +stage=download")
    assert list(Path().iterdir()) == []
