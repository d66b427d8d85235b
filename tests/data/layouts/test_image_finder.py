"""Labelled images are found in the layouts of published datasets."""

from __future__ import annotations

from pathlib import Path

import pytest
from collected_layouts import COLLECTED
from research_layouts import RESEARCH
from sample_folders import Files, Sample, dataset_of, find, refusal, write_sample

from hpc_imagenet.data.layouts.image_finder import LabelledImages, find_images

AB = "{a,b}/{1..4}.jpg"
SAMPLES = {build.__name__: build for build in (*RESEARCH, *COLLECTED)}


def classes_by_path(found: LabelledImages, split: str) -> dict[str, str]:
    return {file.path: found.classes[file.label] for file in found.splits[split]}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_layout_is_found(tmp_path: Path, name: str) -> None:
    sample = SAMPLES[name]()
    root = write_sample(tmp_path / "data", sample)
    found = find_images(root, dataset_of(**sample.settings), 4)
    assert found.classes == tuple(sample.classes.split("|"))
    assert tuple(len(found.splits[split]) for split in ("train", "val", "test")) == sample.counts
    assert sample.skipped.items() <= found.skipped.items()
    assert sample.warning in " ".join(found.warnings)
    listed = [(split, file) for split, files in found.splits.items() for file in files]
    assert len({file.path for _, file in listed}) == len(listed)
    for _, file in listed:
        stat = (root / file.path).stat()
        assert (file.size, file.time) == (stat.st_size, stat.st_mtime_ns)
    assert find_images(root, dataset_of(**sample.settings), 1) == found


@pytest.mark.slow
def test_labels_of_lists_and_tables_are_those_of_their_images(tmp_path: Path) -> None:
    for name, split, expected in (
        ("tiny_imagenet", "val", {"val_0": "n01443537", "val_1": "n01629819"}),
        ("cub_200", "test", {"Black_footed_Albatross_1": "001.Black_footed_Albatross"}),
        ("stanford_cars", "train", {"00001": "Acura RL Sedan 2012", "00002": "AM General Hummer SUV 2000"}),
        ("oxford_pets", "val", {"american_bulldog_3": "american_bulldog"}),
        ("flowers_102", "train", {"image_00002": "2", "image_00003": "10"}),
        ("places_365", "val", {"Places365_val_00000002": "alley", "Places365_val_00000003": "barn"}),
        ("gtsrb", "val", {"00001": "00014", "00002": "00000"}),
        ("fgvc_aircraft", "test", {"1034009": "F/A-18"}),
        ("kaggle_images_and_csv", "train", {"3": "3", "5": "1"}),
        ("inaturalist_2018", "val", {"5": "Quercus alba", "6": "Parus major"}),
        ("ham_10000", "train", {"ISIC_0024306": "nv", "ISIC_0024307": "bkl"}),
    ):
        sample = SAMPLES[name]()
        found = find_images(write_sample(tmp_path / name, sample), dataset_of(**sample.settings), 2)
        labels = {Path(path).stem: label for path, label in classes_by_path(found, split).items()}
        labels |= {Path(path).stem: label for path, label in classes_by_path(found, "val").items()}
        assert expected.items() <= labels.items(), name


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_sample(tmp_path / "elsewhere", Sample(["{1..4}.jpg"], "", (0, 0, 0)))
    write_sample(tmp_path / "data", Sample(["a/{1..4}.jpg"], "", (0, 0, 0)))
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    found = find(tmp_path / "data", [], val_fraction=0.25)
    assert found.classes == ("a", "b")
    assert [len(files) for files in found.splits.values()] == [6, 2, 0]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample([AB], "", (0, 0, 0)))
    (tmp_path / "a/here").symlink_to(".")
    (tmp_path / "a/other").symlink_to("../b")
    (tmp_path / "b/other").symlink_to("../a")
    (tmp_path / "itself").symlink_to("itself")
    found = find(tmp_path, [], val_fraction=0.25)
    assert found.classes == ("a", "b")
    assert found.skipped["folder of the system"] >= 2


def test_classes_without_training_images_are_left_out_of_all_splits(tmp_path: Path) -> None:
    images = ["{train,val,test}/{a,b}/{1..2}.jpg", "{val,test}/c/1.jpg"]
    found = find(tmp_path, images, {"train/d/": ""}, empty_classes="skip")
    assert found.classes == ("a", "b")
    assert [len(files) for files in found.splits.values()] == [4, 4, 4]
    assert found.skipped == {"class without training images": 2}
    assert found.warnings == ("left out, as there are no training images: c, d",)


def test_a_class_folder_of_photos_that_are_not_decoded_is_not_dropped(tmp_path: Path) -> None:
    files: Files = {"owl/IMG_1.HEIC": "x", "owl/IMG_1.MOV": "x", "docs/plan.svg": "x", "docs/a.tif.txt": "x"}
    assert refusal(tmp_path, [AB], files, val_fraction=0.25) == (
        "SOURCE has no training images of owl; add images, convert the .heic files, which Pillow does not "
        "decode, move their folder out of SOURCE if it is no class, or set "
        "dataset.empty_classes=skip to leave these classes out of all splits"
    )
    found = find(tmp_path, [], empty_classes="skip", val_fraction=0.25)
    assert found.classes == ("a", "b")
    assert found.warnings[0] == "left out, as there are no training images: owl"
    (tmp_path / "owl/IMG_1.HEIC").unlink()
    (tmp_path / "owl/IMG_1.MOV").unlink()
    assert "images of owl; add images, or set dataset.empty" in refusal(tmp_path, [], val_fraction=0.25)


def test_a_class_without_val_images_is_reported(tmp_path: Path) -> None:
    found = find(tmp_path, ["{train,val}/{a,b}/{1..2}.jpg", "train/c/1.jpg"])
    assert found.classes == ("a", "b", "c")
    assert found.warnings == ("no val images of c",)


def test_equal_names_in_other_unicode_forms_are_one_class(tmp_path: Path) -> None:
    found = find(tmp_path, ["train/{café,b}/{1..2}.jpg", "val/{cafe\u0301,b}/1.jpg"])
    assert found.classes == ("b", "café")
    assert len(found.splits["val"]) == 2


def test_splits_beside_other_folders_are_found(tmp_path: Path) -> None:
    found = find(tmp_path, [f"data/{{train,val}}/{AB}", "docs/figure.png", "cover.png"])
    assert found.classes == ("a", "b")
    assert found.warnings == ("not used: docs; the splits are data/train, data/val",)
    assert found.skipped == {"beside the splits and classes": 2}


def test_a_table_with_equal_names_in_train_and_test_labels_train(tmp_path: Path) -> None:
    table = "id,label\n1,a\n2,b\n3,a\n4,b\n"
    found = find(tmp_path, ["{train,test}/{1..4}.png"], {"labels.csv": table}, val_fraction=0.5)
    assert [len(files) for files in found.splits.values()] == [2, 2, 0]
    assert found.skipped["test image without a class"] == 4


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = [f'{{"file_name": "{n}.jpg", "label": "{"ab"[n % 2]}"}}\n' for n in range(1, 5)]
    rows += ['{"file_name": "5.jpg", "label": null}\n', '{"file_name": "6.jpg", "label": NaN}\n']
    found = find(tmp_path, ["{1..6}.jpg"], {"metadata.jsonl": "".join(rows)}, val_fraction=0.5)
    assert found.classes == ("a", "b")
    assert found.skipped["no class in metadata.jsonl"] == 2


def test_a_line_of_a_table_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    rows = [
        f'{{"file_name": "{n}.jpg", "note": {{}}, "label": "\u2028{"ab"[n % 2]}"}}\r\n' for n in range(1, 5)
    ]
    found = find(tmp_path / "json", ["{1..4}.jpg"], {"metadata.jsonl": "".join(rows)}, val_fraction=0.5)
    assert found.classes == ("a", "b")
    text = "".join(f"{n}.jpg a\x85{n % 2}\n" for n in range(1, 5))
    found = find(tmp_path / "list", ["{1..4}.jpg"], {"labels.txt": text}, val_fraction=0.5)
    assert found.classes == ("a\x850", "a\x851")


def test_class_folders_of_one_letter_keep_it(tmp_path: Path) -> None:
    images = ["{A,B,C}/person{1,2}/{1..2}.jpg"]
    found = find(tmp_path, images, labels="folder:path", val_fraction=0.5)
    assert found.classes == ("A/person1", "A/person2", "B/person1", "B/person2", "C/person1", "C/person2")
    assert find(tmp_path, [], labels="folder:1", val_fraction=0.5).classes == ("A", "B", "C")


def test_a_delimiter_at_the_end_of_rows_is_no_value(tmp_path: Path) -> None:
    rows = "1.jpg,a,\n2.jpg,b,\n3.jpg,a,\n4.jpg,b,\n"
    for name, text in (("t.csv", f"file,label\n{rows}"), ("t.txt", rows)):
        found = find(tmp_path / name, ["{1..4}.jpg"], {name: text}, val_fraction=0.5)
        assert found.classes == ("a", "b")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("test.txt", "b/3.jpg,1,2,3\nb/4.jpg,4,5,6\n"),
        ("test.txt", "b/3.jpg 1\n" * 100 + "b/4.jpg\n"),
        ("test.csv", "file,note\nb/3.jpg,old\nb/4.jpg,old, torn\n"),
        ("test.csv", "file,note,year\nb/3.jpg,old,1999\nb/4.jpg\n"),
    ],
)
def test_only_the_paths_of_a_list_beside_class_folders_matter(tmp_path: Path, name: str, rows: str) -> None:
    found = find(tmp_path, [AB], {name: rows}, val_fraction=0.5)
    assert list(classes_by_path(found, "test")) == ["b/3.jpg", "b/4.jpg"]
    assert found.layout.startswith("class folders, splits by lists")


def test_a_table_may_have_paths_of_another_machine(tmp_path: Path) -> None:
    rows = "".join(f"C:\\photos\\img\\{n}.jpg;{('cat', 'dog')[n % 2]}\n" for n in range(1, 5))
    found = find(tmp_path, ["img/{1..4}.jpg"], {"labels.csv": rows}, labels="labels.csv:2", val_fraction=0.5)
    assert found.classes == ("cat", "dog")
    assert found.layout == "classes of labels.csv: 2 classes, 2 train, 2 val"


def test_a_regular_expression_reads_classes_from_file_names(tmp_path: Path) -> None:
    found = find(
        tmp_path, ["2020-{cat,dog}-{1..4}.jpg"], labels="filename:[0-9]+-([a-z]+)", val_fraction=0.25
    )
    assert found.classes == ("cat", "dog")
    assert found.layout == "classes in file names: 2 classes, 6 train, 2 val"


def test_skipped_files_are_counted_by_reason(tmp_path: Path) -> None:
    system = [
        "train/a/Thumbs.db",
        "train/a/._1.jpg",
        "train/.DS_Store",
        "val/b/desktop.ini",
        "__MACOSX/a/1.jpg",
    ]
    files: Files = {**dict.fromkeys(system, "x"), ".ipynb_checkpoints/1.jpg": "x", "train/a/about.txt": "x"}
    found = find(tmp_path, [f"{{train,val}}/{AB}", "train/cover.jpg"], files)
    assert found.skipped == {
        "beside the splits and classes": 1,
        "file of the system": 4,
        "folder of the system": 2,
        "not an image (.txt)": 1,
    }


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_the_line_in_which_excel_marks_the_delimiter_is_read(tmp_path: Path, delimiter: str) -> None:
    rows = "".join(f"{n}.jpg{delimiter}a, {n % 2}\r\n" for n in range(1, 5))
    text = f"sep={delimiter}\r\nfile{delimiter}label\r\n{rows}"
    found = find(tmp_path, ["{1..4}.jpg"], {"labels.csv": text}, val_fraction=0.5)
    assert found.classes == ("a, 0", "a, 1")
