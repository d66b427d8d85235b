"""Settings stored in the environment, the project and the user's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.stored_settings import (
    FILE,
    SENT,
    config_folders,
    describe,
    store,
    stored_settings,
    stored_value,
)
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.errors import UserError


class Places:
    """The project's and the user's folder."""

    def __init__(self, project: Path, user: Path) -> None:
        self.project, self.user = project, user

    def store(self, folder: Path, text: str, name: str = FILE) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("HPC_IMAGENET_WORKSPACE", raising=False)
    monkeypatch.delenv("HPC_IMAGENET_CLUSTER", raising=False)
    return Places(project, tmp_path / "config" / "hpc_imagenet")


def composed(*overrides: str) -> Config:
    (config,) = compose(overrides)
    return config


@pytest.mark.slow
def test_precedence_is_command_line_environment_project_user_package(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert composed().workspace == str(places.project / "workspace")
    places.store(places.user, "workspace: /user")
    assert composed().workspace == "/user"
    places.store(places.project, "workspace: /project")
    assert composed().workspace == "/project"
    monkeypatch.setenv("HPC_IMAGENET_WORKSPACE", "/environment")
    assert composed().workspace == "/environment"
    assert composed("workspace=/typed").workspace == "/typed"


@pytest.mark.slow
def test_a_stored_cluster_is_the_default(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.store(places.user, "defaults: [slurm]\npartition: gpu\ntime: 30", "cluster/mine.yaml")
    places.store(places.user, "cluster: mine\ncluster.account: me\nrecipe: fast16\ndatastore: {url: /shared}")
    config = composed()
    cluster = cluster_for(config, "train")
    assert (cluster.executor, cluster.partition, cluster.time, cluster.account) == ("slurm", "gpu", 30, "me")
    assert (config.datastore.url, config.recipe.epochs) == ("/shared", 16)
    # Another file of a group also replaces the values that are stored for it.
    assert composed("cluster=slurm").cluster.account is None
    monkeypatch.setenv("HPC_IMAGENET_CLUSTER", "local")
    assert composed().cluster.executor == "local"


@pytest.mark.slow
def test_stored_values_are_any_of_conf(places: Places) -> None:
    places.store(
        places.project,
        "cluster: local\n"
        "cluster.setup: [module load x, 'a, b']\n"
        "cluster.sbatch: {exclude: [n1, n2], comment: 'it''s'}\n"
        "recipe: {learning_rate: 1.0e-3}\nprocess.resize: 'short:256'\ndownload.limit: null",
    )
    config = composed("process.layout=shards")
    assert config.cluster.setup == ["module load x", "a, b"]
    assert config.cluster.sbatch == {"exclude": "n1,n2", "comment": "it's"}
    assert (config.recipe.learning_rate, config.process.resize) == (0.001, "short:256")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster.time: 24:00:00", "line 1: YAML reads time: 24:00:00 as 86400: put it in quotes"),
        ("- a", "must contain settings"),
        ("a: [", "cannot be read as YAML"),
        ("cluster: 3", "cluster: 3 is not the name of a file"),
        ("recipe.epoch: 3", "recipe.epoch is an unknown setting"),
        ("cluster: mien", "cluster=mien is unknown"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(places: Places, text: str, message: str) -> None:
    places.store(places.project, text)
    with pytest.raises(UserError) as caught:
        composed()
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_conf_of_another_application_is_left_alone(places: Places) -> None:
    places.store(places.project / "conf", "a: 1", "config.yaml")
    places.store(places.project / "conf", "defaults: [local]", "cluster/mine.yaml")
    with pytest.raises(UserError, match="cluster=mine is unknown"):
        composed("cluster=mine")
    (places.project / "conf" / "config.yaml").unlink()
    assert composed("cluster=mine").cluster.executor == "local"


@pytest.mark.slow
def test_commands_find_the_stored_workspace_and_info_shows_where_it_is_stored(
    places: Places, tmp_path: Path
) -> None:
    cli = Cli(tmp_path / "elsewhere")
    cli.cwd = places.project
    cli.env.pop("HPC_IMAGENET_WORKSPACE")
    places.store(places.project, f"workspace: {tmp_path / 'mine'}\ncluster: local")
    cli("+stage=download", "dataset=digits", "wait=true")
    assert [row["state"] for row in cli.jobs()] == ["finished"]
    assert (tmp_path / "mine" / "runs").is_dir()
    shown = cli("--info").stdout
    assert "1. the command line" in shown
    assert f"workspace={tmp_path / 'mine'}   ({FILE})" in shown
    assert "cluster: local" in cli("dry_run=true", "+stage=download", "dataset=digits").stdout.splitlines()[0]
    cli.close()


@pytest.mark.slow
def test_links_to_nothing_and_folders_are_no_config_files(places: Places) -> None:
    places.store(places.user, "time: 30", "cluster/mine.yaml")
    (places.user / "cluster/.#mine.yaml").symlink_to("me@host.123:1")  # unsaved changes in Emacs
    (places.user / "cluster/old.yaml").mkdir()
    assert config_folders() == [places.user]
    assert composed("cluster=local").cluster.executor == "local"


def test_info_says_that_sent_settings_take_the_place_of_those_here(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    places.store(places.project, "seed: 7")
    assert "seed=7" in describe()
    monkeypatch.setenv(SENT, "/sent")
    assert "seed=7" not in describe()
    assert "3 is here what your own machine sent, not ./hpc_imagenet.yaml and ./conf: /sent" in describe()


def test_a_stored_null_is_no_text(places: Places) -> None:
    places.store(places.project, "datastore: {url: null}\nworkspace: 7")
    assert (stored_value("datastore.url"), stored_value("workspace")) == (None, "7")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# no setting yet", "# no setting yet\n"),
        (
            "# mine\nworkspace: /scratch/me\ncluster:\n  # of the project\n  account: proj\n\nseed: 1",
            "# mine\nworkspace: /scratch/me\nseed: 1\ncluster.account: proj\n",
        ),
        ("---\n'cluster': old\ncluster.time: 60 # min\n", "---\ncluster.time: 60 # min\n"),
        ('{"workspace": "/w",\n"cluster": {"sbatch": {}, "setup": ["a"]}\n}', None),
        ("cluster: {\naccount: a\n}\nsetup: [a,\nb]\n", None),
        ("  workspace: /w\n  cluster: old\n", None),
        ("cluster: &name old\nworkspace: *name\n", None),
        ("cluster: old\nworkspace: /w\n...\n", None),
        ("{}\n", ""),
    ],
)
def test_storing_a_cluster_keeps_other_lines_and_what_is_stored_for_the_group(
    places: Places, before: str, after: str | None
) -> None:
    elsewhere = places.project / "dotfiles.yaml"
    places.user.mkdir(parents=True)
    elsewhere.write_text(before)
    (places.user / FILE).symlink_to(elsewhere)
    expected = {item.key: item.value for item in stored_settings()} | {"cluster": "mine"}
    store({"cluster": "mine"})
    assert (places.user / FILE).is_symlink()
    assert {item.key: item.value for item in stored_settings()} == expected
    if after is not None:
        assert elsewhere.read_text() == f"{after}cluster: mine\n"
