"""Suggestions for unknown settings: by meaning, by part of a name, by letters."""

from __future__ import annotations

import pytest

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input import suggestions
from hpc_imagenet.config.input.explain import did_you_mean_setting
from hpc_imagenet.config.input.overrides import is_value
from hpc_imagenet.errors import UserError

MEANT = {
    "lr": "recipe.learning_rate",
    "learning_rate": "recipe.learning_rate",
    "batch_size": "recipe.global_batch",
    "bs": "recipe.global_batch",
    "wd": "recipe.weight_decay",
    "gpus": "cluster.gpus_per_node",
    "devices": "cluster.gpus_per_node",
    "epochs": "recipe.epochs",
    "max_epochs": "recipe.epochs",
    "workers": "loader.workers",
    "num_workers": "loader.workers",
    "pretrained": "model.weights",
    "arch": "model",
    "img_size": "recipe.size",
    "nodes": "cluster.nodes",
    "partition": "cluster.partition",
    "optimizer": "recipe.optimizer",
    "dropout": "+model.options.dropout",
    "data_dir": "dataset.source",
    "output_dir": "workspace",
    "val_split": "dataset.val_fraction",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANT)
def test_the_setting_that_was_meant_comes_first(name: str) -> None:
    for prefix in ("", "recipe.", "trainer.", "model."):
        if not is_value(f"{prefix}{name}"):
            suggested = did_you_mean_setting(f"{prefix}{name}")
            assert suggested.split(", ")[0] == f"; did you mean: {MEANT[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("word", ["lr=0.1", "+lr=0.1", "recipe.lr=0.1", "+recipe.lr=0.1", "optim.lr=0.1"])
def test_an_unknown_setting_is_one_line_with_the_setting_that_was_meant(word: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([word])
    key = word.lstrip("+").partition("=")[0]
    assert str(caught.value) == f"{key} is an unknown setting; did you mean: recipe.learning_rate"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("recipe.epoch", "recipe.epochs"),
        ("optimizer.name", "recipe.optimizer"),
        ("learnign_rate", "recipe.learning_rate"),
        ("modle", "model"),
        ("process.worker", "loader.workers"),
        ("ré.lr", "recipe.learning_rate"),
    ],
)
def test_misspelt_names_suggest_similar_ones(key: str, suggested: str) -> None:
    with pytest.raises(UserError, match="unknown setting") as caught:
        compose([f"{key}=1"])
    assert suggested in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "instead"),
    [("num_classes", "the dataset decides it"), ("train.resume", "retry RUN resumes a run")],
)
def test_what_is_no_setting_has_how_it_is_done(key: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"^{key} is an unknown setting; .*{instead}$"):
        compose([f"{key}=1"])


def test_every_suggested_setting_exists_and_no_name_is_one_already() -> None:
    groups = ("model", "cluster")
    for setting, names in suggestions._MEANINGS.items():
        assert setting in groups or is_value(setting), setting
        assert names == " ".join(sorted(set(names.split()))), f"{setting}: sort {names}"
