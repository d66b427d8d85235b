"""Settings decide what a split is and which column of a table has the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sample_folders import Files, find, refusal

AB = "{a,b}/{1..4}.jpg"


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"splits": {"val": "holdout"}}, (8, 2, 0)),
        ({"splits": {"test": "holdout"}, "val_fraction": 0.25}, (6, 2, 2)),
        ({"splits": {"train": "[ab]", "val": "holdout"}}, None),
    ],
)
def test_a_split_may_be_named(
    tmp_path: Path, settings: dict[str, Any], counts: tuple[int, ...] | None
) -> None:
    images = [AB, "holdout/{a,b}/9.jpg"]
    if counts is None:
        assert "is in no class folder" in refusal(tmp_path, images, **settings)
    else:
        found = find(tmp_path, images, **settings)
        assert tuple(len(files) for files in found.splits.values()) == counts


def test_a_pattern_names_several_folders_of_a_split(tmp_path: Path) -> None:
    images = ["train_{clean,noisy}/{a,b}/{1..3}.jpg", "val/{a,b}/1.jpg"]
    assert "each may be train" in refusal(tmp_path, images)
    found = find(tmp_path, [], splits={"train": "train_*"})
    assert [len(files) for files in found.splits.values()] == [12, 2, 0]
    assert found.warnings == ()


def test_a_column_that_a_setting_names_is_that_of_all_lists(tmp_path: Path) -> None:
    rows = {"train": (1, 2, 3, 4), "val": (5, 6), "test": (7, 8)}
    files: Files = {
        f"{split}.csv": "image,age,kind\n" + "".join(f"{n}.jpg,{n},{'ab'[n % 2]}\n" for n in numbers)
        for split, numbers in rows.items()
    }
    assert "train.csv has the columns age, kind, and each may be" in refusal(
        tmp_path, ["i/{1..8}.jpg"], files
    )
    found = find(tmp_path, [], labels="train.csv:kind")
    assert found.classes == ("a", "b")
    assert [len(files) for files in found.splits.values()] == [4, 2, 2]
    splits = {split: f"{split}.csv" for split in rows}
    assert find(tmp_path, [], labels="train.csv:kind", splits=splits).splits == found.splits


def test_splits_in_class_folders_stay_with_folder_1(tmp_path: Path) -> None:
    found = find(tmp_path, ["{a,b}/train/{1..4}.jpg", "{a,b}/test/{1..2}.jpg"], labels="folder:1")
    assert [len(files) for files in found.splits.values()] == [8, 4, 0]


@pytest.mark.parametrize(
    ("images", "classes"),
    [
        ("{train,bus,test bench}/{1..4}.jpg", ("bus", "test bench", "train")),
        ("{training shoes,testing kit,boots}/{1..4}.jpg", ("boots", "testing kit", "training shoes")),
        ("{train,plane}/{1..4}.jpg", ("plane", "train")),
    ],
)
@pytest.mark.parametrize("labels", ["folder:1", "folder:path"])
def test_classes_may_have_the_words_of_splits(
    tmp_path: Path, images: str, classes: tuple[str, ...], labels: str
) -> None:
    if len(classes) > 2:  # flat splits without a table would look the same
        line = refusal(tmp_path, [images], val_fraction=0.25)
        assert f", or dataset.labels=folder:1 if {classes[-1]} is a class" in line
    found = find(tmp_path, [images], labels=labels, val_fraction=0.25)
    assert found.classes == classes
    assert len(found.splits["val"]) == len(classes)


def test_splits_in_folders_stay_splits_if_a_setting_names_the_class_folders(tmp_path: Path) -> None:
    found = find(tmp_path, ["{train,test}/{a,b}/{1..4}.jpg", "docs/1.jpg"], labels="folder:1")
    assert found.classes == ("a", "b")
    assert "folder:1" not in refusal(tmp_path / "flat", ["{train,test}/{1..4}.jpg"])
