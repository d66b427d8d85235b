from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torchvision import models

from hpc_imagenet.config.names.backbones import BACKBONES
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models.blurpool import blur_before_halving
from hpc_imagenet.training.models.build import _infer_shape, build_model
from hpc_imagenet.training.models.ema import ema_copy, update_ema
from hpc_imagenet.training.models.pretrained import classifier_names, freeze_backbone

pytestmark = pytest.mark.slow

# One of each family, small enough for a training step in a test.
SMALL = (
    *("alexnet", "densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_large"),
    *("mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0"),
)
LARGE = (
    *("convnext_tiny", "efficientnet_v2_s", "googlenet", "inception_v3", "resnet50", "swin_t", "swin_v2_t"),
    *("vgg11_bn", "vit_b_16", "vit_h_14", "wide_resnet50_2"),
)


def test_backbone_names_match_torchvision() -> None:
    assert list(BACKBONES) == sorted(models.list_models(module=models))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_backbones_train_on_small_images(name: str) -> None:
    model = build_model(name, 7, size=32)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    # Also with every option that changes the network.
    blur_before_halving(model)
    average = ema_copy(model)
    update_ema(average, model, 0.9)
    freeze_backbone(model)
    model.zero_grad()
    model.eval()(torch.randn(2, 3, 32, 32)).square().mean().backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    (classifier,) = classifier_names(model)
    assert trained == {f"{classifier}.weight", f"{classifier}.bias"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 32) for name in LARGE), ("inception_v3", 299), ("swin_t", 224), ("vit_h_14", 224)],
)
def test_output_shapes_of_large_backbones(name: str, size: int) -> None:
    with torch.device("meta"):
        model = build_model(name, 7, size=size)
    assert _infer_shape(model, size).shape == (2, 7)
    assert model.training
    assert model.get_submodule(classifier_names(model)[0]).weight.shape[0] == 7
    blur_before_halving(model)
    assert _infer_shape(model, size).shape == (2, 7)


def test_maxvit_size_error_names_a_valid_multiple() -> None:
    with pytest.raises(UserError, match=r"recipe.size=32 .* model.name=maxvit_t .*use a multiple of 56"):
        build_model("maxvit_t", 7, size=32)
    with torch.device("meta"):
        assert _infer_shape(build_model("maxvit_t", 7, size=56), 56).shape == (2, 7)


def test_small_stem_of_a_resnet() -> None:
    model = build_model("resnet18", 10, size=32)
    assert isinstance(model.conv1, nn.Conv2d)
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
    assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("mobilenet_v3_small", "features", 4),
        ("efficientnet_b0", "features", 4),
        ("regnet_y_400mf", "trunk_output", 4),
        ("densenet121", "features", 4),
        ("convnext_tiny", "features", 4),
    ],
)
def test_small_stem_removes_a_downsampling_factor_of_four(name: str, layer: str, side: int) -> None:
    sides = []
    model = build_model(name, 10, size=32)
    model.get_submodule(layer).register_forward_hook(lambda m, i, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert sides == [side]


def test_auto_stem_is_small_up_to_64_px() -> None:
    assert build_model("resnet18", 10, size=64).conv1.stride == (1, 1)
    assert build_model("resnet18", 10, size=65).conv1.stride == (2, 2)
    assert build_model("resnet18", 10, size=32, stem="standard").conv1.stride == (2, 2)
    assert build_model("resnet18", 10, size=128, stem="small").conv1.stride == (1, 1)


def test_small_vision_transformer_has_64_patches() -> None:
    model = build_model("vit_b_16", 10, size=32)
    assert model.conv_proj.kernel_size == (4, 4)
    assert model.encoder.pos_embedding.shape == (1, 65, 768)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_seed_decides_the_initial_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model("mobilenet_v3_small", 10, size=32).state_dict()["features.0.0.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("inception_v3", {"size": 16}),
            r"recipe.size=16 does not fit model.name=inception_v3 \(.*: use 24",
        ),
        (("vit_b_16", {"size": 100}), r"recipe.size=100 .*vit_b_16 .*: use a multiple of 16"),
        (("vit_b_32", {"size": 30}), r"recipe.size=30 cannot be split into 8x8 patches: use 32"),
        (("vit_b_32", {"size": 32, "val_size": 40}), r"recipe.val_size=40 .*vit_b_32 .*: use 32"),
        (("resnet18", {"options": {"drop": 1}}), r"model.options=\{'drop': 1\} does not fit resnet18"),
        (
            ("vit_b_16", {"options": {"dropout": 3}}),
            r"^model.options=\{'dropout': 3\} or recipe.size=224 does not fit vit_b_16: dropout prob.* 3$",
        ),
        (("densenet121", {"options": {"drop_rate": 7}}), r"use another model, or other model.options$"),
    ],
)
def test_invalid_size_or_option_is_a_one_line_error(arguments, message: str) -> None:
    name, keywords = arguments
    with pytest.raises(UserError, match=message) as caught, torch.device("meta"):
        build_model(name, 10, **keywords)
    assert "\n" not in str(caught.value)


def test_build_model_does_not_warn() -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        build_model("googlenet", 10)


@pytest.mark.parametrize(("name", "layers"), [("resnet50", 6), ("mobilenet_v3_small", 4), ("vit_b_16", 0)])
def test_blurpool_is_added_to_strided_convolutions(name: str, layers: int) -> None:
    with torch.device("meta"):
        model = build_model(name, 7, size=224)
    before = list(model.state_dict())
    assert blur_before_halving(model) == layers
    assert list(model.state_dict()) == before  # published weights can be loaded
    assert _infer_shape(model, 224).shape == (2, 7)


def test_blurpool_reduces_shift_sensitivity() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 4, 1, stride=2)
    blurred = copy.deepcopy(plain)
    assert blur_before_halving(nn.Sequential(blurred)) == 1
    images = torch.randn(1, 16, 32, 32)
    constant = torch.ones(1, 16, 9, 9)
    torch.testing.assert_close(blurred(constant)[..., 1:-1, 1:-1], plain(constant)[..., 1:-1, 1:-1])

    def change(layer: nn.Module) -> float:
        with torch.no_grad():
            return float((layer(images) - layer(images.roll(1, -1)))[..., 1:-1, 1:-1].abs().mean())

    assert change(blurred) < 0.5 * change(plain)


def test_invalid_start_size_is_an_error() -> None:
    with pytest.raises(UserError, match=r"recipe.start_size=160 .*vit_b_16"), torch.device("meta"):
        build_model("vit_b_16", 7, size=224, start_size=160)
