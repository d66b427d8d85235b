from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_imagenet.config.names.backbones import implied_options
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models import pretrained
from hpc_imagenet.training.models.build import build_model

pytestmark = pytest.mark.slow

NAME = "shufflenet_v2_x0_5"
FILE = "shufflenetv2_x0.5-f707e7126e.pth"  # name in torchvision's cache


def network(classes: int, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(NAME, classes, size=224, **options)  # type: ignore[arg-type]


def equal_weights(one: nn.Module, other: nn.Module) -> dict[str, bool]:
    a, b = one.state_dict(), other.state_dict()
    return {key: a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a}


def test_load_all_weights_from_a_file(tmp_path: Path) -> None:
    source, target = network(7), network(7, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert not all(equal_weights(source, target).values())
    assert pretrained.load_weights(target, NAME, str(tmp_path / "w.pth"))
    assert all(equal_weights(source, target).values())


def test_classifier_of_other_classes_is_not_loaded(tmp_path: Path) -> None:
    source, target, fresh = network(7), network(5, seed=1), network(5, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert not pretrained.load_weights(target, NAME, str(tmp_path / "w.pth"))
    equal = equal_weights(source, target)
    assert {key for key, is_equal in equal.items() if not is_equal} == {"fc.weight", "fc.bias"}
    assert torch.equal(target.fc.weight, fresh.fc.weight)


def test_load_ema_weights_from_a_checkpoint(tmp_path: Path) -> None:
    plain, average, target = network(7), network(7, seed=2), network(7, seed=1)
    state = {f"model.{key}": value for key, value in plain.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    pretrained.load_weights(target, NAME, str(tmp_path / "last.ckpt"))
    assert all(equal_weights(plain, target).values())
    state |= {f"ema_model.{key}": value for key, value in average.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    pretrained.load_weights(target, NAME, str(tmp_path / "last.ckpt"))
    assert all(equal_weights(average, target).values())


def test_load_weights_from_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder, target = tmp_path / "hub" / "checkpoints", network(1000, seed=1)
    with pytest.raises(
        UserError, match=rf"^model.weights=IMAGENET1K_V1: not on .*wget -P {folder} https://.*{FILE}$"
    ):
        pretrained.load_weights(target, NAME, "IMAGENET1K_V1")
    folder.mkdir(parents=True)
    source = network(1000)
    torch.save(source.state_dict(), folder / FILE)
    assert pretrained.load_weights(target, NAME, "IMAGENET1K_V1")
    assert all(equal_weights(source, target).values())
    with pytest.raises(UserError, match=rf"IMAGENET1K_V9 is unknown for {NAME}; one of: IMAGENET1K_V1"):
        pretrained.load_weights(target, NAME, "IMAGENET1K_V9")


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121"])
def test_load_weights_of_old_files(name: str, tmp_path: Path) -> None:
    """Old files lack batch counters and use old DenseNet names; MNASNet reads the version of a file."""
    torch.manual_seed(0)
    source, target = build_model(name, 10, size=224), build_model(name, 10, size=224)
    state = source.state_dict()
    for key in list(state):
        value = state.pop(key)
        if not key.endswith("num_batches_tracked"):
            state[re.sub(r"(denselayer\d+\.(?:norm|conv))(?=[12]\.)", r"\1.", key)] = value
    assert any("norm.1." in key for key in state) == (name == "densenet121")
    torch.save(state, tmp_path / "old.pth")
    assert pretrained.load_weights(target, name, str(tmp_path / "old.pth"))
    assert all(equal_weights(source, target).values())
    # And from the checkpoint of a run, which has no version metadata.
    other = build_model(name, 10, size=224)
    checkpoint = {f"model.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": checkpoint}, tmp_path / "last.ckpt")
    assert pretrained.load_weights(other, name, str(tmp_path / "last.ckpt"))
    assert all(equal_weights(source, other).values())


def test_implied_options_for_another_normalisation() -> None:
    assert implied_options("googlenet", "IMAGENET1K_V1") == {"transform_input": True}
    assert implied_options("googlenet", None) == implied_options("resnet18", "IMAGENET1K_V1") == {}
    for name in ("googlenet", "inception_v3"):
        options = implied_options(name, "IMAGENET1K_V1")
        model = build_model(name, 10, size=224 if name == "googlenet" else 299, options=options)
        assert model.transform_input is True


def test_a_file_of_safetensors_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(UserError, match=r"^model.weights=W needs safetensors: pip install .*\[export\]"):
        pretrained.read_weights(tmp_path / "w.safetensors", "model.weights=W")


def test_invalid_weights_are_a_one_line_error(tmp_path: Path) -> None:
    torch.save(network(7, stem="small").state_dict(), tmp_path / "small.pth")
    torch.save({"conv1.0.weight": torch.zeros(3)}, tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    other = build_model("squeezenet1_1", 7, size=224)
    for name, message in (
        ("part.pth", r"conv1.0.weight is 3 in the file and 24x3x3x3 in the network"),
        ("list.pth", r"not a file of weights"),
        ("text.pth", r"not a file of weights"),
        ("none.pth", r"no such file"),
    ):
        with pytest.raises(UserError, match=f"model.weights={tmp_path / name}: .*{message}") as caught:
            pretrained.load_weights(network(7), NAME, str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"missing"):
        pretrained.load_weights(other, "squeezenet1_1", str(tmp_path / "small.pth"))
