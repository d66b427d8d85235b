from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models import pretrained
from hpc_imagenet.training.models.build import build_model

NAME = "shufflenet_v2_x0_5"
FILE = "shufflenetv2_x0.5-f707e7126e.pth"  # as torchvision's cache calls it


def network(classes: int, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(NAME, classes, size=224, **options)  # type: ignore[arg-type]


def same(one: nn.Module, other: nn.Module) -> dict[str, bool]:
    a, b = one.state_dict(), other.state_dict()
    return {key: a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a}


def test_a_file_gives_all_its_weights(tmp_path: Path) -> None:
    source, target = network(7), network(7, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert not all(same(source, target).values())
    assert pretrained.load_weights(target, NAME, str(tmp_path / "w.pth"))
    assert all(same(source, target).values())


def test_a_classifier_for_other_classes_begins_anew(tmp_path: Path) -> None:
    source, target, fresh = network(7), network(5, seed=1), network(5, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert not pretrained.load_weights(target, NAME, str(tmp_path / "w.pth"))
    told = same(source, target)
    assert {key for key, is_same in told.items() if not is_same} == {"fc.weight", "fc.bias"}
    assert torch.equal(target.fc.weight, fresh.fc.weight)


def test_a_run_gives_its_average_if_it_kept_one(tmp_path: Path) -> None:
    plain, average, target = network(7), network(7, seed=2), network(7, seed=1)
    state = {f"model.{key}": value for key, value in plain.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    pretrained.load_weights(target, NAME, str(tmp_path / "last.ckpt"))
    assert all(same(plain, target).values())
    state |= {f"average.{key}": value for key, value in average.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    pretrained.load_weights(target, NAME, str(tmp_path / "last.ckpt"))
    assert all(same(average, target).values())


def test_what_torchvisions_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert all(same(source, target).values())
    with pytest.raises(UserError, match=rf"IMAGENET1K_V9 is unknown to {NAME}; one of: IMAGENET1K_V1"):
        pretrained.load_weights(target, NAME, "IMAGENET1K_V9")


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121"])
def test_what_was_published_long_ago_still_fits(name: str, tmp_path: Path) -> None:
    """Without counts of batches; DenseNets with other names; MNASNets ask how old a file is."""
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
    assert all(same(source, target).values())
    # And from a run's own checkpoint, which knows nothing of ages.
    other, own = (
        build_model(name, 10, size=224),
        {f"model.{key}": v for key, v in source.state_dict().items()},
    )
    torch.save({"state_dict": own}, tmp_path / "last.ckpt")
    assert pretrained.load_weights(other, name, str(tmp_path / "last.ckpt"))
    assert all(same(source, other).values())


def test_published_weights_that_want_other_pixels_get_them() -> None:
    assert pretrained.constructor_options("googlenet", "IMAGENET1K_V1") == {"transform_input": True}
    assert (
        pretrained.constructor_options("googlenet", None)
        == pretrained.constructor_options("resnet18", "IMAGENET1K_V1")
        == {}
    )
    for name in ("googlenet", "inception_v3"):
        told = pretrained.constructor_options(name, "IMAGENET1K_V1")
        assert (
            build_model(name, 10, size=224 if name == "googlenet" else 299, options=told).transform_input
            is True
        )


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    torch.save(network(7, stem="small").state_dict(), tmp_path / "small.pth")
    torch.save({"conv1.0.weight": torch.zeros(3)}, tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    other = build_model("squeezenet1_1", 7, size=224)
    for name, line in (
        ("part.pth", r"conv1.0.weight is 3 there and 24x3x3x3 in .*"),
        ("list.pth", r"not a file of weights"),
        ("text.pth", r"not a file of weights"),
        ("none.pth", r"no such file"),
    ):
        with pytest.raises(UserError, match=f"model.weights={tmp_path / name}: .*{line}") as caught:
            pretrained.load_weights(network(7), NAME, str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"missing"):
        pretrained.load_weights(other, "squeezenet1_1", str(tmp_path / "small.pth"))
