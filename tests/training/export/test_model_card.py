"""The model card of an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from trained_samples import NAMES, trained_of, write_trained

from hpc_imagenet.training.export.model_card import model_card
from hpc_imagenet.training.export.plain_network import PlainNetwork
from hpc_imagenet.training.trained import TrainedModel, load_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return trained_of(tmp_path_factory.mktemp("trained"), "squeezenet1_1", val_resize=36, ema=0.9)


@pytest.mark.slow
def test_names_everything_that_a_user_needs(trained: TrainedModel) -> None:
    card = model_card(trained, "state_dict", None)
    for text in (
        "# squeezenet1\\_1 trained on digits",
        "| val, in training | 81.25% | 96.88% |",
        "digits: 6 classes",
        "content c0ffee",
        "short side to 36 px, centre crop of 32 px",
        "mean 0.485, 0.456, 0.406",
        "after 7 steps. These are the averaged (EMA) weights.",
        "hpc_imagenet 1234567.",
        "  learning_rate: 0.01\n",
        "seed: 3",
    ):
        assert text in card, text


@pytest.mark.slow
def test_class_names_are_shown_as_written(trained: TrainedModel) -> None:
    rows = [line for line in model_card(trained, "onnx", None).splitlines() if line.startswith("| ")]
    shown = rows[-len(NAMES) :]
    assert shown[0] == "| 0 | n0 | café |"
    assert shown[1] == "| 1 | n1 | &lt;b&gt;bold&lt;/b&gt; |"
    assert shown[2] == "| 2 | n2 | a\\|b |"
    assert shown[3] == "| 3 | n3 | tab%09here |"
    assert shown[4:] == ["| 4 | n4 | 大きい |", "| 5 | n5 | x = y, z |"]


def test_evaluations_are_listed(trained: TrainedModel) -> None:
    rows = [{"split": "test", "datastore": "birds@v2", "top1": 0.5, "top5": 0.75}]
    assert "| test of birds@v2 | 50.00% | 75.00% |" in model_card(trained, "hf", None, rows)


def test_evaluations_at_another_size_are_distinguished(trained: TrainedModel) -> None:
    result = {"split": "val", "datastore": "birds@v2", "top1": 0.5, "top5": 0.75}
    rows = [{**result, "difference": text} for text in ("", "288 of 320 px", "mirrored")]
    card = model_card(trained, "hf", None, rows)
    for name in ("val of birds@v2", "val of birds@v2, 288 of 320 px", "val of birds@v2, mirrored"):
        assert f"| {name} | 50.00% |" in card
    assert "\nMirrored: logits are the mean over an image and its mirror image.\n" in card
    assert "irrored" not in model_card(trained, "hf", None, rows[:2])


def test_rows_that_are_not_mirrored_are_named(trained: TrainedModel) -> None:
    recipe = replace(trained.config.recipe, val_flip=True)
    flipped = replace(trained, config=replace(trained.config, recipe=recipe))
    row = {"split": "val", "datastore": "d@v1", "top1": 0.5, "top5": 0.75, "difference": "not mirrored"}
    text = "Logits are the mean over an image and its mirror image (`recipe.val_flip`)"
    assert f"{text}.\n" in model_card(flipped, "hf", None)
    card = model_card(flipped, "hf", None, [row])
    assert "| val of d@v1, not mirrored |" in card
    assert f"{text}, but in rows that are not mirrored.\n" in card


@pytest.mark.parametrize("in_timm", [True, False])
def test_the_hub_reads_the_front_matter(trained: TrainedModel, in_timm: bool) -> None:
    changes = () if in_timm else ("model.size = 3",)
    plain = PlainNetwork("timm", (), {}, "", "", changes, {})
    _, front, card = model_card(trained, "hf", plain).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == ("timm" if in_timm else "pytorch")
    assert values["pipeline_tag"] == "image-classification"
    assert values["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8125}]
    assert ("local-dir:" in card) == in_timm
    assert ("differ from those of the network in timm" in card) == (not in_timm)


@pytest.mark.slow
def test_a_checkpoint_within_an_epoch_has_no_accuracy(trained: TrainedModel, tmp_path: Path) -> None:
    import torch

    path = write_trained(tmp_path / "last.ckpt", trained.config)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "metrics": {}}, path)
    card = model_card(load_trained(path), "hf", None)
    assert "Not measured" in card
    assert "model-index" not in card
