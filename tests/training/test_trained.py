"""A trained network is loaded back from a run or a file, and says what validation said."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import new_run, saved, train
from PIL import Image
from tiny_training import CLASSES
from trained_samples import config_of, write_trained

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.checkpoints import fingerprint
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training import trained
from hpc_imagenet.training.trained import TrainedModel, load_trained

pytestmark = pytest.mark.slow


def accuracy(model: TrainedModel, store: DatasetReader) -> float:
    """Return the top-1 on val of images that need no resizing."""
    split, hits = store.open_split("val"), 0
    side = model.preprocessing.size
    mean, std = (
        255 * torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std)
    )
    for data, label in split:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert pixels.shape == (side, side, 3)
        images = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] - mean) / std
        with torch.inference_mode():
            hits += int(model.network(images).argmax()) == label
    return hits / len(split)


@pytest.fixture(scope="module")
def averaged(tiny: DatasetReader, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training whose EMA weights were validated, at the size of the images."""
    from tiny_training import tiny_config

    run = new_run(tmp_path_factory.mktemp("averaged") / "run")
    train(tiny_config(ema=0.5, val_size=32, val_resize=32), tiny, run)
    return run


@pytest.mark.parametrize("checkpoint", [None, "last", "best.ckpt"])
def test_a_loaded_network_scores_what_validation_scored(checkpoint, averaged: Run, tiny) -> None:
    model = load_trained(averaged, checkpoint)
    assert model.path.name == ("last.ckpt" if checkpoint == "last" else "best.ckpt")
    assert not model.network.training
    assert [each.names for each in model.classes] == [(str(digit),) for digit in range(CLASSES)]
    assert model.config.recipe.ema == 0.5
    assert accuracy(model, tiny) == pytest.approx(model.metrics["top1"])
    own, average = (
        {name.removeprefix(prefix): value for name, value in saved(averaged)["state_dict"].items()}
        for prefix in ("model.", "ema_model.")
    )
    loaded = model.network.state_dict()
    if checkpoint == "last":
        assert all(torch.equal(loaded[name], average[name]) for name in loaded)
        assert not all(torch.equal(loaded[name], own[name]) for name in loaded)


def test_a_file_alone_is_enough(averaged: Run, tmp_path: Path) -> None:
    copy = tmp_path / "mine.ckpt"
    shutil.copy(averaged.folder / "checkpoints" / "best.ckpt", copy)
    state = torch.get_rng_state()
    model, original = load_trained(copy), load_trained(averaged.folder)
    assert torch.equal(state, torch.get_rng_state())
    assert (model.classes, model.config, model.step) == (original.classes, original.config, original.step)
    assert model.network.state_dict().keys() == original.network.state_dict().keys()


def test_a_checkpoint_that_is_replaced_meanwhile_is_loaded_as_it_was(
    averaged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, newer = tmp_path / "best.ckpt", tmp_path / "newer.ckpt"
    shutil.copy(averaged.folder / "checkpoints" / "previous.ckpt", path)
    shutil.copy(averaged.folder / "checkpoints" / "last.ckpt", newer)
    expected, before = load_trained(path), fingerprint(path)
    build = trained.build_network

    def replace_then_build(*arguments: Any, **more: Any) -> Any:
        newer.replace(path)
        return build(*arguments, **more)

    monkeypatch.setattr(trained, "build_network", replace_then_build)
    model = load_trained(path)
    assert fingerprint(path) != before
    assert (model.step, model.metrics, model.fingerprint) == (expected.step, expected.metrics, before)
    weights = expected.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.network.state_dict().items())


def test_wrong_sources_are_refused_in_one_line(averaged: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint epoch-9; it has best, last, previous"):
        load_trained(averaged, "epoch-9")
    with pytest.raises(UserError, match="nothing: no such file or run"):
        load_trained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no checkpoint"):
        load_trained(Run(tmp_path / "empty"))
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((averaged.folder / "checkpoints" / "best.ckpt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged.ckpt is not a checkpoint of a training, or damaged \("):
        load_trained(damaged)


def test_loading_imports_no_lightning() -> None:
    code = "import sys, hpc_imagenet.training.trained; print([m for m in sys.modules if 'lightning' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_source_in_a_checkpoint_that_others_can_write_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "import torch\ndef make(num_classes):\n    layers = torch.nn\n"
    text += "    return layers.Sequential(layers.AdaptiveAvgPool2d(1), layers.Flatten(), "
    Path("shared_net.py").write_text(text + "layers.Linear(3, num_classes))\n")
    path = write_trained(tmp_path / "net.ckpt", config_of("shared_net:make"))
    assert load_trained(path).classes
    path.chmod(0o666)
    with pytest.raises(
        UserError, match=r"net.ckpt holds the source of shared_net:make, which would run as you"
    ):
        load_trained(path)
