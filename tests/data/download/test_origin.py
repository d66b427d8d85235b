"""Where archives come from: folders, links and file: URLs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_imagenet.config.dataset import Archive, Dataset
from hpc_imagenet.data.download.origin import has_archives, has_at_most, source_folder
from hpc_imagenet.errors import UserError


def dataset_of(source: str, kind: str = "images") -> Dataset:
    files = {"train": "train.tar", "val": "val.tar", "test": "test.tar", "devkit": "labels.json"}
    archives = {split: Archive(file) for split, file in files.items()}
    return Dataset(name="x", source=source, format=kind, archives=archives)


@pytest.mark.parametrize("source", ["file:/data/x", "file:///data/x", "file://localhost/data/x", "/data/x"])
def test_a_file_url_is_a_folder(source: str) -> None:
    assert source_folder(dataset_of(source)) == Path("/data/x")


def test_a_file_url_with_a_host_is_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.source=file://data/x: write file:///FOLDER, or"):
        source_folder(dataset_of("file://data/x"))


def test_the_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(UserError, match="no user's home folder here"):
        source_folder(dataset_of("~nosuchuser/x"))


def test_one_file_named_as_an_archive_beside_images_is_no_set_of_archives(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text("{}")
    assert has_archives(tmp_path, dataset_of("x", "ilsvrc"))
    assert not has_archives(tmp_path, dataset_of("x"))
    for file in ("train.tar", "val.tar", "test.tar"):
        (tmp_path / file).touch()
    assert has_archives(tmp_path, dataset_of("x"))


def test_linked_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for number in range(5):
        (tmp_path / "far" / str(number)).touch()
    (tmp_path / "near").mkdir()
    (tmp_path / "near/train").symlink_to(tmp_path / "far")
    assert has_at_most(tmp_path / "near", 6)
    assert not has_at_most(tmp_path / "near", 5)
    (tmp_path / "near/up").symlink_to(tmp_path / "near")
    assert not has_at_most(tmp_path / "near", 100)
