"""What is ambiguous or incomplete among labelled images is refused in one line that names the setting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sample_folders import Files, Sample, Text, dataset_of, find, lines, refusal, write_sample

from hpc_imagenet.data.layouts.image_finder import find_images
from hpc_imagenet.errors import UserError

AB = "{a,b}/{1..4}.jpg"
SPECIES = "image,species,family,order\n1,a,x,p\n2,b,x,p\n3,a,x,q\n4,b,y,q\n"


@pytest.mark.parametrize(
    ("images", "files", "settings", "expected"),
    [
        ([f"train/{AB}"], {}, {}, "SOURCE has no validation images; set dataset.val_fraction=0.1"),
        ([AB], {}, {}, "SOURCE has no validation images; set dataset.val_fraction=0.1"),
        (
            [f"{{train,val}}/{AB}"],
            {},
            {"val_fraction": 0.1},
            "SOURCE has 8 val images already; remove dataset.val_fr",
        ),
        (
            [f"{{val,test}}/{AB}"],
            {},
            {},
            "SOURCE has test and val, but no train; set dataset.splits.train=FOLDER",
        ),
        (
            ["{1..4}.jpg"],
            {},
            {},
            "SOURCE/1.jpg is in no class folder, and no table gives its class; set data",
        ),
        (
            [f"train/{AB}", "val/{1..4}.jpg"],
            {},
            {},
            "SOURCE/val/1.jpg is in no class folder, and no table gives its",
        ),
        (
            ["{a,b}/1.jpg"],
            {},
            {"val_fraction": 0.1},
            "SOURCE has one image per class, so dataset.val_fraction",
        ),
        (
            ["{train,test,more}/{1..3}.jpg"],
            {},
            {},
            "SOURCE/train/1.jpg is in no class folder, and no table gives",
        ),
        (
            ["i/{1..2}.jpg"],
            {"t.csv": 'id,y\n1,a\n2,b\n"3\n\x1b[1m",b'},
            {},
            "t.csv lists 3 images, but 1 of them are ",
        ),
        (
            ["{train,val}/{a,b}/1.jpg", "val/\x1b[31m/1.jpg"],
            {},
            {},
            "SOURCE has no training images of %1B[31m; add",
        ),
        (
            ["img{1..3}/{1..4}.jpg"],
            {},
            {},
            "SOURCE: img1 … img3 may be classes, or parts of one set without a table of classes; set",
        ),
        (
            ["{train,val}/a/{1..4}.jpg"],
            {},
            {},
            "SOURCE/train has one class folder only, a; a class needs others",
        ),
        (
            [f"{{train,val,valid}}/{AB}"],
            {},
            {},
            "SOURCE has val and valid, and each may be val; set dataset.splits.val=val, or "
            "dataset.splits.val=val* for all",
        ),
        (
            [f"{{train,val}}/{AB}"],
            {"train/c/": ""},
            {},
            "SOURCE has no training images of c; add images, or set data",
        ),
        (
            [f"{{train,val}}/{AB}", "val/dé/1.jpg"],
            {},
            {},
            "SOURCE has no training images of dé; add images, or set",
        ),
        (
            [AB],
            {"c/": ""},
            {"val_fraction": 0.1},
            "SOURCE has no training images of c; add images, or set data",
        ),
        (
            [f"{{train,val}}/{AB}"],
            {"train/c/c.txt": "x"},
            {},
            "SOURCE has no training images of c; add images, or",
        ),
        (
            ["{oak,elm}/{leaf,bark}/{1..4}.jpg"],
            {},
            {},
            "SOURCE/elm has folders of images, such as bark; set dataset.labels=folder:1 if the class "
            "is elm, "
            "dataset.labels=folder:2 if it is bark",
        ),
        (
            ["preview/{1..3}.jpg", f"images/{AB}"],
            {},
            {},
            "SOURCE/images has folders of images, such as a; set ",
        ),
        ([f"{{x,y}}/{{train,val}}/{AB}"], {}, {}, "SOURCE has splits in x and y; set dataset.source to one"),
        ([AB], {}, {"labels": "folder:3"}, "dataset.labels=folder:3: SOURCE has fewer levels of folders"),
        (
            [AB],
            {},
            {"labels": "folder:x"},
            "dataset.labels=folder:x is not folder:1, folder:2 … or folder:path",
        ),
        ([AB], {}, {"labels": "filename:([a"}, "dataset.labels=filename:([a: unterminated character set"),
        ([AB], {}, {"labels": "filename:a"}, "dataset.labels=filename:a needs a group for the class"),
        (
            [AB],
            {},
            {"labels": "filename"},
            "dataset.labels=filename gives no image of train a class, such as a/1.jpg",
        ),
        (
            [AB],
            {"t.csv": "x"},
            {"labels": "u.csv"},
            "dataset.labels=u.csv: no such file in SOURCE; did you mean: t.csv",
        ),
        (
            [AB],
            {"t.csv": "name,x\nq,r\n"},
            {"labels": "t.csv"},
            "dataset.labels=t.csv: no column names the images",
        ),
        ([AB], {}, {"labels": "u" * 300}, f"dataset.labels={'u' * 300}: no such file in SOURCE"),
        ([AB], {}, {"splits": {"val": "u" * 300}}, f"dataset.splits.val={'u' * 300}: no such folder or list"),
        (
            ["{1..3}.jpg"],
            {"t.csv": f"id,y\n1,{'9' * 5000}\n2,b\n3,b\n"},
            {},
            f"SOURCE: the class name '{'9' * 40}' … has more than 200 bytes; shorten it",
        ),
        ([AB], {}, {"splits": {"val": "hold"}}, "dataset.splits.val=hold: no such folder or list in SOURCE"),
        (
            ["i/{1..4}.jpg"],
            {"t.csv": SPECIES},
            {"labels": "t.csv:famly"},
            "t.csv has no column famly; did you mean: fam",
        ),
        (
            ["i/{1..4}.jpg"],
            {"t.csv": SPECIES.replace("species", "kind")},
            {},
            "t.csv has the columns kind, family, order, and each may be the class; "
            "set dataset.labels='t.csv:COLUMN'",
        ),
        (
            ["i/{1..4}.jpg"],
            {"t.csv": SPECIES.replace("family", "class")},
            {},
            "t.csv has the columns class, species, and each may be the class; "
            "set dataset.labels='t.csv:COLUMN'",
        ),
        (
            ["i/{1..3}.jpg"],
            {"t.csv": SPECIES},
            {},
            "t.csv lists 4 images, but 1 of them are not in SOURCE, such as 4",
        ),
        (
            ["i/{1..2}.jpg"],
            {"t.csv": "id,y\n1,a\n2,b\n2,a"},
            {},
            "t.csv: 2 has the classes b and a; only datasets with",
        ),
        (
            ["i/{1..3}.jpg"],
            {"t.csv": "id,y\n1,a\n2,b\n3,a|b"},
            {},
            "t.csv has several classes for one image, such as a|b",
        ),
        (
            ["i/{1..2}.jpg"],
            {"t.csv": "id,y\n1,ä\n2,b".encode("latin-1")},
            {},
            "SOURCE/t.csv is not UTF-8; save it as UTF-8",
        ),
        (
            ["i/{1..3}.jpg"],
            {"t.csv": "id,y\n1,a\n2,b\n3,a", "u.csv": "id,y\n1,a\n2,b\n3,b"},
            {},
            "SOURCE has t.csv and u.csv, which differ; set dataset.labels=t.csv, or the other one",
        ),
        (
            ["{1..3}.jpg"],
            {"t.csv": "file,label\n1.jpg,crane, bird\n2.jpg,crane, machine\n3.jpg,owl\n"},
            {},
            "t.csv: row 1 has 3 columns, the first 2; put a value that has the delimiter in it in quotes",
        ),
        (
            ["{1..3}.jpg"],
            {"labels.txt": "1.jpg,crane, bird\n2.jpg,crane, machine\n3.jpg,owl, bird\n"},
            {},
            "labels.txt: line 1 has 3 values; write a path and a class, with a tab between them",
        ),
        (
            ["i/{1..4}.jpg"],
            {
                "labels.csv": "file,label,note\n1,a,\n2,b,one, two\n3,a,\n4,b,\n",
                "meta.csv": "file,camera\n1,x\n2,x\n3,y\n4,y\n",
            },
            {"val_fraction": 0.5},
            "labels.csv: row 2 has 4 columns, the first 3; put a value that has the delimiter in it in quotes"
            ", or set dataset.labels to the table of the classes",
        ),
        (
            ["i/{1..4}.jpg"],
            {"train.csv": "file,label\n1,a\n2,b\n", "val.csv": "file,label\n3,a\n4,b,c\n"},
            {},
            "val.csv: row 2 has 3 columns, the first 2; put a value that has the delimiter in it in quotes",
        ),
        (
            ["{A,B,C}/person{1,2}/{1..4}.jpg"],
            {},
            {},
            "SOURCE/A has folders of images, such as person1; set dataset.labels=folder:1 if the class",
        ),
        ([AB], {"train.txt": "1.jpg\n"}, {}, "train.txt: 1.jpg may be a/1.jpg or b/1.jpg; write its path"),
        (
            [AB],
            {"train.txt": lines("{a,b}/{1..2}.jpg"), "val.txt": lines("{a,b}/{2..3}.jpg")},
            {},
            "SOURCE/a/2.jpg is in train and in val; an image belongs to one split only",
        ),
        (
            [AB],
            {f"splits/{split}{fold}.txt": f"a/{fold}.jpg\n" for split in ("train", "val") for fold in (1, 2)},
            {},
            "SOURCE has splits/train1.txt and splits/train2.txt, which differ; set "
            "dataset.splits.train=splits/train1.txt, or the other one",
        ),
        (
            [],
            {"a.zip": "x", "b.zip": "x", "notes.txt": "x"},
            {},
            "SOURCE contains no images, but 2 .zip, 1 .txt; unpack",
        ),
        (
            [],
            {"0.parquet": "x"},
            {},
            "SOURCE contains no images, but 1 .parquet; set dataset=ilsvrc for parquet",
        ),
        ([], {}, {}, "SOURCE contains no files; set dataset.source to the folder with the images"),
        (
            ["{a,b}/{1..4}.jpg"],
            {"a/5.jpg": "", "b/6.jpg": ""},
            {"val_fraction": 0.1},
            "SOURCE: 2 images are empty files, such as a/5.jpg; replace or remove them: find SOURCE -type f",
        ),
        (
            ["summer/{1..4}.jpg"],
            {},
            {"val_fraction": 0.5},
            "SOURCE has one class folder only, summer; a class needs others beside it, unless ",
        ),
        (
            [f"train/{AB}"],
            {},
            {"splits": {"test": "train"}},
            "SOURCE has no training images; set dataset.splits.train=FOLDER",
        ),
        (
            ["train/{Cat_1,b}/{1..2}.jpg", "val/{cat 1,b}/1.jpg"],
            {},
            {},
            "SOURCE: Cat_1 of train is cat 1 elsewhere; rename one of them",
        ),
        (
            [f"{{a,{'é' * 101}}}/{{1..2}}.jpg"],
            {},
            {"val_fraction": 0.5},
            f"SOURCE: the class name '{'é' * 40}' … has more than 200 bytes; shorten it",
        ),
        ([AB], {"a/5.jpg": ""}, {"val_fraction": 0.1}, "SOURCE/a/5.jpg is empty; replace or remove it"),
        (
            ["train/{café,cafe\u0301}/1.jpg", "val/café/2.jpg"],
            {},
            {},
            r"SOURCE: 'cafe\u0301' and 'caf\xe9' are the same name in Unicode; rename one class",
        ),
    ],
)
def test_refusals_say_what_was_seen_and_which_setting_decides(
    tmp_path: Path, images: list[str], files: Files, settings: dict[str, Any], expected: str
) -> None:
    assert refusal(tmp_path / "data", images, files, **settings).startswith(expected)


def test_a_missing_folder_and_a_link_to_a_missing_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data: no such folder; set a folder with images"):
        find_images(tmp_path / "data", dataset_of(), 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file, not a folder"):
        find_images(tmp_path / "file", dataset_of(), 1)
    write_sample(tmp_path / "data", Sample([AB], "", (0, 0, 0)))
    (tmp_path / "data/a/9.jpg").symlink_to(tmp_path / "absent.jpg")
    assert "is a link to a missing file" in refusal(tmp_path / "data", [])
    for name in ("labels.csv", "imagelabels.mat"):
        write_sample(tmp_path / name, Sample(["{1..4}.jpg"], "", (0, 0, 0), {"setid.mat": "x"}))
        (tmp_path / name / name).symlink_to(tmp_path / "absent")
        assert refusal(tmp_path / name, []).startswith(f"SOURCE/{name} is a link to a missing file; restore")


CAMERAS = "{camera1,camera2}/{fox,owl}_{1..4}.jpg"


def species() -> Text:
    rows = [f"{name}_{number}.jpg,{name}" for name in ("fox", "owl") for number in range(1, 5)]
    return "\n".join(["file,animal", *(f"camera{n}/{row}" for n in (1, 2) for row in rows)])


@pytest.mark.parametrize("name", ["animals.csv", "train.csv"])
def test_a_table_that_contradicts_class_folders_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, [CAMERAS], {name: species()}, val_fraction=0.25) == (
        f"SOURCE: the class may be the folder, such as camera1, or that of {name}, column animal, such as "
        f"fox; set dataset.labels=folder:1, or dataset.labels='{name}:animal'"
    )
    assert find(tmp_path, [], val_fraction=0.25, labels=f"{name}:animal").classes == ("fox", "owl")
    assert find(tmp_path, [], val_fraction=0.25, labels="folder:1").classes == ("camera1", "camera2")


@pytest.mark.parametrize(
    ("table", "warned"),
    [
        (lines("file,animal", *(f"{name}/{n}.jpg,{name}s" for name in "ab" for n in range(1, 5))), True),
        (lines("file,label", *(f"{name}/{n}.jpg,{name}" for name in "ab" for n in range(1, 5))), False),
        (
            lines("file,classid", *(f"{name}/{n}.jpg,{name == 'b':d}" for name in "ab" for n in range(1, 5))),
            False,
        ),
        (lines("file,score", *(f"{name}/{n}.jpg,0.{n % 2}" for name in "ab" for n in range(1, 5))), False),
        (lines("file,md5", *(f"{name}/{n}.jpg,f{n}{name}" for name in "ab" for n in range(1, 5))), False),
    ],
)
def test_other_tables_beside_class_folders_change_nothing(tmp_path: Path, table: str, warned: bool) -> None:
    found = find(tmp_path, ["{a,b}/{1..4}.jpg"], {"table.csv": table}, val_fraction=0.25)
    assert found.classes == ("a", "b")
    expected = "table.csv, column animal is not used, as the folders are the classes; "
    assert [text.startswith(expected) for text in found.warnings] == [True] * warned


def test_a_class_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(["a/{1..2}.jpg"], "", (0, 0, 0)))
    try:
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (tmp_path / os.fsdecode(b"caf\xe9") / "1.jpg").write_bytes(b"x")
    assert refusal(tmp_path, [], val_fraction=0.5) == r"SOURCE: the class 'caf\udce9' is not UTF-8; rename it"
