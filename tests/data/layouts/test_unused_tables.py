"""Tables that cannot be matched to images or read are named, in an error with what to do or in a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_folders import Files, Text, find, refusal

AB = "{a,b}/{1..4}.jpg"


@pytest.mark.parametrize(
    ("name", "text", "begin"),
    [
        ("labels.csv", "# by me\nfile,label\n1.jpg,a\n", "'# by me' and 'file,label'"),
        ("labels.csv", "file,label\nA.JPG,a\n", "'file,label' and 'A.JPG,a'"),
        ("labels.txt", "A.JPG a\n", "'A.JPG a'"),
        ("labels.csv", "", "nothing"),
    ],
)
@pytest.mark.parametrize("images", ["{1..4}.jpg", "photos/{1..4}.jpg", "img{1,2}/{1..4}.jpg"])
def test_a_table_that_names_no_image_is_shown(
    tmp_path: Path, images: str, name: str, text: str, begin: str
) -> None:
    assert refusal(tmp_path, [images], {name: text, "unread.xlsx": "x"}).endswith(
        f"; {name} has no column of names such as 1.jpg beside one of classes, it begins with {begin}"
    )


@pytest.mark.parametrize("name", ["labels.parquet", "labels.xlsx"])
def test_a_table_in_another_format_is_to_be_saved_as_csv(tmp_path: Path, name: str) -> None:
    binary: Text = b"PAR1\xff"
    assert refusal(tmp_path / "flat", ["{1..4}.jpg"], {name: binary}).endswith(
        f"; {name} is not read, save it as .csv"
    )
    files: Files = {name: binary, "meta/t.csv": "x"}
    for settings in ({"labels": name}, {"labels": f"{name}:label"}, {"splits": {"val": name}}):
        assert refusal(tmp_path / "folders", [AB], files, **settings) == (
            f"SOURCE/{name}: tables and lists are read from text, not from {Path(name).suffix}; save it as "
            ".csv"
        )
    line = refusal(tmp_path / "folders", [], labels="t.csv")
    assert line == "dataset.labels=t.csv: no such file in SOURCE; did you mean: meta/t.csv"


@pytest.mark.parametrize("header", ["patient_id,split", "epoch,phase"])
def test_splits_of_a_table_that_names_no_image_are_a_warning(tmp_path: Path, header: str) -> None:
    column = header.rpartition(",")[2]
    files: Files = {"info.csv": f"{header}\n7,train\n8,val\n"}
    found = find(tmp_path / "named", [AB], files, val_fraction=0.25)
    assert found.warnings == (f"not used: info.csv has splits in its column {column}, but names no image",)
    same: Files = {"info.csv": f"{header}\n7,train\n8,train\n"}
    assert find(tmp_path / "one_split", [AB], same, val_fraction=0.25).warnings == ()
