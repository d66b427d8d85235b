"""The validation split that val_fraction makes, the order of classes, and the identity of a dataset."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.config.compose import compose
from hpc_imagenet.data.layouts.completed_splits import stratified_choice
from hpc_imagenet.data.layouts.split_names import class_keys, is_trainval, natural_key, same_class, split_of
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import content_hash

sizes = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 40), min_size=1, max_size=6)


def labels_of(classes: dict[str, int], prefix: str = "") -> dict[str, str]:
    return {
        f"{prefix}{n}/{i}.jpg": name for n, (name, size) in enumerate(classes.items()) for i in range(size)
    }


@pytest.mark.slow
@given(sizes, st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_a_share_of_each_class_is_chosen(classes: dict[str, int], fraction: float, seed: int) -> None:
    labels = labels_of(classes)
    chosen = Counter(labels[path] for path in stratified_choice(labels, fraction, seed))
    for name, size in classes.items():
        assert chosen[name] == min(max(int(size * fraction + 0.5), min(size - 1, 1)), size - 1)


@pytest.mark.slow
@given(sizes, st.integers(0, 99))
def test_the_choice_depends_on_names_and_seed_only(classes: dict[str, int], seed: int) -> None:
    chosen = stratified_choice(labels_of(classes), 0.3, seed)
    backwards = dict(reversed(labels_of(classes).items()))
    assert stratified_choice(backwards, 0.3, seed) == chosen
    assert stratified_choice(labels_of(classes, "moved/"), 0.3, seed) == {f"moved/{path}" for path in chosen}
    larger = {**labels_of(classes), **{f"other/{n}.jpg": "another class" for n in range(9)}}
    assert {path for path in stratified_choice(larger, 0.3, seed) if path[:5] != "other"} == chosen


def test_another_seed_chooses_other_images() -> None:
    labels = labels_of({"a": 100, "b": 100})
    choices = [stratified_choice(labels, 0.1, seed) for seed in range(5)]
    assert len({frozenset(choice) for choice in choices}) == 5


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["b", "a10", "a2", "10", "9", "é", "Z", "a02", "2 b"]
    assert sorted(names, key=natural_key) == ["2 b", "9", "10", "Z", "a02", "a2", "a10", "b", "é"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("seg_train", "train"), ("TrainImages", "train"), ("train2017", "train"), ("TRAINING", "train")),
        *(("val.X", "val"), ("validation", "val"), ("images_dev", "val"), ("Final_Test", "test")),
        *(("train_val2018", None), ("train_test_split", None), ("strain", None), ("devkit", None)),
        *(("latest", None), ("evaluated", None)),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_trainval_is_neither_train_nor_val() -> None:
    assert is_trainval("trainval")
    assert is_trainval("train_val_list")
    assert not is_trainval("train_test_split")
    assert not is_trainval("train")


def test_class_names_are_matched_by_unicode_form_and_number() -> None:
    keys = class_keys(["00014", "0", "café"])
    assert same_class("14", keys) == "00014"
    assert same_class("cafe\u0301", keys) == "café"
    assert same_class("1", keys) is None


OWN = ("dataset=images", "dataset.name=own", "dataset.source=/data/own")


def hash_of(*overrides: str) -> str:
    source = [] if any(word.startswith("dataset.source") for word in overrides) else OWN[2:]
    (config,) = compose([*OWN[:2], *source, *overrides])
    return content_hash(config.dataset)


@pytest.mark.slow
def test_the_settings_that_choose_images_are_in_the_content() -> None:
    words = [
        *((), ("dataset.splits.train=a",), ("dataset.labels=t.csv",), ("dataset.val_fraction=0.1",)),
        *(("dataset.val_fraction=0.1", "dataset.split_seed=1"), ("dataset.empty_classes=skip",)),
        *(("dataset.orient=false",), ("dataset.source=/data/other",)),
    ]
    assert len({hash_of(*each) for each in words}) == len(words)
    assert hash_of("dataset.split_seed=1") == hash_of()  # without a fraction it decides nothing
    assert hash_of("dataset.hint=x") == hash_of()


@pytest.mark.slow
def test_archives_have_the_content_that_they_had_before_there_were_labelled_images() -> None:
    (config,) = compose(["dataset=ilsvrc", "dataset.name=x", "dataset.source=/x"])
    config.dataset.revision = "r"
    assert config.dataset.identity() == {}
    assert content_hash(config.dataset) == "f3d6b9be"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((*OWN, "dataset.val_fraction=1.5"), "dataset.val_fraction=1.5 is not between 0.001 and 0.999"),
        ((*OWN, "dataset.empty_classes=drop"), "dataset.empty_classes=drop is unknown; "),
        ((*OWN, "+dataset.splits.dev=x"), "dataset.splits.dev is unknown; one of: train, val, test"),
        (
            ("dataset=digits", "dataset.val_fraction=0.1"),
            "dataset.val_fraction is for labelled images: set dataset=",
        ),
        (
            ("dataset=digits", "dataset.labels=x"),
            "dataset.labels is for labelled images: set dataset=images as well",
        ),
        (
            ("dataset=digits", "+dataset.splits.val=x"),
            "dataset.splits.val is for labelled images: set dataset=imag",
        ),
    ],
)
def test_settings_of_labelled_images_are_checked(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(words)
    assert str(caught.value).startswith(expected)
