"""Settings decide what a split is and which column of a table has the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sample_folders import Files, find, lines, refusal

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


PETS = "images/{cat,dog,owl}/{1..7}.jpg"
LISTS: Files = {
    "meta/val.txt": lines("{cat,dog,owl}/6.jpg"),
    "meta/test.txt": lines("{cat,dog,owl}/7.jpg"),
}


def counts_of(root: Path, images: list[str], files: Files | None = None, **settings: Any) -> list[int]:
    return [len(images) for images in find(root, images, files, **settings).splits.values()]


@pytest.mark.parametrize("named", [(), ("val",), ("test",), ("val", "test")])
def test_lists_of_splits_that_no_setting_names_are_detected(tmp_path: Path, named: tuple[str, ...]) -> None:
    splits = {split: f"meta/{split}.txt" for split in named}
    assert counts_of(tmp_path, [PETS], LISTS, splits=splits) == [15, 3, 3]
    train = {"meta/train.txt": lines("{cat,dog,owl}/{1..4}.jpg")}
    assert counts_of(tmp_path, [], train, splits=splits) == [12, 3, 3]


def test_what_a_setting_names_is_in_no_other_list(tmp_path: Path) -> None:
    files: Files = {"meta/train.txt": lines("{cat,dog,owl}/{1..5}.jpg"), "own.txt": lines("cat/{5..7}.jpg")}
    assert counts_of(tmp_path, [PETS], {**LISTS, **files}, splits={"val": "own.txt"}) == [14, 3, 2]


@pytest.mark.parametrize(
    "train", [{}, {"train.txt": lines("{cat,dog,owl}/{1..6}.jpg", "holdout/{cat,dog}/8.jpg")}]
)
def test_a_list_holds_images_out_beside_a_folder_that_a_setting_names(tmp_path: Path, train: Files) -> None:
    files: Files = {"test.txt": LISTS["meta/test.txt"], **train}
    images = [PETS.removeprefix("images/"), "holdout/{cat,dog}/8.jpg"]
    assert counts_of(tmp_path, images, files, splits={"val": "holdout"}) == [18, 2, 3]
    assert counts_of(tmp_path, [], splits={"val": "holdout", "test": "test.txt"}) == [18, 2, 3]


def test_a_table_of_classes_may_name_images_of_a_folder_that_a_setting_names(tmp_path: Path) -> None:
    files: Files = {
        "labels.csv": "file,label\n" + "".join(f"{n}.jpg,{'ab'[n % 2]}\n" for n in range(1, 11)),
        "train.txt": lines("images/{1..6}.jpg", "holdout/{9..10}.jpg"),
    }
    settings: dict[str, Any] = {"labels": "labels.csv", "splits": {"val": "holdout"}}
    assert counts_of(tmp_path, ["images/{1..8}.jpg", "holdout/{9..10}.jpg"], files, **settings) == [6, 2, 0]


def test_a_list_that_a_setting_names_may_have_images_of_the_folder_of_its_split(tmp_path: Path) -> None:
    files: Files = {"val.txt": lines("val/{a,b}/{1..2}.jpg")}
    splits = {"val": "val.txt"}
    assert counts_of(tmp_path, ["{train,val}/{a,b}/{1..4}.jpg"], files, splits=splits) == [8, 4, 0]


def test_folders_of_splits_are_found_beside_a_list_that_a_setting_names(tmp_path: Path) -> None:
    images = ["train/{a,b}/{1..4}.jpg", "test/{a,b}/{5..6}.jpg"]
    files: Files = {"val.txt": lines("{a,b}/4.jpg")}
    line = refusal(tmp_path, images, files)
    assert line == (
        "val.txt lists 2 of 8 training images for val, such as train/a/4.jpg; set dataset.splits.val=val.txt "
        "to use it, or set dataset.labels=folder:1 to ignore it"
    )
    found = find(tmp_path, [], splits={"val": "val.txt"})
    assert [len(images) for images in found.splits.values()] == [6, 2, 4]
    assert found.layout.startswith("class folders, splits by folders and lists")
    found = find(tmp_path, [], labels="folder:1")
    assert [len(images) for images in found.splits.values()] == [8, 4, 0]
    assert (
        "val.txt lists 2 of 8 training images for val, such as train/a/4.jpg; it is ignored, as "
        in found.warnings[0]
    )


def test_a_list_may_hold_images_of_a_folder_and_a_table_out(tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,{'ab'[n % 2]}\n" for n in range(1, 9))
    files: Files = {"labels.csv": f"file,label\n{rows}", "val.txt": "5.jpg\n6.jpg\n"}
    line = refusal(tmp_path, ["train/{1..6}.jpg", "test/{7..8}.jpg"], files)
    assert line.endswith(
        "; set dataset.splits.val=val.txt to use it, or set dataset.labels=labels.csv to ignore it"
    )
    assert counts_of(tmp_path, [], splits={"val": "val.txt"}) == [4, 2, 2]
    assert counts_of(tmp_path, [], labels="labels.csv") == [6, 2, 0]


@pytest.mark.parametrize(
    "files", [{"test.txt": lines("val/{a,b}/1.jpg")}, {"test.txt": lines("{a,b}/9.jpg")}]
)
def test_lists_without_training_images_beside_folders_change_nothing(tmp_path: Path, files: Files) -> None:
    found = find(tmp_path, ["{train,val}/{a,b}/{1..4}.jpg"], files)
    assert [len(images) for images in found.splits.values()] == [8, 8, 0]
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("images", "split", "table", "counts"),
    [
        ("test/{1..3}.jpg", "test", True, [12, 2, 3]),
        ("validation/{1..3}.jpg", "val", True, [14, 3, 0]),
        ("val/robin/{1..3}.jpg", "val", False, [14, 3, 0]),
        ("val/{robin,wren}/1.jpg", "val", False, [14, 2, 0]),
    ],
)
def test_a_folder_beside_class_folders_may_be_a_split(
    tmp_path: Path, images: str, split: str, table: bool, counts: list[int]
) -> None:
    settings: dict[str, Any] = {"val_fraction": 0.15} if split == "test" else {}
    folder = images.partition("/")[0]
    line = refusal(tmp_path, ["{robin,wren}/{1..7}.jpg", images], val_fraction=0.15)
    setting = f"dataset.splits.{split}={folder}{' with a table of their classes' if table else ''}"
    assert line == (
        f"SOURCE/{folder} is beside robin and wren, and may be a class or have images of {split}; set "
        f"dataset.labels=folder:1 if it is a class, or {setting}, or move it out of SOURCE"
    )
    found = find(tmp_path, [], labels="folder:1", val_fraction=0.15)
    assert found.classes == tuple(sorted(("robin", "wren", folder)))
    files: Files = {f"{folder}.csv": "file,label\n1.jpg,robin\n2.jpg,wren\n3.jpg,wren\n"} if table else {}
    assert counts_of(tmp_path, [], files, splits={split: folder}, **settings) == counts


def test_a_list_may_number_the_classes_of_folders(tmp_path: Path) -> None:
    images = ["train/{a,b}/{1..4}.jpg", "test/{a,b}/{5..6}.jpg"]
    files: Files = {"val.txt": "train/a/4.jpg 0\ntrain/a/3.jpg 0\ntrain/b/4.jpg 1\n"}
    assert "; set dataset.splits.val=val.txt to use it, or" in refusal(tmp_path, images, files)
    found = find(tmp_path, [], splits={"val": "val.txt"})
    assert found.classes == ("a", "b")
    assert [len(images) for images in found.splits.values()] == [5, 3, 4]
    (tmp_path / "val.txt").write_text("train/a/4.jpg 0\ntrain/a/3.jpg 1\ntrain/b/4.jpg 1\n")
    assert "no training images of 0, 1" in refusal(tmp_path, [], splits={"val": "val.txt"})


def test_a_list_of_images_that_are_not_there_holds_none_out(tmp_path: Path) -> None:
    files: Files = {"test.txt": lines("test/{a,b}/{1..2}.jpg")}
    assert counts_of(tmp_path, ["train/{a,b}/{1..4}.jpg"], files, val_fraction=0.25) == [6, 2, 0]
    files = {"test.txt": lines("{a,b}/{1..2}.jpg"), "val.txt": lines("/data/test/x/train/{a,b}/4.jpg")}
    assert counts_of(tmp_path, [], files) == [2, 2, 4]


def test_a_list_of_images_that_are_not_there_is_nothing_beside_a_folder_train(tmp_path: Path) -> None:
    files: Files = {"test.txt": lines("test/{a,b}/{1..2}.jpg")}
    assert counts_of(tmp_path, ["{train,val}/{a,b}/{1..4}.jpg"], files) == [8, 8, 0]


def test_a_list_across_folders_is_refused_without_a_setting_that_cannot_take_it(tmp_path: Path) -> None:
    files: Files = {"test.txt": lines("{train,val}/{a,b}/1.jpg")}
    line = refusal(tmp_path, ["{train,val}/{a,b}/{1..4}.jpg"], files)
    assert line == (
        "test.txt lists 2 of 8 training images for test, such as train/a/1.jpg; remove the rows of others "
        "from it, such as val/a/1.jpg, or set dataset.labels=folder:1 to ignore it"
    )
    assert counts_of(tmp_path, [], labels="folder:1") == [8, 8, 0]


@pytest.mark.parametrize(
    ("images", "labels", "remedy", "counts"),
    [
        ("{images,test}/{cat,dog}/{1..4}.jpg", "folder:2", {}, [6, 2, 8]),
        ("{images,test}/{cat,dog}_{1..4}.jpg", "filename", {"labels": "filename"}, [6, 2, 8]),
    ],
)
def test_a_folder_of_held_out_images_is_no_training_set_by_dataset_labels(
    tmp_path: Path, images: str, labels: str, remedy: dict[str, Any], counts: list[int]
) -> None:
    line = refusal(tmp_path, [images], labels=labels, val_fraction=0.25)
    remove = "" if remedy else " and remove dataset.labels"
    assert line == (
        f"SOURCE/test may have images of test, but dataset.labels={labels} takes them for train; set "
        f"dataset.splits.test=test{remove}, or move it out of SOURCE"
    )
    assert counts_of(tmp_path, [], splits={"test": "test"}, val_fraction=0.25, **remedy) == counts
    (tmp_path / "test").rename(tmp_path.parent / f"{tmp_path.name}-test")
    assert sum(counts_of(tmp_path, [], val_fraction=0.25, **remedy)) == 8


def test_a_folder_val_is_no_class_if_a_setting_names_another_one(tmp_path: Path) -> None:
    images = ["{cat,dog,val,holdout}/{1..4}.jpg"]
    line = refusal(tmp_path, images, splits={"val": "holdout"})
    assert line.startswith("SOURCE/val is beside cat and dog, and may be a class or have images of val; ")
    rows = "".join(f"val/{n}.jpg,{('cat', 'dog')[n % 2]}\n" for n in range(1, 5))
    (tmp_path / "holdout").rename(tmp_path.parent / f"{tmp_path.name}-holdout")
    assert counts_of(tmp_path, [], {"held.csv": f"file,label\n{rows}"}, splits={"val": "held.csv"}) == [
        8,
        4,
        0,
    ]


@pytest.mark.parametrize("images", ["{valid,invalid}/{1..4}.jpg", "{a,b,test bench}/{1..4}.jpg"])
def test_classes_are_not_taken_for_splits(tmp_path: Path, images: str) -> None:
    assert counts_of(tmp_path, [images], val_fraction=0.25)[2] == 0
