"""Networks that begin with a checkpoint: what of it is loaded, and which checkpoints are refused."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_samples import config_of, write_trained

from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models import networks
from hpc_imagenet.training.models.networks import build_network

pytestmark = pytest.mark.slow

NAME = "mobilenet_v3_small"  # its strided convolutions are 3x3 with both stems
HEAD = "classifier.3."
ABC = ("a", "b", "c")


def begun(config: Config, path: Path, ids: Sequence[str] = ABC) -> dict[str, torch.Tensor]:
    """Return the weights of a network for these classes that begins with a file."""
    config = replace(config, model=replace(config.model, weights=str(path)))
    return build_network(config, len(ids), fresh=True, class_ids=ids).state_dict()


def loaded(state: dict[str, torch.Tensor], path: Path) -> dict[str, bool]:
    """Return for each weight whether it is that of the checkpoint."""
    saved = torch.load(path, weights_only=True)["state_dict"]
    return {
        key: value.shape == saved[f"model.{key}"].shape and torch.equal(value, saved[f"model.{key}"])
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("ids", "same"), [(("b", "c", "d"), False), (("c", "b", "a"), False), (("a", "b"), False), (ABC, True)]
)
def test_the_classifier_is_that_of_the_same_classes_in_the_same_order(
    ids: Sequence[str], same: bool, tmp_path: Path, capsys: Any
) -> None:
    config = config_of(NAME)
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)
    equal = loaded(begun(config, path, ids), path)
    assert all(is_equal for key, is_equal in equal.items() if not key.startswith(HEAD))
    assert equal[f"{HEAD}weight"] == same
    assert ("classifier is initialized at random" in capsys.readouterr().out) == (not same)


OWN = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.make(num_classes)
        self.aux = nn.Linear(3, 2)

    def forward(self, images):
        features = images.mean((2, 3))
        return self.classify(features) + self.aux(features).mean()

class First(Network):
    def make(self, num_classes):
        self.fc = nn.Linear(3, num_classes)

    def classify(self, features):
        return self.fc(features)

class Parameter(Network):
    def make(self, num_classes):
        self.head = nn.Parameter(torch.randn(num_classes, 3))

    def classify(self, features):
        return features @ self.head.T

class Padded(Network):
    def make(self, num_classes):
        self.classes, self.fc = num_classes, nn.Linear(3, -(-num_classes // 4) * 4)

    def classify(self, features):
        return self.fc(features)[:, : self.classes]

class PerClass(Network):
    def make(self, num_classes):
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(num_classes))

    def classify(self, features):
        return torch.cat([head(features) for head in self.heads], 1)
"""


@pytest.mark.parametrize(("network", "head"), [("First", {"fc.weight", "fc.bias"}), ("Parameter", {"head"})])
@pytest.mark.parametrize("ids", [("c", "b", "a"), ("a", "b")])
def test_the_classifier_is_what_depends_on_the_number_of_classes(
    ids: Sequence[str], network: str, head: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is in the network, and whatever the types of its layers."""
    monkeypatch.chdir(tmp_path)
    Path("own_heads.py").write_text(OWN)
    config = config_of(f"own_heads:{network}")
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)
    config.recipe.freeze, config.seed, config.model.weights = True, config.seed + 1, str(path)
    built = build_network(config, len(ids), fresh=True, class_ids=ids)
    assert {key for key, is_equal in loaded(built.state_dict(), path).items() if not is_equal} == head
    assert head <= {name for name, weight in built.named_parameters() if weight.requires_grad}


def test_the_classifier_is_what_differs_between_both_numbers_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_heads.py").write_text(OWN)
    config, six = config_of("own_heads:Padded"), tuple("abcdef")
    path = write_trained(tmp_path / "best.ckpt", config, six, six)
    equal = loaded(begun(config, path, ABC), path)  # eight rows, of which three classes have four
    assert not equal["fc.weight"]
    assert equal["aux.weight"]


def test_auxiliary_heads_are_part_of_the_classifier(tmp_path: Path) -> None:
    config = config_of("googlenet")
    config.model.options = {"aux_logits": True}
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)
    config.seed += 1
    equal = loaded(begun(config, path, ("c", "b", "a")), path)
    layers = {"fc", "aux1.fc2", "aux2.fc2"}
    assert {key.rpartition(".")[0] for key in equal if not equal[key]} == layers


def test_a_classifier_with_weights_for_each_class_takes_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_heads.py").write_text(OWN)
    config = config_of("own_heads:PerClass")
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)
    assert all(loaded(begun(config, path), path).values())
    with pytest.raises(UserError, match=r"own_heads:PerClass is unknown: with .* other weights exist"):
        begun(config, path, ("c", "b", "a"))


def test_an_optimizer_of_other_classes_is_not_kept(tmp_path: Path) -> None:
    config = config_of(NAME)
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)
    config.recipe.keep_optimizer = True
    begun(config, path)
    with pytest.raises(UserError, match=r"^recipe.keep_optimizer=true: .* for other classes: set .*=false$"):
        begun(config, path, ("b", "c", "d"))


def test_files_without_classes_are_compared_by_their_number(tmp_path: Path) -> None:
    config = config_of(NAME)
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)
    weights = {f"model.{key}": value for key, value in begun(config, path).items()}
    torch.save({"state_dict": weights}, other := tmp_path / "weights.pth")
    assert all(loaded(begun(config, other, ("b", "c", "d")), path).values())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"blurpool": True}, "its recipe.blurpool is True, "),
        ({"size": 128}, "its model.stem is standard, "),
        (
            {"preprocessing": {"mean": [0.5, 0.5, 0.5]}},
            "its model.preprocessing.mean is [0.5,0.5,0.5], and this training sets none: "
            "add '+model.preprocessing.mean=[0.5,0.5,0.5]'",
        ),
        ({"model": {"options": {"dropout": 0.5}}}, "its model.options is {'dropout': 0.5}, "),
        ({"model": {"name": "mobilenet_v3_large"}}, "its model.name is mobilenet_v3_large, "),
        ({"model": {"source_hash": "c0ffee"}}, f"it was trained with another source of {NAME}: "),
    ],
)
def test_a_checkpoint_of_another_network_with_the_same_shapes_is_refused(
    source: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = dict(source)
    model = source.pop("model", {})
    saved = config_of(NAME, **source)
    saved.model = replace(saved.model, **model)
    path = write_trained(tmp_path / "best.ckpt", saved, ABC, ABC)
    with pytest.raises(UserError, match=f"^{re.escape(f'model.weights={path}: {message}')}"):
        begun(config_of(NAME), path)


def test_transformers_of_timm_have_no_other_stem(tmp_path: Path) -> None:
    """Their weights for one size fit another, also across the size up to which stems are small."""
    name, options = "timm/swinv2_tiny_window8_256", {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 8}
    source, config = config_of(name, 64), config_of(name, 128)
    for each in (source, config):
        each.model.options = {**options, "window_size": 4}
    path = write_trained(tmp_path / "best.ckpt", source, ABC, ABC)
    assert loaded(begun(config, path), path)["head.fc.weight"]
    source, config = config_of("timm/test_resnet", 64), config_of("timm/test_resnet", 128)
    path = write_trained(tmp_path / "resnet.ckpt", source, ABC, ABC)
    with pytest.raises(UserError, match=r"its model.stem is small, and that of this training standard"):
        begun(config, path)


def test_a_checkpoint_that_cannot_be_read_is_not_loaded_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(NAME)
    path = write_trained(tmp_path / "best.ckpt", config, ABC, ABC)

    def failing(error: Exception) -> None:
        def read(path: Path) -> Any:
            raise error

        monkeypatch.setattr(networks, "read_checkpoint", read)

    failing(OSError(errno.ESTALE, "Stale file handle"))
    with pytest.raises(OSError, match="Stale"):
        begun(config, path)
    failing(RuntimeError("PytorchStreamReader failed"))
    assert all(loaded(begun(config, path), path).values())
    config.model.weights_run = "aaaaaaaa-first"
    with pytest.raises(UserError, match=r"^model.weights=aaaaaaaa-first: .*best.ckpt is damaged or missing"):
        begun(config, path)
