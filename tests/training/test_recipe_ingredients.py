"""Optional recipe settings (EMA, MixUp, progressive resizing, …) in complete trainings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import STEPS, assert_same_training, lines, new_run, results, saved, train
from torch._dynamo.testing import CompileCounter

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.loading.sampler import BatchShare
from hpc_imagenet.training.models.build import build_model
from hpc_imagenet.training.module import Classifier

pytestmark = pytest.mark.slow

OPTIONS: dict[str, dict[str, Any]] = {
    "averaged": {"ema": 0.8, "ema_every": 2, "schedule": "linear", "blurpool": True, "val_flip": True},
    "mixed": {"mixup": 0.2, "cutmix": 1.0, "augment": "trivial", "erase": 0.5},
    "growing": {"start_size": 16, "grow_to": 1, "size": 24, "val_size": 24, "val_resize": 24},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_resume_is_exact_with_optional_recipe_settings(
    name, config, tiny: DatasetReader, tmp_path: Path, reference, signal_at, monkeypatch
) -> None:
    settings = config(**OPTIONS[name])
    if name == "averaged":
        settings.model.name = "shufflenet_v2_x0_5"  # has batch norm and strided convolutions
    alone, run = new_run(tmp_path / "alone"), new_run(tmp_path / "run")
    expected = train(settings, tiny, alone)
    assert lines(alone) != lines(reference[0])
    signal_at(4)
    settings.loader.workers = 3
    with pytest.raises(Preempted):
        train(settings, tiny, run)
    monkeypatch.undo()
    settings.loader.workers = 1
    assert results(train(settings, tiny, run)) == results(expected)
    assert_same_training(alone, run)


def test_compile_supports_every_size_of_progressive_resizing(config, monkeypatch) -> None:
    """Torch stops recompiling after 8 input shapes unless the limit is raised."""
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled(self, backend=counter, **options)
    )
    recipe = config(epochs=12, start_size=8, size=96, grow_to=11).recipe
    assert len(set(recipe.sizes)) == 12

    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    module = Classifier(Network(), 10, recipe, 3, 5, BatchShare(2))
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")  # so that what is set below is removed again
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    with dynamo.patch(recompile_limit=8), inductor.patch(fallback_random=False):  # other tests compile too
        module.compile_networks(3)
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"  # not one per core in every task
        for size in recipe.sizes:
            module.model(torch.zeros(2, 3, size, size))
        with torch.inference_mode():
            module.eval().model(torch.zeros(2, 3, 96, 96))
        assert inductor.fallback_random  # dropout draws the same numbers as without compile
    assert counter.frame_count == 13


@pytest.mark.nightly
def test_resume_is_exact_for_a_compiled_network(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    settings = config(ema=0.8)
    settings.model.compile = True
    alone, run = new_run(tmp_path / "alone"), new_run(tmp_path / "run")
    expected = train(settings, tiny, alone)
    signal_at(4)
    with pytest.raises(Preempted):
        train(settings, tiny, run)
    monkeypatch.undo()
    assert results(train(settings, tiny, run)) == results(expected)
    assert_same_training(alone, run)


def test_ema_weights_are_evaluated(config, tiny: DatasetReader, tmp_path: Path, monkeypatch) -> None:
    biases: dict[int, torch.Tensor] = {}  # after each step
    original = ProgressReporter.on_train_batch_end

    def record_bias(self: ProgressReporter, trainer: Any, module: Any, *args: Any) -> None:
        original(self, trainer, module, *args)
        biases[trainer.global_step] = module.model.classifier[1].bias.detach().clone()

    monkeypatch.setattr(ProgressReporter, "on_train_batch_end", record_bias)
    run = new_run(tmp_path / "run")
    result = train(config(ema=0.75, ema_every=2, warmup_epochs=0.8), tiny, run)
    expected = biases[4]  # a copy until the end of the warmup
    for step in (6, 8, 10):
        expected = 0.75 * expected + 0.25 * biases[step]
    state = saved(run)["state_dict"]
    torch.testing.assert_close(state["ema_model.classifier.1.bias"], expected)
    # A training that starts from these weights evaluates the same.
    settings = config(epochs=1, learning_rate=0)
    settings.model.weights = str(run.folder / "checkpoints" / "last.ckpt")
    assert results(train(settings, tiny, new_run(tmp_path / "next"))) == pytest.approx(results(result))


def test_weights_are_evaluated_before_the_first_ema_update(
    config, tiny: DatasetReader, tmp_path: Path
) -> None:
    plain = train(config(), tiny, new_run(tmp_path / "plain"))
    settings = config(ema=0.99, ema_every=100, warmup_epochs=0.5)
    assert results(train(settings, tiny, new_run(tmp_path / "run"))) == results(plain)


def test_linear_probe_trains_only_the_classifier(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    torch.manual_seed(1)
    source = build_model("shufflenet_v2_x0_5", 7, size=16).state_dict()
    torch.save(source, tmp_path / "w.pth")
    settings = config(freeze=True, learning_rate=0.1)
    settings.model.name, settings.model.weights = "shufflenet_v2_x0_5", str(tmp_path / "w.pth")
    alone, run = new_run(tmp_path / "alone"), new_run(tmp_path / "run")
    train(settings, tiny, alone)
    state = saved(alone)["state_dict"]
    changed = {key for key in source if not torch.equal(state[f"model.{key}"], source[key])}
    assert changed == {"fc.weight", "fc.bias"}  # and no batch norm statistics
    signal_at(3)
    with pytest.raises(Preempted):
        train(settings, tiny, run)
    monkeypatch.undo()
    (tmp_path / "w.pth").unlink()  # the initial weights are not needed to resume
    train(settings, tiny, run)
    assert_same_training(alone, run)


def test_image_sizes_of_progressive_resizing(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    original, sizes = Classifier.normalize, []

    def record_size(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        sizes.append((self.training, *images.shape[1:]))
        return original(self, images)

    monkeypatch.setattr(Classifier, "normalize", record_size)
    settings = config(**OPTIONS["growing"])
    settings.loader.workers = 1  # workers live longer than an epoch
    train(settings, tiny, new_run(tmp_path / "run"))
    training = [side for training, _, side, _ in sizes if training]
    assert training == [16] * STEPS + [24] * STEPS
    assert {side for training, _, side, _ in sizes if not training} == {24}
