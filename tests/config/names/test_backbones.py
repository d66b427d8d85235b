"""Names of networks and of optimizers, checked without torch."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.names import backbones
from hpc_imagenet.config.names.optimizers import check_optimizer
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.train_stage import TRAIN

BASE = ("dataset=digits", "recipe=demo", "cluster=local")


def composed(*overrides: str) -> Config:
    return compose([*BASE, *overrides])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/resnet18", "timm/resnet18.a1_in1k", "timm/vit_tiny_patch16_224"])
def test_timm_networks_are_choices_of_the_group(name: str) -> None:
    model = composed(f"model={name}").model
    assert (model.name, model.stem, model.weights) == (name, "auto", None)
    assert composed("model.name=" + name).model.name == name


@pytest.mark.slow
def test_timm_networks_in_a_sweep() -> None:
    configs = compose([*BASE, "model=resnet18,timm/resnet18,timm/test_vit", "seed=1,2"], multirun=True)
    assert [config.model.name for config in configs[::2]] == ["resnet18", "timm/resnet18", "timm/test_vit"]
    signatures = {TRAIN.run_id(config) for config in configs}
    assert len(signatures) == 6
    assert all("/" not in name and ":" not in name for name in signatures)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("timm/resnet5", r"model=timm/resnet5 is unknown; did you mean: timm/resnet50"),
        ("timm/resnet50.a1", r"model=timm/resnet50.a1 is unknown; did you mean: timm/resnet50\."),
        ("efficientvit_b0", r"model=efficientvit_b0 is unknown; timm has it: timm/efficientvit_b0"),
        ("timm", r"model=timm is unknown; write timm/NAME, such as timm/resnet50"),
        ("efficientvit_b00", r"model=efficientvit_b00 is unknown; did you mean: .*timm/efficientvit_b0"),
        ("resnet51", r"model=resnet51 is unknown; did you mean: resnet50"),
    ],
)
def test_unknown_networks_suggest_near_ones(given: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{message}"):
        composed(f"model={given}")


@pytest.mark.slow
def test_a_file_of_this_folder_suggests_the_form_of_an_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("")
    hint = "is unknown; for a network of your own write"
    for given, meant in {
        "mine": "mine:FACTORY",
        "mine.py": "mine:FACTORY",
        f"{tmp_path}/mine.py:small": "mine:small",
        "/nets/mine.py:small": "mine:small, in the folder /nets",
    }.items():
        with pytest.raises(UserError) as caught:
            composed(f"model={given}")
        assert str(caught.value) == f"model={given} {hint} {meant}"
    # Hydra's list of all groups, as in --hydra-help, never ends if the name of one is empty.
    assert "" not in ConfigStore.instance().repo["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm/resnet18", "a1", "is unknown for timm/resnet18; one of: a1_in1k"),
        ("timm/resnet18.a1_in1k", "a2_in1k", "has the weights a1_in1k: set model.weights=pretrained"),
        ("timm/beit3_giant_patch14_224", "pretrained", "has no published weights of"),
        ("timm/resnet18", "no/file.pth", "no such file, and no name such as pretrained"),
        ("resnet18", "no/file.pth", "no such file, and no name such as IMAGENET1K_V1"),
    ],
)
def test_weights_are_checked(name: str, weights: str, message: str) -> None:
    config = composed(f"model={name}", f"model.weights={weights}")
    with pytest.raises(UserError, match=f"^model.weights=.*{message}"):
        TRAIN.check_settings(config, config.cluster)


@pytest.mark.slow
def test_valid_weights_pass(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    backbones.check_weights("timm/resnet18", "pretrained")
    backbones.check_weights("timm/resnet18", "a1_in1k")
    backbones.check_weights("timm/resnet18.a1_in1k", "a1_in1k")
    backbones.check_weights("timm/resnet18", str(tmp_path / "w.pth"))
    backbones.check_weights("my.package:factory", str(tmp_path / "w.pth"))
    assert composed("model=timm/resnet18", "model.weights=./w.pth").model.weights == str(
        Path("w.pth").absolute()
    )
    assert composed("model=timm/resnet18", "model.weights=a1_in1k").model.weights == "a1_in1k"


@pytest.mark.slow
def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for setting in ("model=timm/resnet18", "recipe.optimizer=timm/lamb"):
        with pytest.raises(UserError, match=rf"^{setting}: timm is not installed: pip install .*\[timm\]"):
            composed(setting)


@pytest.mark.slow
def test_names_of_another_timm_are_left_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.0")
    assert composed("model=timm/newest_network").model.name == "timm/newest_network"
    backbones.check_weights("timm/resnet18", "newest_in1k")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("means=1", "means=1 is unknown; did you mean: mean"),
        ("mean=0.5", "mean=0.5 is not three numbers"),
        ("std=[1,0,1]", r"std=\[1, 0, 1\] must be more than 0"),
        ("crop_pct=95", "crop_pct=95 is not a fraction above 0, and at most 1"),
        ("interpolation=cubic", "interpolation=cubic is unknown; did you mean: bicubic"),
        ("crop_mode=fill", "crop_mode=fill is unknown; one of: center, squash"),
    ],
)
def test_preprocessing_is_checked(value: str, message: str) -> None:
    config = composed("model=resnet18", f"+model.preprocessing.{value}")
    with pytest.raises(UserError, match=f"^model.preprocessing.{message}"):
        TRAIN.check_settings(config, config.cluster)


@pytest.mark.slow
def test_a_crop_fraction_takes_the_place_of_val_resize() -> None:
    for chosen in (["model=timm/resnet18"], ["model=resnet18", "+model.preprocessing.crop_pct=0.9"]):
        assert composed(*chosen, "recipe.val_size=288").recipe.val_resize == 16
    with pytest.raises(UserError, match=r"recipe\.val_resize=16 is too small: at least 288"):
        composed("model=resnet18", "recipe.val_size=288")


@pytest.mark.slow
def test_optional_settings_are_in_the_signature_only_if_set() -> None:
    plain = composed("model=resnet18")
    assert set(plain.model.identity()) == {"name", "stem", "options"}
    assert not plain.recipe.identity().keys() & {"optimizer_options", "shuffle_window"}
    changed = composed(
        "model=resnet18", "+model.preprocessing.crop_pct=0.9", "+recipe.optimizer_options.nesterov=true"
    )
    assert changed.model.identity()["preprocessing"] == {"crop_pct": 0.9}
    assert changed.recipe.identity()["optimizer_options"] == {"nesterov": True}
    assert TRAIN.signature(changed) != TRAIN.signature(plain)
    windowed = composed("model=resnet18", "recipe.shuffle_window=65536")
    assert windowed.recipe.identity()["shuffle_window"] == 65536


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adamww"], "recipe.optimizer=adamww is unknown; did you mean: adamw"),
        (["lion"], "recipe.optimizer=lion is unknown; did you mean: timm/lion"),
        (["timm/lamp"], "recipe.optimizer=timm/lamp is unknown; did you mean: timm/lamb"),
        (["adam", "lr=1"], "recipe.optimizer_options.lr: set recipe.learning_rate instead"),
        (["sgd", "momentum=1"], "recipe.optimizer_options.momentum: set recipe.momentum instead"),
        (["timm/lars", "momentum=1"], "recipe.optimizer_options.momentum: set recipe.momentum instead"),
    ],
)
def test_optimizers_are_checked(overrides: list[str], message: str) -> None:
    name, *options = overrides
    settings = [f"recipe.optimizer={name}", *(f"+recipe.optimizer_options.{option}" for option in options)]
    with pytest.raises(UserError, match=f"^{message}"):
        composed(*settings)


@pytest.mark.slow
def test_other_optimizers_pass() -> None:
    for name in ("sgd", "rmsprop", "timm/lamb"):
        check_optimizer(composed(f"recipe.optimizer={name}").recipe)


@pytest.mark.slow
def test_no_heavy_package_is_imported_for_names_of_timm(tmp_path: Path) -> None:
    heavy = "import sys; print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    command = "from hpc_imagenet.config.compose import compose; compose(sys.argv[1:]);"
    (tmp_path / "mine.py").write_text("import torch\n\ndef build(num_classes):\n    pass\n")
    for name in ("timm/resnet18", "mine:build"):
        code = f"import sys; {command} {heavy}"
        output = subprocess.run(
            [sys.executable, "-c", code, *BASE, f"model={name}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(backbones.__file__).parents[3])},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert output.strip() == "[]"
