"""Networks of timm: names, sizes, published weights from the cache, and the preprocessing that timm says."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from outcomes import new_run, train
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from hpc_imagenet.config.names import backbones
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.training.loading.crop import CenterCrop, apply_crop
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.models.preprocessing import MEAN, STD, Preprocessing, preprocessing
from hpc_imagenet.training.models.timm_names import installed_names

pytestmark = pytest.mark.slow

NETWORK = "timm/test_resnet"  # of 0.5 million weights
TAG = "r160_in1k"


def with_model(config: Config, name: str, stem: str = "auto", **model: Any) -> Config:
    return replace(config, model=replace(config.model, name=name, stem=stem, **model))


def test_names_are_those_of_the_pinned_timm() -> None:
    written = backbones.timm_names()
    assert written == installed_names(), "python -m hpc_imagenet.training.models.timm_names writes them"
    constraints = Path(__file__).resolve().parents[3] / "constraints.txt"
    assert f"timm=={written.version}\n" in constraints.read_text()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout"])
@pytest.mark.parametrize("size", [32, 96])
def test_networks_take_the_size_of_the_recipe(name: str, size: int, config) -> None:
    settings = with_model(config(size=size, val_size=size, val_resize=size), f"timm/{name}")
    network = build_network(settings, 7, fresh=True).eval()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_small_stem_keeps_the_resolution_of_small_images(config) -> None:
    def first_layers(stem: str) -> int:
        settings = with_model(config(size=32, val_size=32, val_resize=32), "timm/resnet18", stem)
        network: Any = build_network(settings, 7, fresh=True).eval()
        return int(network.forward_features(torch.zeros(1, 3, 32, 32)).shape[-1])

    assert (first_layers("standard"), first_layers("auto")) == (1, 4)
    with pytest.raises(UserError, match=r"^model.stem=small does not fit timm/test_vit, .*patch_size=PX"):
        build_network(with_model(config(size=32), "timm/test_vit", "small"), 7, fresh=True)


def test_the_seed_decides_the_weights(config) -> None:
    one, same = (build_network(with_model(config(), NETWORK), 7, fresh=True).state_dict() for _ in range(2))
    other = build_network(replace(with_model(config(), NETWORK), seed=4), 7, fresh=True).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv1.0.weight"], other["conv1.0.weight"])


@pytest.mark.parametrize(
    ("name", "fix"), [("crossvit_tiny_240", "use 240"), ("tresnet_m", "set model.stem=")]
)
def test_networks_that_do_not_take_small_images(name: str, fix: str, config) -> None:
    settings = with_model(config(size=64, val_size=64, val_resize=64), f"timm/{name}")
    with pytest.raises(UserError, match=rf"^recipe.size=64 does not fit model.name=timm/{name} .*: {fix}"):
        build_network(settings, 7, fresh=True)


def test_options_reach_the_constructor(config) -> None:
    network = build_network(with_model(config(), NETWORK, options={"drop_rate": 0.3}), 7, fresh=True)
    assert network.drop_rate == 0.3
    with pytest.raises(
        UserError, match=r"^model.options=\{'dorp': 1\} does not fit timm/test_resnet: .*dorp"
    ):
        build_network(with_model(config(), NETWORK, options={"dorp": 1}), 7, fresh=True)


def test_a_size_that_does_not_fit_is_one_line(config) -> None:
    settings = with_model(config(size=96, val_size=128, val_resize=128), "timm/vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"^recipe.val_size=128 does not fit model.name=timm/vit.*: use 96$"):
        build_network(settings, 7, fresh=True)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """An empty cache of the hub, with a network whose weights a test may write there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(9)
    return tmp_path, timm.create_model("test_resnet")


def write_published(cache: Path, network: nn.Module) -> None:
    folder = cache / f"models--timm--test_resnet.{TAG}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(network.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "weights"), [(NETWORK, TAG), (NETWORK, "pretrained"), (f"{NETWORK}.{TAG}", "pretrained")]
)
def test_published_weights_come_from_the_cache(name: str, weights: str, config, published, capsys) -> None:
    cache, source = published
    settings = with_model(config(), name, "standard", weights=weights)
    command = re.escape(f"python -c \"import timm; timm.create_model('test_resnet.{TAG}', pretrained=True)\"")
    with pytest.raises(UserError, match=rf"^model.weights={weights}: not on disk; .*: {command}$"):
        build_network(settings, 1000, fresh=True)
    write_published(cache, source)
    loaded = build_network(settings, 1000, fresh=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())
    assert capsys.readouterr().out == ""
    few: Any = build_network(settings, 7, fresh=True)
    assert few.fc.weight.shape[0] == 7
    assert torch.equal(few.conv1[0].weight, source.state_dict()["conv1.0.weight"])
    assert "classifier is initialized at random" in capsys.readouterr().out
    assert "state_dict" not in few.pretrained_cfg
    random_weights = build_network(settings, 7, fresh=False).state_dict()
    assert not torch.equal(random_weights["conv1.0.weight"], source.state_dict()["conv1.0.weight"])


def test_freezing_leaves_the_classifier_of_timm(config, published) -> None:
    cache, source = published
    write_published(cache, source)
    settings = with_model(config(freeze=True), NETWORK, "standard", weights=TAG)
    network = build_network(settings, 7, fresh=True)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


def test_a_replaced_stem_takes_no_published_weights(config, published) -> None:
    cache, _ = published
    folder = cache / "models--timm--resnet18.a1_in1k"
    write_published(cache, timm.create_model("resnet18"))
    (cache / f"models--timm--test_resnet.{TAG}").rename(folder)
    with pytest.raises(
        UserError, match=r"^model.weights=a1_in1k: model.stem=auto replaces conv1.weight: set"
    ):
        build_network(with_model(config(), "timm/resnet18", weights="a1_in1k"), 1000, fresh=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(suffix: str, config, published, tmp_path: Path) -> None:
    _, source = published
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict()}, path)  # as timm's own trainings write it
    else:
        save_file(source.state_dict(), path)
    for classes in (1000, 7):
        settings = with_model(config(), NETWORK, "standard", weights=str(path))
        loaded = build_network(settings, classes, fresh=True).state_dict()
        equal = {key: torch.equal(loaded[key], value) for key, value in source.state_dict().items()}
        assert {key for key in equal if not equal[key]} == (
            {"fc.weight", "fc.bias"} if classes == 7 else set()
        )


NAMES = ["resnet50.a1_in1k", "vit_base_patch16_clip_224.openai_ft_in1k", "mobilenetv3_small_100", "test_vit"]


SQUASHED, BORDERED = "vit_base_patch16_siglip_224.v2_webli", "volo_d4_448.sail_in1k"


@pytest.mark.parametrize("name", [*NAMES, SQUASHED, BORDERED])
def test_validation_images_are_those_of_timm(name: str, config) -> None:
    """Mean, standard deviation, filter and crop fraction: the tensor equals that of timm's own transform."""
    cfg = resolve_model_data_config(type("Network", (), {"pretrained_cfg": backbone_cfg(name)})())
    size = cfg["input_size"][-1]
    found = preprocessing(with_model(config(val_size=size, val_resize=size), f"timm/{name}"))
    assert (found.mean, found.std, found.interpolation) == (cfg["mean"], cfg["std"], cfg["interpolation"])
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    image = Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)
    expected = create_transform(**cfg, is_training=False)(image)
    crop = CenterCrop(found.size, found.resize, found.interpolation, found.squash)(400, 300, random.Random(0))
    left, upper, right, lower = crop.source
    source = torch.from_numpy(np.array(image)[upper:lower, left:right]).permute(2, 0, 1)[None]
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    apply_crop(source.contiguous(memory_format=torch.channels_last), crop, pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
    difference = 255 * std * ((pixels[0] / 255 - mean) / std - expected)  # grey levels
    assert difference.abs().mean() < 0.6
    assert difference.abs().max() < 8


def backbone_cfg(name: str) -> dict[str, Any]:
    return timm.get_pretrained_cfg(name).to_dict()


def test_training_of_a_timm_network(config, tiny, tmp_path: Path, capsys, signal_at) -> None:
    """Interrupted and resumed, with timm's optimizer, weight average and preprocessing."""
    settings = with_model(config(optimizer="timm/lamb", ema=0.9, ema_every=1), "timm/test_vit")
    straight = train(settings, tiny, new_run(tmp_path / "straight"))
    images = "images: mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5; bicubic; validation: short side to 16 px, "
    assert images in capsys.readouterr().out
    run = new_run(tmp_path / "interrupted")
    signal_at(7)
    with pytest.raises(Preempted):
        train(settings, tiny, run)
    signal_at(-1)
    resumed = train(settings, tiny, run)
    for key in ("top1", "top5", "loss", "parameters"):
        assert resumed[key] == straight[key]


def test_preprocessing_of_torchvision_and_single_values(config) -> None:
    assert preprocessing(config(val_size=16, val_resize=20)) == Preprocessing(MEAN, STD, "bilinear", 20, 16)
    values = {"mean": [0.5, 0.5, 0.5], "crop_pct": 0.8, "crop_mode": "squash"}
    found = preprocessing(with_model(config(val_size=16), "resnet18", preprocessing=values))
    assert found == Preprocessing((0.5, 0.5, 0.5), STD, "bilinear", 20, 16, squash=True)
    assert str(found) == (
        "mean 0.5, 0.5, 0.5; std 0.229, 0.224, 0.225; bilinear; validation: both sides to 20 px, "
        "centre crop of 16 px"
    )
    timm_values = {"interpolation": "bilinear", "crop_pct": 1.0}
    found = preprocessing(with_model(config(val_size=16), "timm/resnet50.a1_in1k", preprocessing=timm_values))
    assert (found.interpolation, found.resize) == ("bilinear", 16)
