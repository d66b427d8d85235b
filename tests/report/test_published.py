from __future__ import annotations

import math
from typing import Any

import pytest

from hpc_imagenet.config.names.backbones import BACKBONES
from hpc_imagenet.report.published import published_accuracies, published_for


@pytest.mark.slow
def test_accuracies_are_those_of_torchvision() -> None:
    from torchvision import models

    entries = {
        (name, entry.protocol): entry for name, found in published_accuracies().items() for entry in found
    }
    for name in BACKBONES:
        for weights in models.get_model_weights(name):
            metrics = weights.meta["_metrics"].get("ImageNet-1K", {})
            if "SWAG" in weights.name or math.isnan(metrics.get("acc@1", math.nan)):
                continue
            entry = entries.pop((name, f"torchvision {weights.name}"))
            assert 100 * entry.top1 == pytest.approx(metrics["acc@1"])
            assert 100 * entry.top5 == pytest.approx(metrics["acc@5"])
            assert entry.parameters == weights.meta["num_params"]
            assert entry.val_size == weights.transforms().crop_size[0]
            assert entry.citation == weights.meta["recipe"]
    assert {protocol for _, protocol in entries} == {"ffcv-imagenet"}


def frozen(name: str, epochs: int, val_size: int = 224, **more: Any) -> dict[str, Any]:
    config = {
        "model": {"name": name, "weights": None},
        "recipe": {"epochs": epochs, "val_size": val_size},
        "dataset": {"name": "imagenet", "archives": {}},
    }
    return config | more


@pytest.mark.parametrize(
    ("model", "epochs", "val_size", "percent", "same"),
    [
        ("resnet50", 90, 224, 76.130, True),
        ("resnet50", 600, 224, 80.858, True),
        ("resnet50", 16, 256, 73.8, True),
        ("resnet50", 88, 256, 78.4, True),
        ("resnext50_32x4d", 90, 224, 77.618, True),  # published with 100 epochs
        ("resnet50", 30, 224, 76.130, False),
        ("convnext_tiny", 90, 224, 82.520, False),
        ("densenet121", 90, 224, 74.434, False),  # its epochs are not stated
    ],
)
def test_the_closest_protocol_is_found(
    model: str, epochs: int, val_size: int, percent: float, same: bool
) -> None:
    found = published_for(frozen(model, epochs, val_size))
    assert found is not None
    assert 100 * found[0].top1 == pytest.approx(percent)
    assert found[1] is same


def test_other_images_and_pretrained_weights_have_no_published_accuracy() -> None:
    assert published_for(frozen("resnet50", 90, dataset={"name": "digits", "archives": {}})) is None
    weights = {"name": "resnet50", "weights": "IMAGENET1K_V1"}
    assert published_for(frozen("resnet50", 90, model=weights)) is None
    assert published_for(frozen("regnet_y_128gf", 100)) is None  # published on more images only
    md5 = {"val": {"md5": "29b22e2961454d5413ddabcf34fc5622"}}
    assert published_for(frozen("resnet50", 90, dataset={"name": "mine", "archives": md5})) is not None
