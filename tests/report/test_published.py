from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.names.backbones import BACKBONES
from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.report.leaderboard_details import read_details
from hpc_imagenet.report.published import published_accuracies, published_for
from hpc_imagenet.runs.attempt import FINISHED, PRUNED
from hpc_imagenet.runs.job import content_hash
from hpc_imagenet.runs.store import RunStore


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
        "datastore": {"name": "imagenet@v2"},
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
    mine = {"dataset": {"name": "mine", "archives": md5}, "datastore": {"name": "mine"}}
    assert published_for(frozen("resnet50", 90, **mine)) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "is_imagenet"),
    [
        (("datastore.name=small",), False),
        (("datastore.name=birds",), False),  # dataset=imagenet is the default
        (
            ("+stage=pipeline", "datastore.name=small", "process.layout=shards", "process.resize=short:256"),
            True,
        ),
        (("+stage=pipeline", "dataset=images", "dataset.name=birds", "dataset.source=/birds"), False),
        (("datastore.name=small", "process.layout=shards", "process.resize=short:256"), True),
        ((), True),
    ],
)
def test_a_datastore_named_alone_has_no_published_accuracy(words: tuple[str, ...], is_imagenet: bool) -> None:
    def find_version(datastore: Datastore) -> Datastore | None:
        content = small if datastore.name == "small" else "c0ffee01"
        return None if "+stage=pipeline" in words else replace(datastore, version=1, content=content)

    resized = ["cluster=local", "model=resnet50", "process.layout=shards", "process.resize=short:256"]
    (settings,) = compose(resized)
    small = content_hash(settings.dataset, settings.process)  # of resized ImageNet

    jobs = make_plan(compose(["cluster=local", "model=resnet50", *words]), find_version)
    (training,) = (job for job in jobs if job.stage == "train")
    assert (published_for(training.frozen()) is not None) == is_imagenet


@pytest.mark.slow
def test_a_pruned_trial_has_another_protocol(tmp_path: Path) -> None:
    (config,) = compose(["cluster=local", "model=resnet50"])
    for state, epochs in ((FINISHED, 90), (PRUNED, 9)):
        run = RunStore(tmp_path).create(f"0000000{epochs}-resnet50", asdict(config), {"stage": "train"})
        attempt = run.new_attempt()
        attempt.submit("local", host="elsewhere")
        attempt.start()
        attempt.end(state, "", {"top1": 0.4, "epochs": epochs})
        details = read_details(run, False)
        assert details.published is not None
        assert details.same_protocol is (state == FINISHED)
