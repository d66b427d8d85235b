"""What a recipe may be made of, in whole trainings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import STEPS, assert_same_training, begin, lines, results, saved, train
from torch._dynamo.testing import CompileCounter

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.loading.sampler import BatchShare
from hpc_imagenet.training.models.build import build_model
from hpc_imagenet.training.module import Classifier

OPTIONS: dict[str, dict[str, Any]] = {
    "averaged": {"ema": 0.8, "ema_every": 2, "schedule": "linear", "blurpool": True, "val_flip": True},
    "mixed": {"mixup": 0.2, "cutmix": 1.0, "augment": "trivial", "erase": 0.5},
    "growing": {"start_size": 16, "grow_to": 1, "size": 24, "val_size": 24, "val_resize": 24},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_going_on_changes_nothing_with_any_ingredient(
    name, config, tiny: DatasetReader, tmp_path: Path, whole, signal_at, monkeypatch
) -> None:
    asked = config(**OPTIONS[name])
    if name == "averaged":
        asked.model.name = "shufflenet_v2_x0_5"  # with batch norm, and convolutions that halve
    alone, run = begin(tmp_path / "alone"), begin(tmp_path / "run")
    expected = train(asked, tiny, alone)
    assert lines(alone) != lines(whole[0])
    signal_at(4)
    asked.loader.workers = 3
    with pytest.raises(Preempted):
        train(asked, tiny, run)
    monkeypatch.undo()
    asked.loader.workers = 1
    assert results(train(asked, tiny, run)) == results(expected)
    assert_same_training(alone, run)


def test_every_size_that_images_grow_to_is_compiled(config, monkeypatch) -> None:
    """Torch gives up behind eight forms of one network, unless it is told how many there will be."""
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **more: compiled(self, backend=counter, **more)
    )
    recipe = config(epochs=12, start_size=8, size=96, grow_to=11).recipe
    assert len(set(recipe.sizes)) == 12

    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    module = Classifier(Network(), 10, recipe, 3, 5, BatchShare(2))
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with dynamo.patch(recompile_limit=8), inductor.patch(fallback_random=False):  # others compile as well
        module.compile_networks(3)
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"  # not one a core in every task
        for size in recipe.sizes:
            module.model(torch.zeros(2, 3, size, size))
        with torch.inference_mode():
            module.eval().model(torch.zeros(2, 3, 96, 96))
        assert inductor.fallback_random  # dropout draws as it does without
    assert counter.frame_count == 13


@pytest.mark.slow
@pytest.mark.nightly
def test_going_on_changes_nothing_for_a_compiled_network(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    asked = config(ema=0.8)
    asked.model.compile = True
    alone, run = begin(tmp_path / "alone"), begin(tmp_path / "run")
    expected = train(asked, tiny, alone)
    signal_at(4)
    with pytest.raises(Preempted):
        train(asked, tiny, run)
    monkeypatch.undo()
    assert results(train(asked, tiny, run)) == results(expected)
    assert_same_training(alone, run)


@pytest.mark.slow
def test_the_averaged_weights_are_judged(config, tiny: DatasetReader, tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    original = ProgressReporter.on_train_batch_end

    def noting(self: ProgressReporter, trainer: Any, module: Any, *rest: Any) -> None:
        original(self, trainer, module, *rest)
        seen.append((trainer.global_step, module.model.classifier[1].bias.detach().clone()))

    monkeypatch.setattr(ProgressReporter, "on_train_batch_end", noting)
    run = begin(tmp_path / "run")
    result = train(config(ema=0.75, ema_every=2, warmup_epochs=0.8), tiny, run)
    right = dict(seen)[4]  # up to there it is a copy
    for step in (6, 8, 10):
        right = 0.75 * right + 0.25 * dict(seen)[step]
    state = saved(run)["state_dict"]
    torch.testing.assert_close(state["average.classifier.1.bias"], right)
    # The same weights alone, as somebody would begin with them.
    asked = config(epochs=1, learning_rate=0)
    asked.model.weights = str(run.folder / "checkpoints" / "last.ckpt")
    assert results(train(asked, tiny, begin(tmp_path / "next"))) == pytest.approx(results(result))


@pytest.mark.slow
def test_before_the_first_update_the_weights_themselves_are_judged(
    config, tiny: DatasetReader, tmp_path: Path
) -> None:
    plain = train(config(), tiny, begin(tmp_path / "plain"))
    asked = config(ema=0.99, ema_every=100, warmup_epochs=0.5)
    assert results(train(asked, tiny, begin(tmp_path / "run"))) == results(plain)


@pytest.mark.slow
def test_a_probe_trains_nothing_but_the_classifier(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    torch.manual_seed(1)
    source = build_model("shufflenet_v2_x0_5", 7, size=16).state_dict()
    torch.save(source, tmp_path / "w.pth")
    asked = config(freeze=True, learning_rate=0.1)
    asked.model.name, asked.model.weights = "shufflenet_v2_x0_5", str(tmp_path / "w.pth")
    alone, run = begin(tmp_path / "alone"), begin(tmp_path / "run")
    train(asked, tiny, alone)
    state = saved(alone)["state_dict"]
    changed = {key for key in source if not torch.equal(state[f"model.{key}"], source[key])}
    assert changed == {"fc.weight", "fc.bias"}  # and no statistics of batch norm
    signal_at(3)
    with pytest.raises(Preempted):
        train(asked, tiny, run)
    monkeypatch.undo()
    (tmp_path / "w.pth").unlink()  # what it began with is not needed any more
    train(asked, tiny, run)
    assert_same_training(alone, run)


@pytest.mark.slow
def test_growing_images_are_that_large(config, tiny: DatasetReader, tmp_path: Path, monkeypatch) -> None:
    original, sizes = Classifier.normalised, []

    def noting(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        sizes.append((self.training, *images.shape[1:]))
        return original(self, images)

    monkeypatch.setattr(Classifier, "normalised", noting)
    asked = config(**OPTIONS["growing"])
    asked.loader.workers = 1  # who outlive an epoch
    train(asked, tiny, begin(tmp_path / "run"))
    training = [side for training, _, side, _ in sizes if training]
    assert training == [16] * STEPS + [24] * STEPS
    assert {side for training, _, side, _ in sizes if not training} == {24}
