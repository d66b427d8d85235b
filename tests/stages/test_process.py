from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import killing
import pytest
import torch
from asking import ask, config_of, refused, run_of
from filelock import FileLock, Timeout
from pictures import encoded, jpeg
from torchvision.datasets import imagenet

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import ilsvrc_writer, scan, scanned_archives
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.demo import digits
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.stages import download, process


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "digits"
    digits.write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with a handful of images each, of some thousand bytes."""
    folder = tmp_path_factory.mktemp("sources") / "small"
    folder.mkdir()
    write_small(folder, random.Random(3))
    return folder


def write_small(folder: Path, bits: random.Random) -> None:
    synsets = [Synset(3 - i, f"n{i}", f"word {i}, other {i}") for i in range(3)]
    ilsvrc_writer.write_train(
        folder / ilsvrc_writer.TRAIN,
        [(s.wnid, [jpeg(bits, bits.randrange(1, 9000)) for _ in range(40)]) for s in synsets],
    )
    ilsvrc_writer.write_val(folder / ilsvrc_writer.VAL, [jpeg(bits) for _ in range(12)])
    ilsvrc_writer.write_devkit(folder / ilsvrc_writer.DEVKIT, synsets, [1 + i % 3 for i in range(12)])
    ilsvrc_writer.write_md5sums(folder)


def downloaded(workspace: Path, source: Path, layout: str = "index") -> Config:
    config = config_of(workspace, source, layout=layout)
    ask(download, config)
    return config


def dataset(config: Config) -> Path:
    return Path(config.workspace) / "datasets" / config.dataset.name


def made(config: Config) -> dict[str, bytes]:
    """Every byte of the dataset, but for the time in the manifest."""
    files = killing.snapshot(dataset(config), but=("manifest.json",))
    manifest = json.loads((dataset(config) / "manifest.json").read_text())
    manifest.pop("created")
    return {**files, "manifest": json.dumps(manifest).encode()}


def test_index(tmp_path: Path, source: Path) -> None:
    config = downloaded(tmp_path, source)
    config.datastore.content = "abc"
    result = {"images": 1797, "train": 1437, "val": 360, "classes": 10, "skipped": 0}
    assert ask(process, config) == result
    folder = dataset(config)
    files = {"train.npy", "val.npy", "meta.bin", "certificate.json", "certificate.md", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    manifest = load_manifest(folder)
    assert (manifest.name, manifest.content, manifest.images) == ("numbers", "abc", 1797)
    assert [shard.path for shard in manifest.shards] == [
        f"../../archives/numbers/{file}" for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)
    ]
    sums = dict(reversed(line.split()) for line in (source / "md5sums").read_text().splitlines())
    assert [shard.hash for shard in manifest.shards] == [
        f"md5:{sums[f]}" for f in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)
    ]
    assert manifest.provenance["archives"] == sums
    for file in manifest.all_files()[2:]:
        found = subprocess.run(["sha256sum", folder / file.path], capture_output=True, check=True).stdout
        assert file.hash == f"sha256:{found.decode().split()[0]}"
        assert file.bytes == (folder / file.path).stat().st_size
    store = DatasetReader(folder)
    for split in ("train", "val"):
        images = store.open_split(split)
        assert images.read(0)[0][:3] == b"\xff\xd8\xff"
        for i in range(0, len(images), 97):
            label = images.read(i)[1]
            if split == "train":
                assert images.name(i).startswith(f"{manifest.classes[label].wnid}_")


def test_who_puts_the_dataset_together_is_alone(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = downloaded(tmp_path, small)
    real, alone = {name: getattr(process, name) for name in ("_write_split", "_manifest")}, []

    def look(name: str) -> Callable[..., object]:
        def act(*arguments: object) -> object:
            with pytest.raises(Timeout), FileLock(tmp_path / "datasets" / ".numbers.lock", timeout=0):
                pass
            alone.append(name)
            return real[name](*arguments)

        return act

    for name in real:
        monkeypatch.setattr(process, name, look(name))
    ask(process, config)
    assert alone == ["_write_split", "_write_split", "_manifest", "_manifest"]


def test_content_has_a_fallback(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small)
    ask(process, config)
    first = load_manifest(dataset(config)).content
    assert len(first) == 12
    ask(process, config)
    assert load_manifest(dataset(config)).content == first


def test_meta_bin_is_torchvisions(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = downloaded(tmp_path, source)
    ask(process, config)
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)
    theirs = tmp_path / "theirs"
    shutil.copytree(source, theirs)
    imagenet.parse_devkit_archive(theirs)
    mine = torch.load(dataset(config) / "meta.bin", weights_only=True)
    assert mine == torch.load(theirs / "meta.bin", weights_only=True)
    assert isinstance(mine, tuple)
    assert mine[0]["n90000003"] == ("three", "3")
    assert len(mine[1]) == 360


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Config:
    config = downloaded(tmp_path_factory.mktemp("folders"), source, "folders")
    assert ask(process, config)["images"] == 1797
    return config


def test_folders_are_read_by_torchvision(folders: Config) -> None:
    root = dataset(folders)
    metas = {(root / place / "meta.bin").read_bytes() for place in (".", "train", "val")}
    assert len(metas) == 1
    store = DatasetReader(root)
    for split in ("train", "val"):
        theirs = imagenet.ImageNet(root, split)
        index = store.open_split(split)
        assert len(theirs) == len(index)
        mine = {index.name(i): index.read(i) for i in range(len(index))}
        assert len(mine) == len(index)
        for path, label in theirs.samples:
            assert (Path(path).read_bytes(), label) == mine[Path(path).name]
    assert not list(root.rglob(".*")), "a draft was left behind"


def test_folders_are_what_torchvision_extracts(
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


def test_folders_have_new_times_and_ordinary_modes(folders: Config) -> None:
    umask = os.umask(0)
    os.umask(umask)
    path = next((dataset(folders) / "train").rglob("*.JPEG"))
    assert path.stat().st_mtime > time.time() - 3600, "the archive says 1970: purged at once"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_whole_folders_are_left_alone(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small, "folders")
    ask(process, config)
    before = {path: path.stat().st_mtime_ns for path in dataset(config).rglob("n*")}
    assert len(before) == 3 * 2 + 3 * 40
    ask(process, config)
    assert {path: path.stat().st_mtime_ns for path in dataset(config).rglob("n*")} == before


def test_an_unfinished_split_goes_on(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small, "folders")
    ask(process, config)
    expected = made(config)
    root = dataset(config)
    (root / "train").rename(root / ".train.partial")
    kept = root / ".train.partial" / "n1" / "n1_7.JPEG"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(root / ".train.partial" / "n0")
    (root / ".train.partial" / "n2" / "n2_0.JPEG").write_bytes(b"")  # what a power cut leaves
    (root / ".train.partial" / ".n0.tmp").mkdir()
    (root / ".train.partial" / ".n0.tmp" / "n0_0.JPEG").write_bytes(b"x")
    ask(process, config)
    assert made(config) == expected
    assert (root / "train" / "n1" / "n1_7.JPEG").stat().st_mtime_ns == before


def test_folders_of_other_archives_are_replaced(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small, "folders")
    ask(process, config)
    shutil.rmtree(tmp_path / "archives")
    (tmp_path / "other").mkdir()
    write_small(tmp_path / "other", random.Random(4))
    config = downloaded(tmp_path, tmp_path / "other", "folders")
    ask(process, config)
    clean = downloaded(tmp_path / "clean", tmp_path / "other", "folders")
    ask(process, clean)
    mine, theirs = made(config), made(clean)
    assert mine == theirs


def test_folders_that_were_not_made_here_are_not_touched(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small, "folders")
    (dataset(config) / "val").mkdir(parents=True)
    (dataset(config) / "val" / "mine").write_text("x")
    assert "move it away" in refused(process, config)
    assert (dataset(config) / "val" / "mine").exists()
    assert not (dataset(config) / "manifest.json").exists()


def test_archives_that_are_not_there(tmp_path: Path, small: Path) -> None:
    assert "+stage=download" in refused(process, config_of(tmp_path, small))
    config = downloaded(tmp_path, small)
    archive = tmp_path / "archives" / "numbers" / ilsvrc_writer.VAL
    os.utime(archive, ns=(0, 0))
    told = refused(process, config)
    assert "changed since it was verified" in told
    assert "+stage=download" in told
    assert not dataset(config).exists()


def test_bad_archives_leave_the_dataset_as_it_was(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small)
    ask(process, config)
    before = killing.snapshot(dataset(config))
    shutil.rmtree(tmp_path / "archives")
    other = tmp_path / "other"
    shutil.copytree(small, other)
    ilsvrc_writer.write_val(other / ilsvrc_writer.VAL, [b"too", b"few"])
    ilsvrc_writer.write_md5sums(other)
    config = downloaded(tmp_path, other)
    assert "2 images, but the ground truth" in refused(process, config)
    assert killing.snapshot(dataset(config)) == before


def test_an_archive_that_changes_meanwhile(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = downloaded(tmp_path, small)
    original = scan.scan

    def disturbed(train: Path, *rest: object, **more: object) -> scan.Scan:
        found = original(train, *rest, **more)  # type: ignore[arg-type]
        os.utime(train)
        return found

    monkeypatch.setattr(scanned_archives, "scan", disturbed)
    assert "changed" in refused(process, config)
    assert not (dataset(config) / "manifest.json").exists()


def test_shards_are_found_through_links(tmp_path: Path, small: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "datasets").symlink_to(tmp_path / "far" / "away")
    config = downloaded(workspace, small)
    ask(process, config)
    assert DatasetReader(dataset(config)).open_split("val").read(0)[0][:2] == b"\xff\xd8"


def test_only_one_process_of_a_job_works(tmp_path: Path, small: Path) -> None:
    config = config_of(tmp_path, small)
    assert process.run(config, run_of(config), DistEnv(rank=1, size=2)) == {}
    assert not (tmp_path / "datasets").exists()


def part_of(config: Config, part: int | None, parts: int) -> Config:
    config = copy.deepcopy(config)
    config.stage.part, config.stage.parts = part, parts
    return config


@pytest.mark.parametrize("parts", [2, 4, 9])
def test_folders_in_parts_are_the_same(tmp_path: Path, small: Path, parts: int) -> None:
    whole = downloaded(tmp_path / "whole", small, "folders")
    result = ask(process, whole)
    cut = downloaded(tmp_path / "cut", small, "folders")
    told = [ask(process, part_of(cut, part, parts))["images"] for part in range(parts)]
    assert sum(told) == 132
    assert not (dataset(cut) / "train").exists()
    assert not (dataset(cut) / "manifest.json").exists()
    assert ask(process, part_of(cut, None, parts)) == result
    assert made(cut) == made(whole)


def test_a_part_of_the_folders_that_is_missing_is_told(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small, "folders")
    ask(process, part_of(config, 0, 2))
    told = refused(process, part_of(config, None, 2))
    assert "of 3 classes 1 are not there, the first is n1: retry" in told
    assert not (dataset(config) / "train").exists()
    ask(process, part_of(config, 1, 2))
    ask(process, part_of(config, None, 2))
    assert len(list((dataset(config) / "train").rglob("*.JPEG"))) == 120


def test_a_class_that_never_reached_the_disk_is_not_taken_for_whole(tmp_path: Path, small: Path) -> None:
    config = downloaded(tmp_path, small, "folders")
    ask(process, part_of(config, 0, 2))
    ask(process, part_of(config, 1, 2))
    (dataset(config) / ".folders-1-of-2.json").unlink()  # killed before it could say that all is on the disk
    assert "classes 1 are not there" in refused(process, part_of(config, None, 2))


@pytest.mark.slow
def test_folders_by_several_processes_are_the_same(tmp_path: Path, small: Path) -> None:
    one, two = (downloaded(tmp_path / name, small, "folders") for name in ("one", "two"))
    two.process.workers = 2
    assert ask(process, one) == ask(process, two)
    assert made(one) == made(two)


def test_parts_share_one_scan(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = downloaded(tmp_path, small, "folders")
    ask(process, part_of(config, 0, 2))
    monkeypatch.setattr(scanned_archives, "scan", lambda *_, **__: pytest.fail("it was there already"))
    ask(process, part_of(config, 1, 2))
    (dataset(config) / ".scan.npz").write_bytes((dataset(config) / ".scan.npz").read_bytes()[:1000])
    monkeypatch.undo()
    ask(process, part_of(config, None, 2))
    assert len(DatasetReader(dataset(config)).open_split("val")) == 12


def test_the_certificate_says_what_is_there(tmp_path: Path, source: Path) -> None:
    config = downloaded(tmp_path, source)
    ask(process, config)
    certificate = json.loads((dataset(config) / "certificate.json").read_text())
    assert certificate["images"] == {"train": 1437, "val": 360}
    assert certificate["counts"]["n90000004"] == {"train": 145, "val": 36}
    assert certificate["sizes"]["train"]["width"] == [32, 32, 32]
    assert certificate["sizes"]["val"]["short_side"]["0 to 63"] == 360
    assert certificate["oddities"] == {"train": {}, "val": {}}
    manifest = load_manifest(dataset(config))
    assert [file["hash"] for file in certificate["files"]] == [
        file.hash for file in manifest.all_files()[:-2]
    ]
    page = (dataset(config) / "certificate.md").read_text()
    assert "| images | 1,437 | 360 |" in page
    assert "| 4 | n90000004 | four, 4 | 145 | 36 |" in page
    assert "None." in page


def test_the_certificate_names_the_odd_ones(tmp_path: Path, small: Path) -> None:
    source, bits = tmp_path / "source", random.Random(1)
    shutil.copytree(small, source)
    odd = [encoded("PNG"), encoded(mode="CMYK"), encoded(mode="L"), encoded(progressive=True), encoded("BMP")]
    ilsvrc_writer.write_val(source / ilsvrc_writer.VAL, [*odd, *(jpeg(bits) for _ in range(7))])
    ilsvrc_writer.write_md5sums(source)
    config = downloaded(tmp_path, source)
    assert ask(process, config)["images"] == 132, "none of them is dropped"
    found = json.loads((dataset(config) / "certificate.json").read_text())["oddities"]["val"]
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)]
    assert [of["named"] for of in found.values()] == [[names[i]] for i in (0, 4, 2, 1, 3)]
    assert [of["images"] for of in found.values()] == [1] * 5
    assert names[0] in (dataset(config) / "certificate.md").read_text()
