"""The names of parquet shards: all of one export are needed, of train and of validation."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_stage import config_of, stage_error
from sample_folders import expand

from hpc_imagenet.data.sources.parquet_source import find_parquet_shards
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.work import download

TRAIN = "train-{00000..00011}-of-00012.parquet"
VAL = "validation-00000-of-00001.parquet"


def write_empty(folder: Path, *patterns: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (name for pattern in patterns for name in expand(pattern)):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [
        (TRAIN, VAL),
        ("train-{00001..00012}-of-00012.parquet", "val-0.parquet"),
        ("train-{00000..00001}-of-00002-0a1b.parquet", VAL),
        ("train-{clean,noisy}-0000{0,1}-of-00002.parquet", VAL),
        ("train-{a,b}.parquet", VAL),
    ],
)
@pytest.mark.parametrize("folder", ["", "data"])
def test_all_shards_are_found(tmp_path: Path, names: tuple[str, ...], folder: str) -> None:
    write_empty(tmp_path / folder, *names)
    shards = find_parquet_shards(tmp_path)
    assert shards
    assert [path.name for path in shards["train"]] == sorted(expand(names[0]))
    assert [path.name for path in shards["val"]] == [names[1]]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (
            ("train-{00000..00009}-of-00012.parquet", VAL),
            ": train has 10 of 12 shards, the first missing is train-00010-of-00012; fetch the missing ones",
        ),
        (
            (TRAIN, "validation-00001-of-00003.parquet"),
            ": validation has 1 of 3 shards, the first missing is ",
        ),
        (
            (TRAIN, VAL, "train-{00000..00001}-of-00002.parquet"),
            " has two exports of train, as train-00000-of-00002.parquet and train-00011-of-00012.parquet; ",
        ),
        (
            ("train-00000-of-00001-{0a,1b}.parquet", VAL),
            " has two exports of train, as train-00000-of-00001-0a.parquet and train-00000-of-00001-1b",
        ),
        (
            (TRAIN, VAL, "train-0.parquet"),
            " has two exports of train, as train-0.parquet and train-00000-of-",
        ),
        ((TRAIN, VAL, "val-0.parquet"), " has two exports of val, as val-0.parquet and validation-00000-of"),
        (
            (TRAIN, "test-00000-of-00001.parquet"),
            " has train-*.parquet, but no validation-*.parquet; rename test-* to validation-* if its images "
            "have labels, or write class folders and set dataset=images",
        ),
        ((TRAIN,), " has train-*.parquet, but no validation-*.parquet; fetch them, or write class folders"),
        ((VAL,), " has validation-*.parquet, but no train-*.parquet; fetch them"),
    ],
)
def test_a_part_of_the_shards_is_refused(tmp_path: Path, names: tuple[str, ...], problem: str) -> None:
    for folder in (tmp_path, tmp_path / "export/data"):
        write_empty(folder, *names)
        with pytest.raises(UserError) as caught:
            find_parquet_shards(tmp_path / "export" if "export" in folder.parts else folder)
        assert str(caught.value).startswith(f"{folder}{problem}")


def test_other_folders_have_no_shards(tmp_path: Path) -> None:
    assert find_parquet_shards(write_empty(tmp_path, "test-0.parquet", "other.parquet")) is None


@pytest.mark.slow
def test_a_download_refuses_shards_without_validation(tmp_path: Path) -> None:
    source = write_empty(tmp_path / "source", "{train,test}-00000-of-00001.parquet")
    assert "but no validation-*.parquet; rename test-*" in stage_error(download, config_of(tmp_path, source))
