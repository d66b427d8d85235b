"""Training on a datastore alone: the source of its dataset is neither needed nor in the signature."""

from __future__ import annotations

import re

import pytest
from command_line import Cli
from sample_images import encoded

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import from_dict
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow

TRAINED = (
    *("model=squeezenet1_1", "recipe=demo", "recipe.epochs=1", "recipe.global_batch=4"),
    "cluster=foreground",
)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, tuple[str, ...]]:
    """A workspace with the datastore birds@v1, and the settings that it was made with."""
    cli = Cli(tmp_path_factory.mktemp("birds") / "workspace")
    for split, count in (("train", 4), ("val", 2)):
        for wnid in ("n00000001", "n00000002"):
            (cli.cwd / "birds" / split / wnid).mkdir(parents=True)
            for i in range(count):
                (cli.cwd / "birds" / split / wnid / f"{i}.jpg").write_bytes(encoded(size=(20 + i, 16)))
    made = ("dataset=ilsvrc", "dataset.name=birds", f"dataset.source={cli.cwd}/birds")
    for stage in ("download", "process", "upload"):
        cli(f"+stage={stage}", *made, "cluster=foreground")
    return cli, made


def training(cli: Cli, *words: str) -> str:
    """Return the run id of the training that a dry run prints."""
    (run,) = set(re.findall(r"\w{8}-squeezenet1_1", cli(*words, "dry_run=true").stdout))
    return str(run)


@pytest.mark.parametrize(
    "dataset",
    [
        ("datastore.name=birds",),
        ("datastore.name=birds@v1",),
        ("dataset=ilsvrc", "datastore.name=birds"),
        ("dataset=ilsvrc", "dataset.name=birds"),
        ("dataset=images", "datastore.name=birds@v1"),
        ("dataset=ilsvrc", "dataset.name=other", "datastore.name=birds"),
    ],
)
def test_the_run_is_that_of_a_pipeline(birds: tuple[Cli, tuple[str, ...]], dataset: tuple[str, ...]) -> None:
    cli, made = birds
    assert training(cli, *dataset, *TRAINED) == training(cli, "+stage=pipeline", *made, *TRAINED)
    both = cli("-m", *dataset, *TRAINED, "seed=0,1", "dry_run=true").stdout
    assert len(set(re.findall(r"\w{8}-squeezenet1_1", both))) == 2


def test_it_trains_and_a_pipeline_finds_it_finished(birds: tuple[Cli, tuple[str, ...]]) -> None:
    cli, made = birds
    cli("dataset=images", "datastore.name=birds", *TRAINED)
    (run,) = [run for run in RunStore(cli.workspace).all() if run.info["stage"] == "train"]
    assert run.attempt
    assert run.attempt.outcome
    assert run.attempt.outcome.state == "finished"
    assert (run.config().dataset.source, run.info["needs"]) == ("", [])
    assert cli("+stage=pipeline", *made, *TRAINED).stdout.count("already finished") == 4


def test_a_sweep_over_datastores_needs_no_dataset() -> None:
    configs = compose(["dataset=ilsvrc", "datastore.name=a,b@v2", "seed=0,1"], multirun=True)
    assert [config.dataset.name for config in configs] == ["a", "a", "b", "b"]
    for job in make_plan(configs, lambda store: None):
        assert job.needs == ()
        assert from_dict(job.frozen()) == job.config


def test_a_missing_datastore_is_named(cli: Cli) -> None:
    line = cli.refused("dataset=ilsvrc", "dataset.name=birds", *TRAINED)
    assert re.match(r"error: no datastore birds in .*: \+stage=pipeline makes it from the archives", line)


@pytest.mark.parametrize("stage", ["download", "process", "upload", "pipeline"])
def test_stages_that_read_archives_still_need_the_source(cli: Cli, stage: str) -> None:
    words = (f"+stage={stage}", "dataset=ilsvrc", "datastore.name=birds")
    assert "dataset.name is not set: add dataset.name=NAME" in cli.refused(*words)
    assert "dataset.source is not set: add dataset.source=VALUE" in cli.refused(*words, "dataset.name=birds")


def test_without_any_name_both_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"^dataset.name is not set: add .*, or datastore.name=NAME of one"):
        compose(["dataset=ilsvrc"])


def test_an_empty_source_is_an_error_for_every_stage() -> None:
    for stage in ("train", "download"):
        with pytest.raises(UserError, match=r"dataset.source is empty"):
            compose(["dataset=ilsvrc", "dataset.name=x", "dataset.source=", f"+stage={stage}"])
