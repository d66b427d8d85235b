"""Images are turned upright by their EXIF orientation before they are archived."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from labelled_folders import add, config_of, pixels, rotated, use
from PIL import Image, ImageOps
from run_stage import run_stage

from hpc_imagenet.data.images.orientation import read_orientation
from hpc_imagenet.data.layouts.image_finder import ImageFile, LabelledImages
from hpc_imagenet.data.sources import labelled_images_source
from hpc_imagenet.data.sources.labelled_images_source import LabelledImagesSource
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.stages.work import download, process


@pytest.mark.slow
@pytest.mark.parametrize("program", [True, False])
def test_exif_orientation_is_applied_and_counted(
    tmp_path: Path, program: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if program and not shutil.which("jpegtran"):
        pytest.skip("no jpegtran (libjpeg-turbo-progs)")
    if not program:
        monkeypatch.setenv("PATH", str(tmp_path))
    splits: dict[str, list[ImageFile]] = {}
    root = tmp_path / "source"
    for value in range(1, 9):
        add(root, splits, "train", f"train/a/{value}.jpg", 0, rotated(value, (64, 48)))
        add(root, splits, "val", f"val/a/odd{value}.jpg", 0, rotated(value, (61, 45)))
        add(root, splits, "test", f"test/a/{value}.png", 0, rotated(value, (64, 48), "PNG"))
        add(root, splits, "test", f"test/a/web{value}.webp", 0, rotated(value, (64, 48), "WEBP"))
    found = use(LabelledImages(root, "x", ("a",), splits), monkeypatch)
    config = config_of(tmp_path, root)
    run_stage(download, config)
    assert ("no jpegtran on the PATH" in capsys.readouterr().out) is not program
    archives = tmp_path / "archives" / "numbers"
    labels = json.loads((archives / "labels.json").read_text())
    assert labels["oriented"] == 28
    # 2 and 4 only flip; the sides of odd images are no multiples of the blocks, which all but 5 need.
    lossy = {f"val/a/odd{value}.jpg" for value in range(2, 9) if value != 5}
    assert set(labels["reencoded"]) >= lossy
    if program:
        assert set(labels["reencoded"]) == lossy
    assert not (archives / labelled_images_source.UPRIGHT_FOLDER).exists()
    run_stage(process, config)
    reader = DatasetReader(tmp_path / "datasets" / "numbers")
    for split, files in found.splits.items():
        stored = reader.open_split(split)
        named = {stored.name(i): stored.read(i)[0] for i in range(len(stored))}
        for file in files:
            name = file.path.rsplit("/", 1)[1]
            (tmp_path / name).write_bytes(named[name])
            assert read_orientation(tmp_path / name) == 1
            expected = upright(root / file.path)
            difference = np.abs(pixels(named[name]).astype(int) - expected)
            assert difference.mean() < 2, name
    certificate = read_json(tmp_path / "datasets/numbers/certificate.json")
    assert certificate
    assert certificate["folder"]["oriented"] == 28
    page = (tmp_path / "datasets/numbers/certificate.md").read_text()
    assert "- turned upright by their EXIF orientation: 28" in page

    config = config_of(tmp_path / "off", root)
    config.dataset.orient = False
    run_stage(download, config)
    with tarfile.open(tmp_path / "off/archives/numbers/val.tar") as tar:
        for member in tar:
            extracted = tar.extractfile(member)
            assert extracted
            assert extracted.read() == (root / "val/a" / member.name).read_bytes()


def test_archives_of_turned_images_are_the_same_in_a_moved_workspace(tmp_path: Path) -> None:
    splits: dict[str, list[ImageFile]] = {"val": [], "test": []}
    add(tmp_path / "source", splits, "train", "a/1.png", 0, rotated(6, (3, 4), "PNG"))
    found = LabelledImages(tmp_path / "source", "x", ("a",), splits)
    dataset = config_of(tmp_path, found.root).dataset
    one, two = (LabelledImagesSource(found, dataset, tmp_path / name, 1).make() for name in ("one", "two"))
    assert {split: file.state for split, file in one.items()} == {
        split: file.state for split, file in two.items()
    }
    assert list((tmp_path / "one/.upright").iterdir())


def upright(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB")).astype(int)


@pytest.mark.slow
def test_killed_download_keeps_the_images_that_were_turned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: dict[str, list[ImageFile]] = {"val": [], "test": []}
    for number in range(6):
        add(tmp_path / "source", splits, "train", f"a/{number}.jpg", 0, rotated(6, (48, 32 + 16 * number)))
    found = use(LabelledImages(tmp_path / "source", "x", ("a",), splits), monkeypatch)
    run_stage(download, config_of(tmp_path / "whole", found.root))
    made = labelled_images_source.orientation.make_upright
    calls: list[int] = []
    needed: list[int] = []
    monkeypatch.setattr(
        labelled_images_source.disk, "require_free_space", lambda folder, size, *_: needed.append(size)
    )

    def make_three(data: bytes, value: int) -> tuple[bytes, bool]:
        calls.append(value)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return made(data, value)

    monkeypatch.setattr(labelled_images_source.orientation, "make_upright", make_three)
    config = config_of(tmp_path, found.root)
    config.download.connections = 1
    with pytest.raises(KeyboardInterrupt):
        run_stage(download, config)
    run_stage(download, config)
    assert len(calls) <= 8
    assert 0 < needed[1] < needed[0], "the copies that are kept need no space"
    for file in ("train.tar", "labels.json"):
        one, two = (workspace / "archives/numbers" / file for workspace in (tmp_path, tmp_path / "whole"))
        assert one.read_bytes() == two.read_bytes()
