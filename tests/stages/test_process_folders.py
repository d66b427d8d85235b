"""The process stage with process.layout=folders, in a single run and in parts."""

from __future__ import annotations

import copy
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import killing
import pytest
from run_stage import run_stage, stage_error
from test_process import config_with_archives, dataset, dataset_bytes, small, write_small
from torchvision.datasets import imagenet

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import ilsvrc_writer, scanned_archives
from hpc_imagenet.data.prepare import class_folder_writer
from hpc_imagenet.data.prepare.verify import verify_dataset
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.stages.work import process

__all__ = ["small"]  # a fixture


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Config:
    config = config_with_archives(tmp_path_factory.mktemp("folders"), source, "folders")
    assert run_stage(process, config)["images"] == 1797
    return config


@pytest.mark.slow
def test_class_folders_are_readable_by_torchvision(folders: Config) -> None:
    root = dataset(folders)
    metas = {(root / folder / "meta.bin").read_bytes() for folder in (".", "train", "val")}
    assert len(metas) == 1
    reader = DatasetReader(root)
    for split in ("train", "val"):
        expected = imagenet.ImageNet(root, split)
        index = reader.open_split(split)
        assert len(expected) == len(index)
        mine = {index.name(i): index.read(i) for i in range(len(index))}
        assert len(mine) == len(index)
        for path, label in expected.samples:
            assert (Path(path).read_bytes(), label) == mine[Path(path).name]
    assert not list(root.rglob(".*")), "a temporary file was left behind"


@pytest.mark.slow
def test_class_folders_equal_those_of_torchvision(
    folders: Config, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)
    for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT):
        shutil.copy(source / file, tmp_path)
    imagenet.parse_devkit_archive(tmp_path)
    imagenet.parse_train_archive(tmp_path)
    imagenet.parse_val_archive(tmp_path)
    for split in ("train", "val"):
        mine = killing.snapshot(dataset(folders) / split, but=("meta.bin",))
        assert mine == killing.snapshot(tmp_path / split)


@pytest.mark.slow
def test_class_folders_have_current_times_and_default_modes(folders: Config) -> None:
    umask = os.umask(0)
    os.umask(umask)
    path = next((dataset(folders) / "train").rglob("*.JPEG"))
    assert path.stat().st_mtime > time.time() - 3600, "the time of the archive, 1970, would be purged at once"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_complete_class_folders_are_not_rewritten(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, config)
    before = {path: path.stat().st_mtime_ns for path in dataset(config).rglob("n*")}
    assert len(before) == 3 * 2 + 3 * 40
    run_stage(process, config)
    assert {path: path.stat().st_mtime_ns for path in dataset(config).rglob("n*")} == before


def test_meta_bin_of_complete_class_folders_is_corrected(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, config)
    expected = dataset_bytes(config)
    (dataset(config) / "val" / "meta.bin").write_bytes(b"of an earlier version")
    run_stage(process, config)
    assert dataset_bytes(config) == expected


@pytest.mark.slow
def test_incomplete_split_is_resumed(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, config)
    expected = dataset_bytes(config)
    root = dataset(config)
    (root / "train").rename(root / ".train.partial")
    kept = root / ".train.partial" / "n1" / "n1_7.JPEG"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(root / ".train.partial" / "n0")
    (root / ".train.partial" / "n2" / "n2_0.JPEG").write_bytes(b"")  # as after a power cut
    (root / ".train.partial" / ".n0.tmp").mkdir()
    (root / ".train.partial" / ".n0.tmp" / "n0_0.JPEG").write_bytes(b"x")
    run_stage(process, config)
    assert dataset_bytes(config) == expected
    assert (root / "train" / "n1" / "n1_7.JPEG").stat().st_mtime_ns == before


@pytest.mark.slow
def test_class_folders_of_other_archives_are_replaced(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, config)
    shutil.rmtree(tmp_path / "archives")
    (tmp_path / "other").mkdir()
    write_small(tmp_path / "other", random.Random(4))
    config = config_with_archives(tmp_path, tmp_path / "other", "folders")
    run_stage(process, config)
    clean = config_with_archives(tmp_path / "clean", tmp_path / "other", "folders")
    run_stage(process, clean)
    mine, expected = dataset_bytes(config), dataset_bytes(clean)
    assert mine == expected


def test_folders_not_made_by_the_stage_are_kept(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    (dataset(config) / "val").mkdir(parents=True)
    (dataset(config) / "val" / "mine").write_text("x")
    assert "move it away" in stage_error(process, config)
    assert (dataset(config) / "val" / "mine").exists()
    assert not (dataset(config) / "manifest.json").exists()


def part_of(config: Config, part: int | None, parts: int) -> Config:
    config = copy.deepcopy(config)
    config.stage.part, config.stage.parts = part, parts
    return config


@pytest.mark.slow
def test_folders_that_killed_attempts_have_left_are_removed_by_the_next(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, part_of(config, 0, 2))
    partial = dataset(config) / ".train.partial"
    for name in (".n0.tmp", ".n0.0123456789abcdef.tmp", ".n2.0123456789abcdef.tmp"):
        (partial / name).mkdir()
        (partial / name / "n0_0.JPEG").write_bytes(b"x")
    for part in (0, 1):
        run_stage(process, part_of(config, part, 2))
    assert not list(partial.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False])
def test_class_folders_written_in_two_numbers_of_parts_at_once(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    whole = config_with_archives(tmp_path / "whole", small, "folders")
    run_stage(process, whole)
    config = config_with_archives(tmp_path / "parts", small, "folders")
    config.process.workers = 1
    real = class_folder_writer._extract

    def extract(*arguments: Any) -> None:
        monkeypatch.setattr(class_folder_writer, "_extract", real)
        for part in (0, 1, 2, None) if merged else (0, 1, 2):
            run_stage(process, part_of(config, part, 3))
        real(*arguments)

    monkeypatch.setattr(class_folder_writer, "_extract", extract)
    for part in (0, 1, None):
        run_stage(process, part_of(config, part, 2))
    assert class_folder_writer._extract is real
    assert dataset_bytes(config) == dataset_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4, 9])
def test_class_folders_in_parts_equal_a_single_run(tmp_path: Path, small: Path, parts: int) -> None:
    single = config_with_archives(tmp_path / "whole", small, "folders")
    result = run_stage(process, single)
    in_parts = config_with_archives(tmp_path / "cut", small, "folders")
    images = [run_stage(process, part_of(in_parts, part, parts))["images"] for part in range(parts)]
    assert sum(images) == 132
    assert not (dataset(in_parts) / "train").exists()
    assert not (dataset(in_parts) / "manifest.json").exists()
    assert run_stage(process, part_of(in_parts, None, parts)) == result
    assert dataset_bytes(in_parts) == dataset_bytes(single)


def test_missing_part_of_class_folders_is_reported(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, part_of(config, 0, 2))
    error = stage_error(process, part_of(config, None, 2))
    assert "1 of 3 classes are missing, the first is n1; retry" in error
    assert not (dataset(config) / "train").exists()
    run_stage(process, part_of(config, 1, 2))
    run_stage(process, part_of(config, None, 2))
    assert len(list((dataset(config) / "train").rglob("*.JPEG"))) == 120


def test_class_not_synced_to_disk_counts_as_missing(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, part_of(config, 0, 2))
    run_stage(process, part_of(config, 1, 2))
    (dataset(config) / ".folders-1-of-2.json").unlink()  # as if killed before the sync
    assert "1 of 3 classes are missing" in stage_error(process, part_of(config, None, 2))


@pytest.mark.slow
def test_class_folders_with_workers_equal_a_single_run(tmp_path: Path, small: Path) -> None:
    one, two = (config_with_archives(tmp_path / name, small, "folders") for name in ("one", "two"))
    two.process.workers = 2
    assert run_stage(process, one) == run_stage(process, two)
    assert dataset_bytes(one) == dataset_bytes(two)


def test_parts_share_one_scan(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, part_of(config, 0, 2))
    monkeypatch.setattr(
        scanned_archives, "scan", lambda *_, **__: pytest.fail("the stored scan was not used")
    )
    run_stage(process, part_of(config, 1, 2))
    (dataset(config) / ".scan.npz").write_bytes((dataset(config) / ".scan.npz").read_bytes()[:1000])
    monkeypatch.undo()
    run_stage(process, part_of(config, None, 2))
    assert len(DatasetReader(dataset(config)).open_split("val")) == 12


@pytest.mark.slow
def test_class_folders_beside_an_index_of_other_archives_are_reported(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_with_archives(tmp_path, small, "folders")
    run_stage(process, config)
    config.process.layout = "index"
    run_stage(process, config)
    assert "warning" not in capsys.readouterr().out
    assert verify_dataset(dataset(config), quick=True, workers=1).problems == []
    shutil.rmtree(tmp_path / "archives")
    (tmp_path / "other").mkdir()
    write_small(tmp_path / "other", random.Random(4))
    config = config_with_archives(tmp_path, tmp_path / "other")
    run_stage(process, config)
    warning = f"warning: train, val in {dataset(config)} are class folders of earlier archives; remove them"
    assert warning in capsys.readouterr().out
    problems = verify_dataset(dataset(config), quick=True, workers=1).problems
    assert [problem.partition(": ")[0] for problem in problems] == [
        str(dataset(config) / split) for split in ("train", "val")
    ]
    for split in ("train", "val"):
        shutil.rmtree(dataset(config) / split)
    assert verify_dataset(dataset(config), quick=True, workers=1).problems == []
