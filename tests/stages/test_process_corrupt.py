"""The process stage with corrupt images that are left out: what must be left, and the labels of val."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from run_stage import config_of, run_stage, stage_error
from sample_images import encoded, jpeg

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.stages.work import download, process

BITS = random.Random(5)
BAD = b"no image"
NO_TABLES = encoded(size=(64, 64)).replace(b"\xff\xdb", b"\xff\xfe")  # header and end marker are intact


def archives(workspace: Path, train: dict[str, list[bytes]], val: list[bytes], layout: str) -> Config:
    """Download archives of these images; the labels of val repeat the classes in turn."""
    source = workspace / "source"
    source.mkdir()
    synsets = [Synset(number, wnid, f"word {number}") for number, wnid in enumerate(train, 1)]
    ilsvrc_writer.write_train(source / ilsvrc_writer.TRAIN, list(train.items()))
    ilsvrc_writer.write_val(source / ilsvrc_writer.VAL, val)
    truth = [1 + i % len(train) for i in range(len(val))]
    ilsvrc_writer.write_devkit(source / ilsvrc_writer.DEVKIT, synsets, truth)
    ilsvrc_writer.write_md5sums(source)
    config = config_of(workspace, source, layout=layout)
    config.process.on_corrupt = "skip"
    run_stage(download, config)
    return config


def good(number: int) -> list[bytes]:
    return [jpeg(BITS) for _ in range(number)]


@pytest.mark.parametrize("layout", ["index", "shards", "folders"])
def test_corrupt_images_must_not_empty_a_class_or_a_split(tmp_path: Path, layout: str) -> None:
    (tmp_path / "train").mkdir()
    config = archives(tmp_path / "train", {"n1": good(2), "n2": [BAD, BAD], "n3": good(1)}, good(3), layout)
    error = stage_error(process, config)
    assert "all training images of n2 are corrupt, and process.on_corrupt=skip would leave none" in error
    (tmp_path / "val").mkdir()
    config = archives(tmp_path / "val", {"n1": good(2), "n2": [BAD, *good(1)]}, [BAD, BAD], layout)
    assert "all images of val are corrupt" in stage_error(process, config)
    assert not list(tmp_path.glob("*/datasets/*/manifest.json"))


@pytest.mark.slow
def test_images_found_corrupt_while_shards_are_written_must_not_empty_a_class(tmp_path: Path) -> None:
    config = archives(tmp_path, {"n1": good(2), "n2": [NO_TABLES]}, good(2), "shards")
    config.process.resize = "short:20"
    assert "all training images of n2 are corrupt" in stage_error(process, config)
    assert not list(tmp_path.glob("datasets/*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["index", "shards", "folders"])
def test_meta_bin_has_the_labels_of_the_images_that_are_left(tmp_path: Path, layout: str) -> None:
    val = [good(1)[0], BAD, *good(3)]  # of the classes n1, n2, n1, n2, n1
    config = archives(tmp_path, {"n1": good(2), "n2": good(2)}, val, layout)
    assert run_stage(process, config)["val"] == 4
    for folder in (".", "val") if layout == "folders" else (".",):
        meta = torch.load(tmp_path / "datasets/numbers" / folder / "meta.bin", weights_only=True)
        assert meta[1] == ["n1", "n1", "n2", "n1"]
