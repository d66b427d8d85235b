"""The recipes of conf/: they compose, and say what their schedules are."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from hpc_imagenet.config.compose import CONF, compose
from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.validate import validate_jobs
from hpc_imagenet.runs.plan import make_plan
from hpc_imagenet.runs.store import RunStore

NAMES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
IMAGES = 1_281_167


@functools.cache
def recipe(name: str, *overrides: str) -> Recipe:
    return compose([f"recipe={name}", *overrides])[0].recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_arithmetic(name: str) -> None:
    made, text = recipe(name), (CONF / "recipe" / f"{name}.yaml").read_text()
    assert len(made.sizes) == made.epochs
    if name.startswith(("fast", "modern", "standard")):
        assert "ublished by" in text
        assert "not reproduced here" in text
        steps = IMAGES // made.global_batch
        assert f"{steps:,} whole steps an epoch, {steps * made.epochs:,} in all" in text


@pytest.mark.parametrize(
    ("name", "small"), [("fast16", 12), ("fast24", 19), ("fast32", 25), ("fast40", 32), ("fast88", 71)]
)
def test_images_grow_when_the_schedule_says(name: str, small: int) -> None:
    sizes = recipe(name).sizes
    assert sizes == [160] * small + [192] * (len(sizes) - small)


def test_sizes_grow_in_steps_that_divide_both() -> None:
    words = ("epochs=6", "start_size=128", "grow_from=1", "grow_to=5", "size=224")
    sizes = recipe("demo", *(f"recipe.{word}" for word in words)).sizes
    assert sizes == [128, 128, 160, 192, 192, 224]
    assert recipe("demo").sizes == [16] * 8


def test_what_is_left_out_is_not_in_the_signature() -> None:
    def signature(*words: str) -> str:
        return make_plan(compose(["dataset=digits", *words]), lambda _: None)[0].signature

    plain = signature()
    assert signature("recipe.mixup=0", "recipe.ema=null", "recipe.schedule=cosine") == plain
    assert signature("model.compile=true", "train.accumulate=2", "train.bottleneck_after_seconds=5") == plain
    changes = ("mixup=0.1", "ema=0.9", "schedule=linear", "start_size=8", "val_flip=true", "blurpool=true")
    others = {signature(f"recipe.{word}") for word in changes}
    assert len(others | {plain}) == len(changes) + 1
    assert signature("model.weights=IMAGENET1K_V1") != plain


def test_weights_are_a_name_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["model.weights=IMAGENET1K_V2"])[0].model.weights == "IMAGENET1K_V2"
    assert compose(["model.weights=w.pth"])[0].model.weights == str(tmp_path / "w.pth")


def test_the_door_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    def asked(*words: str) -> None:
        validate_jobs(make_plan(compose(["dataset=digits", *words]), lambda _: None), RunStore(tmp_path))

    with pytest.raises(
        UserError, match=r"^recipe.freeze=true trains the classifier alone: .* model.weights="
    ):
        asked("recipe=linear_probe")
    with pytest.raises(UserError, match=r"^model.weights=.*w.pth: no such file"):
        asked("recipe=linear_probe", f"model.weights={tmp_path / 'w.pth'}")
    with pytest.raises(UserError, match="no datastore"):  # all else is well
        asked("recipe=linear_probe", "model.weights=IMAGENET1K_V1", f"datastore.url={tmp_path}")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("recipe.schedule=steps", "recipe.schedule=steps is unknown; one of: cosine, linear"),
        ("recipe.augment=auto", "recipe.augment=auto is unknown; one of: none, trivial"),
        ("recipe.ema=1.5", r"recipe.ema=1.5 is not between 0 and 1"),
        ("recipe.mixup=-1", r"recipe.mixup=-1.0 is too small"),
        ("recipe.grow_from=14", r"recipe.grow_to=13 comes before recipe.grow_from=14"),
    ],
)
def test_what_makes_no_sense_is_one_line(word: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        compose(["recipe=fast16", word])
