"""Whether a training has learned: accuracies near chance, and what a result then advises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from outcomes import new_run, train
from tiny_training import tiny_config

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.training.callbacks.learning_check import LearningCheck, is_chance


def counts(*images: int) -> torch.Tensor:
    return torch.tensor([images, [0] * len(images), [0] * len(images)])


@pytest.mark.parametrize(
    ("top1", "images", "expected"),
    [
        (0.10, counts(*[36] * 10), True),
        (0.14, counts(*[36] * 10), True),  # 0.1 + 3 * 0.016
        (0.15, counts(*[36] * 10), False),
        (0.001, counts(*[50] * 1000), True),
        (0.002, counts(*[50] * 1000), False),
        (0.90, counts(90, 10), True),  # the larger class alone
        (0.98, counts(90, 10), True),
        (0.995, counts(90, 10), False),
        (0.0, counts(*[36] * 10), True),
    ],
)
def test_chance_is_the_share_of_the_largest_class(top1: float, images: torch.Tensor, expected: bool) -> None:
    assert is_chance(top1, images) is expected


def result(top1: float, train_loss: float | None, **recipe: Any) -> dict[str, Any]:
    check = LearningCheck(
        tiny_config(**{"epochs": 4, "warmup_epochs": 1, "learning_rate": 0.05, **recipe}).recipe
    )
    metrics = {"val_top1": torch.tensor(top1), "val_loss": torch.tensor(2.3034)}
    metrics |= {} if train_loss is None else {"train_loss": torch.tensor(train_loss)}
    return check.result(metrics, counts(*[36] * 10))


def test_advice_of_a_training_at_chance() -> None:
    advice = "top-1 10.0 % is chance: val loss 2.303 (untrained 2.303), recipe.learning_rate=0.05"
    lower = {"learned": False, "advice": f"{advice}: try recipe.learning_rate=0.005"}
    assert result(0.1, 2.301) == result(0.1, None) == lower
    assert (
        result(0.1, 0.2)["advice"]
        == f"{advice}: the train loss fell, so check that the labels of val belong to its images"
    )
    assert result(0.5, 2.3) == {"learned": True}
    assert result(0.1, 2.3, epochs=1) == {}  # all of it was warm-up


def test_running_training_is_marked_after_warm_up() -> None:
    check = LearningCheck(tiny_config(epochs=16, warmup_epochs=2).recipe)
    module = SimpleNamespace(val_metrics=SimpleNamespace(compute=lambda: {"counts": counts(*[36] * 10)}))

    def after(epoch: int, top1: float | None) -> str:
        metrics = {} if top1 is None else {"val_top1": top1}
        trainer: Any = SimpleNamespace(callback_metrics=metrics, current_epoch=epoch - 1)
        check.on_train_epoch_end(trainer, module)
        return check.summary

    assert after(2, 0.1) == ""
    assert after(3, 0.1) == ""  # in the first quarter
    assert after(4, 0.1) == "at chance"
    assert after(5, None) == "at chance"
    assert after(6, 0.3) == ""


@pytest.mark.slow
def test_dead_network_is_marked_in_progress_and_result(
    tiny: DatasetReader, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At this rate the activations of squeezenet die, and no error says so."""
    run = new_run(tmp_path / "run")
    found = train(tiny_config(learning_rate=0.05, epochs=3, warmup_epochs=0), tiny, run)
    assert found["learned"] is False
    assert "try recipe.learning_rate=0.005" in found["advice"]
    assert ", at chance, " in capsys.readouterr().out
    assert "at chance" in run.progress["note"]
