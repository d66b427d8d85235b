"""Columns of splits in tables: which are, what they hold out, and how those of other things are ignored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sample_folders import Files, find, refusal

PHOTOS = "{1..6}.jpg"


def table(header: str, *values: str) -> str:
    """Return a table of PHOTOS with the classes a and b and another column."""
    rows = [f"{n}.jpg,{'ab'[n % 2]},{value}\n" for n, value in enumerate(values, 1)]
    return f"filename,label,{header}\n" + "".join(rows)


@pytest.mark.parametrize(
    ("header", "values", "unknown"),
    [
        ("split", ("train", "train", "train", "train", "holdout", "holdout"), "holdout"),
        ("split", ("train", "train", "test", "test", "", ""), ""),
        ("Partition", ("0", "0", "0", "0", "1", "1"), "0"),
        ("subset", ("tr", "tr", "tr", "tr", "te", "te"), "tr"),
        ("set", ("train", "train", "train", "train", "holdout", "holdout"), "holdout"),
        ("group", ("train", "train", "train", "train", "trainval", "test"), "trainval"),
        ("Data Split", ("train", "train", "train", "test", "test", ""), ""),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"labels": "labels.csv"}, {"labels": "labels.csv:label"}])
@pytest.mark.parametrize("other", [{}, {"other.csv": table("n", *"123456")}])
def test_a_value_that_is_no_split_is_refused(
    tmp_path: Path, header: str, values: tuple[str, ...], unknown: str, settings: dict[str, Any], other: Files
) -> None:
    files: Files = {"labels.csv": table(header, *values), **other}
    assert refusal(tmp_path, [PHOTOS], files, val_fraction=0.2, **settings).startswith(
        f"labels.csv: column {header} has {unknown!r}, which is none of train, val and test; write one of "
        "these, or remove these rows or the column"
    )


@pytest.mark.parametrize(
    ("header", "values"),
    [
        *(("set", "112233"), ("group", "xxyyzz"), ("dataset", "ppqqrr"), ("split", [""] * 6)),
        ("vehicle", ("train", "train", "train", "plane", "plane", "plane")),
        ("kind", ("steam train",) * 3 + ("test bench",) * 3),
    ],
)
def test_columns_of_other_things_are_no_splits(tmp_path: Path, header: str, values: Sequence[str]) -> None:
    found = find(tmp_path, [PHOTOS], {"labels.csv": table(header, *values)}, val_fraction=0.34)
    assert [len(files) for files in found.splits.values()] == [4, 2, 0]


def test_a_column_of_splits_may_have_the_classes_if_a_setting_names_it(tmp_path: Path) -> None:
    files: Files = {"labels.csv": table("subset", *"xxxyyy")}
    found = find(tmp_path, [PHOTOS], files, labels="labels.csv:subset", val_fraction=0.34)
    assert found.classes == ("x", "y")
    assert found.warnings == ()


@pytest.mark.parametrize("header", ["Data Split", "split_name", "train/test", "group"])
def test_a_column_whose_values_are_all_splits_is_one_of_splits(tmp_path: Path, header: str) -> None:
    values = ("Train", "Train", "val", "val", "test", "test")
    found = find(tmp_path, [PHOTOS], {"labels.csv": table(header, *values)})
    assert found.classes == ("a", "b")
    assert [len(files) for files in found.splits.values()] == [2, 2, 2]


def test_columns_and_rows_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    rows = [f"train,{value}" for value in ("train", "train", "train", "train", "test", "test")]
    rows[0] = "test,train"
    files: Files = {"labels.csv": table("split_1,split_2", *rows)}
    assert refusal(tmp_path, [PHOTOS], files) == (
        "labels.csv: columns split_1 and split_2 have different splits; remove one of them, or set "
        "dataset.labels='labels.csv:filename:label' to ignore it"
    )
    files = {"labels.csv": table("split", *["train"] * 5, "test") + "1.jpg,b,test\n"}
    assert "labels.csv: 1.jpg is in train and in test; an image belongs" in refusal(tmp_path, [], files)
    found = find(tmp_path, [], labels="labels.csv:filename:label", val_fraction=0.34)
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]
    assert "labels.csv: 1.jpg is in train and in test" in found.warnings[0]


FOLDERS = "{cat,eel}/{1..6}.jpg"
HELD_OUT = (
    "metadata.csv has a column of splits, by which 4 of 12 training images are not for training, such as "
)
PATHS = [f"{name}/{n}.jpg" for name in ("cat", "eel") for n in range(1, 7)]


def split_of_number(path: str) -> str:
    return "test" if path[-5] in "56" else "train"


@pytest.mark.parametrize(
    "metadata",
    [
        "file_name,label,split\n" + "".join(f"{path},{path[:3]},{split_of_number(path)}\n" for path in PATHS),
        "file_name,split\n" + "".join(f"{path},{split_of_number(path)}\n" for path in PATHS),
    ],
)
def test_a_table_that_holds_images_of_class_folders_out_is_used_or_refused(
    tmp_path: Path, metadata: str
) -> None:
    for settings in ({}, {"val_fraction": 0.2}):
        assert refusal(tmp_path, [FOLDERS], {"metadata.csv": metadata}, **settings) == (
            f"{HELD_OUT}cat/5.jpg; set dataset.labels=metadata.csv to use it, or set "
            "dataset.labels=folder:1 to ignore it"
        )
    found = find(tmp_path, [], labels="metadata.csv")
    assert found.classes == ("cat", "eel")
    assert [len(files) for files in found.splits.values()] == [8, 4, 0]
    found = find(tmp_path, [], labels="folder:1", val_fraction=0.5)
    assert [len(files) for files in found.splits.values()] == [6, 6, 0]
    assert found.warnings == (f"{HELD_OUT}cat/5.jpg; it is ignored, as dataset.labels=folder:1",)
    assert "set dataset.labels=metadata.csv and remove dataset.splits.val to use it, or" in refusal(
        tmp_path, [], {"val.txt": "cat/1.jpg\neel/1.jpg\n"}, splits={"val": "val.txt"}
    )


def test_the_split_of_a_table_is_not_lost_beside_that_of_the_classes(tmp_path: Path) -> None:
    splits = "filename,split\n" + "".join(f"{n}.jpg,{'test' if n > 4 else 'train'}\n" for n in range(1, 7))
    files: Files = {"labels.csv": table("n", *"123456"), "splits.csv": splits}
    assert refusal(tmp_path / "two", [PHOTOS], files, val_fraction=0.2) == (
        "splits.csv has a column of splits, by which 2 of 6 training images are not for training, such as "
        "5.jpg; add it to labels.csv to use it, or set dataset.labels=labels.csv to ignore it"
    )
    both = table("split", *["train"] * 4, "test", "test")
    found = find(tmp_path / "both", [PHOTOS], {"a.csv": files["labels.csv"], "b.csv": both})
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]
    settings: dict[str, Any] = {"labels": "b.csv", "splits": {"val": "val.txt"}}
    assert refusal(tmp_path / "both", [], {"val.txt": "1.jpg\n2.jpg\n"}, **settings) == (
        "b.csv has a column of splits, by which 2 of 4 training images are not for training, such as 5.jpg"
        "; remove dataset.splits.val to use it, or set dataset.splits.train to ignore it"
    )


def test_a_table_may_hold_images_of_a_folder_train_out(tmp_path: Path) -> None:
    files: Files = {"labels.csv": table("split", *["train"] * 4, "val", "val")}
    assert refusal(tmp_path, ["train/{1..6}.jpg", "test/{7..8}.jpg"], files, val_fraction=0.2) == (
        "labels.csv has a column of splits, by which 2 of 6 training images are not for training, such as "
        "train/5.jpg; set dataset.labels=labels.csv to use it, or remove the column to ignore it"
    )
    found = find(tmp_path, [], labels="labels.csv")
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (
            "file,split\ncat/1.jpg,train\ncat/2.jpg,holdout\n",
            "metadata.csv: column split has 'holdout', which",
        ),
        ("file,split\n1.jpg,train\n2.jpg,test\n", "metadata.csv: 1.jpg may be cat/1.jpg or eel/1.jpg; write"),
    ],
)
def test_splits_that_cannot_be_read_beside_class_folders_are_refused(
    tmp_path: Path, metadata: str, problem: str
) -> None:
    line = refusal(tmp_path, [FOLDERS], {"metadata.csv": metadata}, val_fraction=0.2)
    assert line.startswith(problem)
    assert line.endswith(", or set dataset.labels=folder:1 to ignore it")
    found = find(tmp_path, [], labels="folder:1", val_fraction=0.2)
    assert [text.startswith(problem) for text in found.warnings] == [True]


def advised(line: str) -> str:
    """Return the value of dataset.labels at the end of an error."""
    match = re.search(r"set dataset\.labels='?([^']*?)'? to ignore it$", line)
    assert match, line
    return match[1]


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("group", ("control", "control", "control", "test", "test", "test")),
        ("partition", ("0", "0", "1", "1", "2", "2")),
        ("split", ("train", "train", "train", "train", "holdout", "holdout")),
    ],
)
@pytest.mark.parametrize("labels", [None, "l.csv", "l.csv:label"])
def test_a_column_that_is_not_one_of_splits_is_ignored_if_all_columns_are_named(
    tmp_path: Path, header: str, values: Sequence[str], labels: str | None
) -> None:
    files: Files = {"l.csv": table(header, *values)}
    setting = advised(refusal(tmp_path, [PHOTOS], files, labels=labels, val_fraction=0.34))
    assert setting == "l.csv:filename:label"
    found = find(tmp_path, [], labels=setting, val_fraction=0.34)
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]
    (warning,) = found.warnings
    assert warning.startswith(f"l.csv: column {header} has ")
    assert warning.endswith(f"; it is ignored, as dataset.labels={setting}")


def test_the_classes_may_be_one_column_each_beside_one_that_is_ignored(tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,{n % 2},{1 - n % 2},{'test' if n > 3 else 'control'}\n" for n in range(1, 7))
    line = refusal(tmp_path, [PHOTOS], {"l.csv": f"file,odd,even,group\n{rows}"}, val_fraction=0.34)
    found = find(tmp_path, [], labels=advised(line), val_fraction=0.34)
    assert found.classes == ("even", "odd")
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]


def test_a_column_of_other_things_beside_one_of_splits_is_none(tmp_path: Path) -> None:
    values = [f"{'test' if n > 4 else 'train'},{'test' if n % 2 else 'control'}" for n in range(1, 7)]
    found = find(tmp_path, [PHOTOS], {"l.csv": table("split,group", *values)}, val_fraction=0.5)
    assert [len(images) for images in found.splits.values()] == [2, 2, 2]
    assert found.warnings == ()


@pytest.mark.parametrize("splits", [{}, {"train": "train.csv", "val": "val.csv"}])
def test_lists_with_a_column_that_is_not_one_of_splits(tmp_path: Path, splits: dict[str, str]) -> None:
    rows = [f"{n}.jpg,{'ab'[n % 2]},{'test' if n % 3 else 'control'}\n" for n in range(1, 7)]
    files: Files = {
        "train.csv": "file,label,group\n" + "".join(rows[:4]),
        "val.csv": "file,label,group\n" + "".join(rows[4:]),
    }
    setting = advised(refusal(tmp_path, [PHOTOS], files, splits=splits))
    assert setting == "train.csv:file:label"
    found = find(tmp_path, [], labels=setting, splits=splits)
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]


def test_tables_of_folders_with_a_column_that_is_not_one_of_splits(tmp_path: Path) -> None:
    rows = [f"{n}.jpg,{'ab'[n % 2]},{'test' if n % 3 else 'control'}\n" for n in range(1, 7)]
    files: Files = {
        "train.csv": "file,label,group\n" + "".join(rows[:4]),
        "val.csv": "file,label,group\n" + "".join(rows[4:]),
    }
    labels = advised(refusal(tmp_path, ["train/{1..4}.jpg", "val/{5..6}.jpg"], files))
    assert refusal(tmp_path, [], labels=labels).endswith(
        "; set dataset.splits.val to the table of its classes"
    )
    found = find(tmp_path, [], labels=labels, splits={"val": "val.csv"})
    assert [len(images) for images in found.splits.values()] == [4, 2, 0]


def test_a_table_without_classes_whose_splits_are_unknown_is_refused(tmp_path: Path) -> None:
    text = "file,split\n" + "".join(f"{path},{'holdout' if path[-5] > '4' else 'train'}\n" for path in PATHS)
    line = refusal(tmp_path, [FOLDERS], {"meta.csv": text}, labels="meta.csv", val_fraction=0.2)
    assert line.endswith(", or remove dataset.labels=meta.csv, which has no classes")
    setting = advised(refusal(tmp_path, [], val_fraction=0.2))
    found = find(tmp_path, [], labels=setting, val_fraction=0.5)
    assert [len(images) for images in found.splits.values()] == [6, 6, 0]


SPLIT_FOLDERS = "{train,val}/{cat,eel}/{1..6}.jpg"
SPLIT_PATHS = [f"{split}/{path}" for split in ("train", "val") for path in PATHS]


def test_a_table_of_splits_takes_classes_only_from_folders_that_are_not_splits(tmp_path: Path) -> None:
    held = ("train/cat/6.jpg", "train/eel/6.jpg")
    rows = [f"{path},{'test' if path in held else path.partition('/')[0]}" for path in SPLIT_PATHS]
    files: Files = {"meta.csv": "path,split\n" + "\n".join(rows)}
    line = refusal(tmp_path, [SPLIT_FOLDERS], files)
    assert line.endswith(
        "; add a column of classes to meta.csv and set dataset.labels=meta.csv to use it, or set "
        "dataset.labels=folder:1 to ignore it"
    )
    assert [len(images) for images in find(tmp_path, [], labels="folder:1").splits.values()] == [12, 12, 0]
    rows = [f"{row},{row.split('/')[1]}" for row in rows]
    found = find(tmp_path, [], {"meta.csv": "path,split,class\n" + "\n".join(rows)}, labels="meta.csv")
    assert [len(images) for images in found.splits.values()] == [10, 12, 2]


@pytest.mark.parametrize(
    "files",
    [
        {"val/meta.csv": "name,split\n1.jpg,val\n2.jpg,val\n"},
        {"val/meta.csv": "name,group\n1.jpg,control\n2.jpg,test\n"},
        {"val/meta.csv": "name,split\n1.jpg,val\n2.jpg,test\n"},
        {"train/meta.csv": "name,split\n1.jpg,train\n2.jpg,train\n"},
        {"meta.csv": "name,split\n1.jpg,train\n1.jpg,val\n2.jpg,train\n"},
    ],
)
def test_bare_names_that_hold_no_training_image_out_are_no_problem(tmp_path: Path, files: Files) -> None:
    found = find(tmp_path, [SPLIT_FOLDERS], files)
    assert [len(images) for images in found.splits.values()] == [12, 12, 0]
    assert found.warnings == ()


def test_bare_names_that_may_hold_a_training_image_out_are_refused(tmp_path: Path) -> None:
    files: Files = {"meta.csv": "name,split\n1.jpg,train\n2.jpg,test\n"}
    line = refusal(tmp_path, [SPLIT_FOLDERS], files)
    assert line.startswith("meta.csv: 1.jpg may be train/cat/1.jpg or train/eel/1.jpg; write its path")
    found = find(tmp_path, [], labels=advised(line))
    assert [len(images) for images in found.splits.values()] == [12, 12, 0]
