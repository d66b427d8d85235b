"""Names of val images in class folders: the labels must follow them."""

from __future__ import annotations

import os
from pathlib import Path

from labelled_folders import pixels
from run_stage import config_of, run_stage
from sample_images import encoded

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.stages.work import download, process

WIDTHS = {"cat": 16, "cat_big": 24, "dog": 32}  # px: identify the class of an image


def make_dataset(workspace: Path, names: dict[str, list[bytes]]) -> DatasetReader:
    """Make a dataset of class folders with these val images, each as wide as its class says."""
    for split in ("train", "val"):
        for wnid, files in names.items():
            folder = workspace / "source" / split / wnid
            folder.mkdir(parents=True)
            for file in files if split == "val" else [b"1.jpg"]:
                (folder / os.fsdecode(file)).write_bytes(encoded(size=(WIDTHS[wnid], 12)))
    config = config_of(workspace, workspace / "source")
    run_stage(download, config)
    run_stage(process, config)
    return DatasetReader(workspace / "datasets" / config.dataset.name)


def labelled_widths(reader: DatasetReader) -> list[tuple[int, int]]:
    """Return (label, width in px) of each val image."""
    images = reader.open_split("val")
    read = [images.read(i) for i in range(len(images))]
    return sorted((label, pixels(data).shape[1]) for data, label in read)


def test_labels_follow_names_that_are_not_utf8(tmp_path: Path) -> None:
    # As text, the first name is behind the second one; as bytes it is before.
    reader = make_dataset(tmp_path, {"cat": [b"\xe01.jpg"], "dog": ["日1.jpg".encode()]})
    assert labelled_widths(reader) == [(0, WIDTHS["cat"]), (1, WIDTHS["dog"])]


def test_val_names_that_are_equal_with_the_class_before_them(tmp_path: Path) -> None:
    reader = make_dataset(
        tmp_path, {"cat": [b"big_1.jpg", b"1.jpg"], "cat_big": [b"1.jpg"], "dog": [b"2.jpg"]}
    )
    widths = [WIDTHS[name] for name in ("cat", "cat", "cat_big", "dog")]
    assert labelled_widths(reader) == list(zip((0, 0, 1, 2), widths, strict=True))
