"""The recipes in conf/: composition, schedules, signatures and bounds."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from hpc_imagenet.config.compose import CONF, compose
from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.validate import validate_jobs
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow

NAMES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
IMAGES = 1_281_167


@functools.cache
def recipe(name: str, *overrides: str) -> Recipe:
    return compose([f"recipe={name}", *overrides])[0].recipe


@pytest.mark.parametrize("name", NAMES)
def test_recipe_comments_match_its_schedule(name: str) -> None:
    composed, text = recipe(name), (CONF / "recipe" / f"{name}.yaml").read_text()
    assert len(composed.sizes) == composed.epochs
    if name.startswith(("fast", "modern", "standard")):
        assert "ublished by" in text
        assert "not reproduced here" in text
        steps = IMAGES // composed.global_batch
        assert f"{steps:,} whole steps an epoch, {steps * composed.epochs:,} in all" in text


@pytest.mark.parametrize(
    ("name", "small"), [("fast16", 12), ("fast24", 19), ("fast32", 25), ("fast40", 32), ("fast88", 71)]
)
def test_progressive_resizing_of_fast_recipes(name: str, small: int) -> None:
    sizes = recipe(name).sizes
    assert sizes == [160] * small + [192] * (len(sizes) - small)


def test_progressive_resizing_uses_multiples_of_the_gcd() -> None:
    settings = ("epochs=6", "start_size=128", "grow_from=1", "grow_to=5", "size=224")
    sizes = recipe("demo", *(f"recipe.{setting}" for setting in settings)).sizes
    assert sizes == [128, 128, 160, 192, 192, 224]
    assert recipe("demo").sizes == [16] * 8


def test_signature_ignores_defaults_and_speed_settings() -> None:
    def signature(*overrides: str) -> str:
        return make_plan(compose(["dataset=digits", *overrides]), lambda _: None)[0].signature

    plain = signature()
    assert signature("recipe.mixup=0", "recipe.ema=null", "recipe.schedule=cosine") == plain
    assert signature("model.compile=true", "train.accumulate=2", "train.bottleneck_after_seconds=5") == plain
    changes = ("mixup=0.1", "ema=0.9", "schedule=linear", "start_size=8", "val_flip=true", "blurpool=true")
    others = {signature(f"recipe.{change}") for change in changes}
    assert len(others | {plain}) == len(changes) + 1
    assert signature("model.weights=IMAGENET1K_V1") != plain


def test_weights_setting_is_a_name_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["model.weights=IMAGENET1K_V2"])[0].model.weights == "IMAGENET1K_V2"
    assert compose(["model.weights=w.pth"])[0].model.weights == str(tmp_path / "w.pth")


def test_missing_weights_are_an_error_at_submission(tmp_path: Path) -> None:
    def validate(*overrides: str) -> None:
        validate_jobs(make_plan(compose(["dataset=digits", *overrides]), lambda _: None), RunStore(tmp_path))

    with pytest.raises(
        UserError, match=r"^recipe.freeze=true trains the classifier alone: .* model.weights="
    ):
        validate("recipe=linear_probe")
    with pytest.raises(UserError, match=r"^model.weights=.*w.pth: no such file"):
        validate("recipe=linear_probe", f"model.weights={tmp_path / 'w.pth'}")
    with pytest.raises(UserError, match="no datastore"):  # the weights are valid
        validate("recipe=linear_probe", "model.weights=IMAGENET1K_V1", f"datastore.url={tmp_path}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.schedule=steps", "recipe.schedule=steps is unknown; one of: cosine, linear"),
        (
            "recipe.precision=bf16-true",
            "^recipe.precision=bf16-true is refused, as .*: train with .*bf16-mixed",
        ),
        ("recipe.augment=auto", "recipe.augment=auto is unknown; one of: none, trivial"),
        ("recipe.ema=1.5", r"recipe.ema=1.5 is not between 0 and 1"),
        ("recipe.mixup=-1", r"recipe.mixup=-1.0 is too small"),
        ("recipe.grow_from=14", r"recipe.grow_to=13 is before recipe.grow_from=14"),
    ],
)
def test_invalid_recipe_setting_is_an_error(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(["recipe=fast16", override])
