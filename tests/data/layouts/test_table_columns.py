"""What is a header, and which classes a table has: lists of labels, and several classes in one cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_folders import Files, find, refusal

PHOTOS = "{cat,dog,owl}_{1..7}.jpg"
NAMES = [f"{name}_{n}" for name in ("cat", "dog", "owl") for n in range(1, 8)]
SHORT = "{1..6}.jpg"


def rows(begin: str, form: str) -> str:
    """Return the beginning of a table, and a row for each of PHOTOS."""
    return begin + "".join(form.format(name, name[:3]) + "\n" for name in NAMES)


@pytest.mark.parametrize(
    ("image", "table", "text"),
    [
        ("image.jpg", "labels.csv", rows("image,label\n", "{}.jpg,{}")),
        ("image.jpg", "labels.csv", rows("image,label\n", "{},{}")),
        ("photo.jpg", "labels.csv", rows("photo,kind\n", "{}.jpg,{}")),
        ("file.png", "labels.tsv", rows("file\tlabel\n", "{}\t{}")),
        ("label.png", "labels.csv", rows("file,label\n", "{},{}")),
        ("image.jpg", "labels.txt", rows("image label\n", "{} {}")),
        ("photo.jpg", "labels.txt", rows("photo,kind\n", "{}.jpg,{}")),
    ],
)
def test_a_header_may_be_the_name_of_an_image(tmp_path: Path, image: str, table: str, text: str) -> None:
    found = find(tmp_path, [PHOTOS, image], {table: text}, val_fraction=0.2)
    assert found.classes == ("cat", "dog", "owl")
    assert found.skipped == {f"not an image ({table[-4:]})": 1, f"not in {table}": 1}
    assert found.warnings == ()


@pytest.mark.parametrize("form", ["{},{}", "{}.jpg,{}"])
@pytest.mark.parametrize("name", ["labels.csv", "labels.txt"])
def test_a_table_without_a_header_may_miss_its_first_image(tmp_path: Path, name: str, form: str) -> None:
    images = [*(f"{name}.jpg" for name in NAMES)]
    assert find(tmp_path, images, {name: rows("", form)}, val_fraction=0.2).classes == ("cat", "dog", "owl")
    line = refusal(tmp_path, [], {name: rows("absent.jpg,cat\n", form)}, val_fraction=0.2)
    assert line.startswith(f"{name} lists 22 images, but 1 of them are not in SOURCE, such as absent.jpg; ")


def objects(**fields: list[Any]) -> Files:
    """Return a table of SHORT with some fields."""
    items = [
        {"file_name": f"{n}.jpg", **{key: values[n - 1] for key, values in fields.items()}}
        for n in range(1, 7)
    ]
    return {"metadata.jsonl": "".join(json.dumps(item) + "\n" for item in items)}


PHOTOGRAPHERS = ["ann", "bob"] * 3
SEVERAL = (
    "metadata.jsonl: labels has lists or objects, and only datasets with one class per image are supporte"
)


@pytest.mark.parametrize("value", [["cat", "outdoor"], {"name": "cat"}, [["cat"]]])
def test_another_field_does_not_take_the_place_of_lists_of_labels(tmp_path: Path, value: Any) -> None:
    files = objects(labels=[value] * 6, photographer=PHOTOGRAPHERS)
    line = refusal(tmp_path, [SHORT], files, val_fraction=0.4)
    assert line.startswith(SEVERAL)
    assert line.endswith("; set dataset.labels='metadata.jsonl:COLUMN' if another column has the classes")
    assert refusal(tmp_path, [], labels="metadata.jsonl:labels").startswith(SEVERAL)
    found = find(tmp_path, [], labels="metadata.jsonl:photographer", val_fraction=0.4)
    assert found.classes == ("ann", "bob")


def test_another_field_does_not_take_the_place_of_lists_with_an_unknown_name(tmp_path: Path) -> None:
    files = objects(categories=[["cat"]] * 6, photographer=PHOTOGRAPHERS)
    line = refusal(tmp_path, [SHORT], files, val_fraction=0.4)
    assert line.startswith("metadata.jsonl: categories has lists or objects, and only")
    found = find(tmp_path, [], labels="metadata.jsonl:photographer", val_fraction=0.4)
    assert found.classes == ("ann", "bob")


def test_a_list_of_one_label_is_that_label(tmp_path: Path) -> None:
    labels = [["cat"], ["dog"], ["cat"], "dog", [], None]
    found = find(tmp_path, [SHORT], objects(labels=labels, photographer=PHOTOGRAPHERS), val_fraction=0.5)
    assert found.classes == ("cat", "dog")
    assert found.skipped["no class in metadata.jsonl"] == 2


@pytest.mark.parametrize("other", ["labels", "boxes"])
@pytest.mark.parametrize("value", [["cat", "dog"], ["outdoor"], []])
def test_lists_beside_a_column_of_classes_change_nothing(
    tmp_path: Path, other: str, value: list[str]
) -> None:
    files = objects(label=["cat", "dog"] * 3, **{other: [value] * 6})
    assert find(tmp_path, [SHORT], files, val_fraction=0.5).classes == ("cat", "dog")


def table(*labels: str) -> Files:
    return {"labels.csv": "file,label\n" + "".join(f'{n}.jpg,"{name}"\n' for n, name in enumerate(labels, 1))}


@pytest.mark.parametrize("joined", ["cat;dog", "dog; cat", "cat|dog", "cat | dog"])
def test_several_classes_in_one_cell_are_refused(tmp_path: Path, joined: str) -> None:
    assert refusal(tmp_path, [SHORT], table("cat", "dog", "cat", "dog", joined, joined)) == (
        f"labels.csv has several classes for one image, such as {joined}; only datasets with one class per "
        "image are supported"
    )


@pytest.mark.parametrize("joined", ["tiger,cat", "tiger, cat", "cat/tiger", "tiger cat"])
def test_what_may_be_several_classes_or_one_is_a_warning(tmp_path: Path, joined: str) -> None:
    found = find(tmp_path, [SHORT], table("cat", "tiger", "cat", "tiger", joined, joined), val_fraction=0.4)
    assert set(found.classes) == {"cat", "tiger", joined}
    assert found.warnings == (
        f"{joined!r} is taken as a class, though its parts are classes, too; only datasets with one class "
        "per image are supported",
    )


@pytest.mark.parametrize("other", ["great white shark, white shark", "F/A-18", "a; b", "a|b", "tiger cat"])
def test_names_with_delimiters_are_classes(tmp_path: Path, other: str) -> None:
    found = find(tmp_path, [SHORT], table("cat", "dog", "cat", "dog", other, other), val_fraction=0.4)
    assert set(found.classes) == {"cat", "dog", other}
    assert found.warnings == ()
