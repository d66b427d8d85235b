"""Labelled images through download and process: names of people, any format, test split, EXIF orientation."""

from __future__ import annotations

import random
import shutil
import tarfile
from pathlib import Path

import killing
import numpy as np
import pytest
from labelled_folders import add, config_of, pixels, rotated, use
from run_stage import run_of, run_stage, stage_error
from sample_images import encoded

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.layouts.image_finder import ImageFile, LabelledImages
from hpc_imagenet.data.prepare.verify import verify_dataset
from hpc_imagenet.data.sources.labelled_images_source import member_names
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.stages.work import download, process
from hpc_imagenet.training.loading.decode import EncodedImage

NAMES = ("2", "10", "café, au lait", "=1+1 [red]", "a/b\x1b[31m", "日本")
FORMATS = {
    "jpg": "JPEG",
    "png": "PNG",
    "gif": "GIF",
    "webp": "WEBP",
    "bmp": "BMP",
    "tif": "TIFF",
    "jp2": "JPEG2000",
}


def small_folder(root: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> LabelledImages:
    """Write images of all formats; in each class there are two that differ only in their extension."""
    found: dict[str, list[ImageFile]] = {"train": [], "val": [], "test": []}
    for split in splits:
        for label in range(len(NAMES)):
            for number, (ending, kind) in enumerate(FORMATS.items()):
                data = encoded(kind, size=(16 + label, 12 + number))
                add(root, found, split, f"{split}/{label}/{number // 2}.{ending}", label, data)
    return LabelledImages(root, "a folder of [b]tests[/b]", NAMES, found, {"Thumbs.db": 2}, ("look",))


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabelledImages:
    return use(small_folder(tmp_path / "source"), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["index", "shards", "folders"])
def test_every_image_arrives_with_its_label(
    tmp_path: Path, found: LabelledImages, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, found.root, layout)
    run_stage(download, config)
    printed = capsys.readouterr().out
    assert "contains a folder of [b]tests[/b]: making archives of them" in printed
    assert "left out, Thumbs.db: 2" in printed
    assert "warning: look" in printed
    result = run_stage(process, config)
    assert (result["train"], result["val"], result["test"], result["classes"]) == (42, 42, 42, 6)
    folder = tmp_path / "datasets" / "numbers"
    reader = DatasetReader(folder)
    assert [category.names for category in reader.manifest.classes] == [
        ("2",), ("10",), ("café, au lait",), ("=1+1 [red]",), ("a/b%1B[31m",), ("日本",)
    ]  # fmt: skip
    assert reader.manifest.classes[4].wnid == "a%2Fb%1B[31m"
    for split, files in found.splits.items():
        stored = sorted(reader.open_split(split))
        assert stored == sorted(((found.root / file.path).read_bytes(), file.label) for file in files)
        for data, label in stored:
            image = EncodedImage(data)
            assert image.width == 16 + label
            np.testing.assert_array_equal(image.pixels((0, 0, image.width, image.height)), pixels(data))
    report = verify_dataset(folder, quick=False, workers=2)
    assert report.problems == []
    page = (folder / "certificate.md").read_text()
    assert "| 3 | =1+1 \\[red\\] | =1+1 \\[red\\] | 7 | 7 | 7 |" in page
    assert "- left out, Thumbs.db: 2" in page
    assert "neither JPEG nor PNG | 30 | 30 | 30 |" in page
    if layout == "folders":
        assert len(list((folder / "test" / "café, au lait").iterdir())) == 7


@pytest.mark.slow
@pytest.mark.parametrize("splits", [("train",), ("train", "val"), ("train", "test")])
def test_absent_split_is_left_out(
    tmp_path: Path, splits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = use(small_folder(tmp_path / "source", splits), monkeypatch)
    config = config_of(tmp_path, found.root, "folders")
    run_stage(download, config)
    assert (tmp_path / "archives/numbers/test.tar").exists()
    run_stage(process, config)
    folder = tmp_path / "datasets" / "numbers"
    assert tuple(DatasetReader(folder).manifest.splits) == splits
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(splits)
    assert verify_dataset(folder, quick=False, workers=1).problems == []


@pytest.mark.slow
def test_archives_can_be_taken_from_another_workspace(tmp_path: Path, found: LabelledImages) -> None:
    run_stage(download, config_of(tmp_path / "one", found.root))
    config = config_of(tmp_path / "two", tmp_path / "one/archives/numbers")
    run_stage(download, config)
    assert run_stage(process, config)["images"] == 126
    damaged = tmp_path / "one/archives/numbers/labels.json"
    damaged.write_text(damaged.read_text().replace('"val": [', '"val": [9, '))
    assert "not a labels.json of this package" in stage_error(
        download, config_of(tmp_path / "three", damaged.parent)
    )


@pytest.mark.slow
def test_other_settings_are_not_taken_for_the_same_archives(tmp_path: Path, found: LabelledImages) -> None:
    config = config_of(tmp_path, found.root)
    run_stage(download, config)
    config.dataset.val_fraction = 0.25
    error = stage_error(download, config)
    assert '"val_fraction": 0.25' in error
    assert "; set another dataset.name, or remove " in error


@pytest.mark.slow
@pytest.mark.parametrize("check", ["header", "decode"])
def test_corrupt_images_of_any_format_are_found(
    tmp_path: Path, found: LabelledImages, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {split: list(files) for split, files in found.splits.items()}
    for ending in FORMATS:
        data = encoded(FORMATS[ending], size=(60, 50))
        add(found.root, splits, "test", f"test/1/cut.{ending}", 1, data[: len(data) // 2])
    use(LabelledImages(found.root, "x", NAMES, splits), monkeypatch)
    config = config_of(tmp_path, found.root)
    config.process.check = check
    run_stage(download, config)
    assert "set process.on_corrupt=skip" in stage_error(process, config)
    config.process.on_corrupt = "skip"
    result = run_stage(process, config)
    assert (result["test"], result["skipped"]) == (42, 7)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["index", "shards", "folders"])
def test_long_names_are_reported_in_full(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: dict[str, list[ImageFile]] = {"val": [], "test": []}
    classes = ("é" * 60, "日" * 50)
    for label in range(2):
        for number in range(3):
            add(tmp_path / "source", splits, "train", f"{label}/{'ü' * 49}{number}.jpg", label, encoded())
    use(LabelledImages(tmp_path / "source", "x", classes, splits), monkeypatch)
    config = config_of(tmp_path, tmp_path / "source", layout)
    run_stage(download, config)
    config.stage.parts = 2 if layout == "shards" else 1
    if config.stage.parts > 1:  # parallel jobs share a stored scan
        for config.stage.part in range(2):
            run_stage(process, config)
        config.stage.part = None
    run_stage(process, config)
    folder = tmp_path / "datasets" / "numbers"
    train = DatasetReader(folder).open_split("train")
    names = sorted(train.name(i) for i in range(len(train)))
    assert names == sorted(2 * [f"{'ü' * 49}{number}.jpg" for number in range(3)])
    assert verify_dataset(folder, quick=False, workers=1).problems == []


@pytest.mark.slow
def test_archives_are_the_same_after_kills_at_random_steps(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split in ("train", "val"):
        for number in range(5):
            size = (48, 32 + 16 * number + (split == "val"))
            add(source, {}, split, f"{split}/{'ab'[number % 2]}/{number}.jpg", 0, rotated(6, size))
    expected, config = config_of(tmp_path / "whole", source), config_of(tmp_path / "killed", source)
    steps = killing.run_to_step("download", expected, run_of(expected), tmp_path / "whole/archives")
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    archives = tmp_path / "killed/archives"
    for _ in range(20):
        step = rng.randint(1, steps)
        if killing.run_to_step("download", config, run_of(config), archives, step) < step:
            assert archive_bytes(config) == archive_bytes(expected)
            shutil.rmtree(archives)
    run_stage(download, config)
    assert archive_bytes(config) == archive_bytes(expected)


@pytest.mark.slow
def test_archives_are_made_again_if_their_files_have_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "source"
    for number in range(12):
        add(root, {}, "", f"{'ab'[number % 2]}/{number}.png", 0, encoded("PNG", size=(9, 9 + number)))
    config, fresh = config_of(tmp_path / "one", root), config_of(tmp_path / "two", root)
    for each in (config, fresh):
        each.dataset.val_fraction = 0.3
    run_stage(download, config)
    archives = tmp_path / "one/archives/numbers"
    with tarfile.open(archives / "val.tar") as tar:
        first = tar.getnames()[0]
    (archives / "val.tar").unlink()  # as if the first job was killed before it
    next(root.glob(f"*/{first}")).unlink()  # another image is taken for val
    capsys.readouterr()
    run_stage(download, config)
    assert f"{archives}/train.tar: the files that it was made of have changed" in capsys.readouterr().out
    run_stage(download, fresh)
    assert archive_bytes(config) == archive_bytes(fresh)

    (archives / "test.tar").unlink()
    times = {file: (archives / file).stat().st_mtime_ns for file in ("train.tar", "val.tar")}
    run_stage(download, config)  # nothing else is made again
    assert {file: (archives / file).stat().st_mtime_ns for file in times} == times


def archive_bytes(config: Config) -> dict[str, bytes]:
    found = killing.snapshot(Path(config.workspace) / "archives")
    return {name: data for name, data in found.items() if not name.endswith(".receipt.json")}


def test_member_names_are_unique_without_their_extension() -> None:
    paths = [
        "a/1.jpg",
        "b/1.jpg",
        "b/1.png",
        "x/2.jpg",
        "a_x/3.jpg",
        "a/x_3.jpg",
        f"a/{'é' * 130}.jpg",
        "c/\x1b.gif",
    ]
    names = member_names(paths)
    assert names[:3] == ["a_1.jpg", "b_1_jpg.jpg", "b_1_png.png"]
    assert names[3:6] == ["2.jpg", "3.jpg", "x_3.jpg"]
    assert names[7] == "%1B.gif"
    assert len({name.rpartition(".")[0] for name in names}) == len(names)
    assert max(len(name.encode()) for name in names) <= 255


def test_long_class_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: dict[str, list[ImageFile]] = {"val": [], "test": []}
    add(tmp_path / "source", splits, "train", "a.jpg", 0, encoded())
    use(LabelledImages(tmp_path / "source", "x", ("é" * 101,), splits), monkeypatch)
    assert "has more than 200 bytes; shorten it" in stage_error(
        download, config_of(tmp_path, tmp_path / "source")
    )
