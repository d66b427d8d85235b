"""The process stage: index layout, checks of the archives, and the certificate."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import killing
import pytest
import torch
from blake3 import blake3
from filelock import FileLock, Timeout
from run_stage import config_of, run_of, run_stage, stage_error
from sample_images import encoded, jpeg
from torchvision.datasets import imagenet

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import ilsvrc_writer, scan, scanned_archives
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.data.prepare import certificate
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.process_stage import PROCESS
from hpc_imagenet.stages.work import download, process


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of three classes with 40 train images each, of up to 9 kB."""
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


def config_with_archives(workspace: Path, source: Path, layout: str = "index") -> Config:
    config = config_of(workspace, source, layout=layout)
    run_stage(download, config)
    return config


def dataset(config: Config) -> Path:
    return Path(config.workspace) / "datasets" / config.dataset.name


def dataset_bytes(config: Config) -> dict[str, bytes]:
    """Return file name → bytes of the dataset, without the time in the manifest."""
    files = killing.snapshot(dataset(config), but=("manifest.json",))
    manifest = json.loads((dataset(config) / "manifest.json").read_text())
    manifest.pop("created")
    return {**files, "manifest": json.dumps(manifest).encode()}


@pytest.mark.slow
def test_index_layout(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source)
    config.datastore.content = "abc"
    result = {"images": 1797, "train": 1437, "val": 360, "classes": 10, "skipped": 0}
    assert run_stage(process, config) == result
    folder = dataset(config)
    files = {"train.npy", "val.npy", "meta.bin", "certificate.json", "certificate.md", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    manifest = load_manifest(folder)
    assert (manifest.name, manifest.content, manifest.images) == ("numbers", "abc", 1797)
    assert [shard.path for shard in manifest.shards] == [
        f"../../archives/numbers/{file}" for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)
    ]
    md5s = dict(reversed(line.split()) for line in (source / "md5sums").read_text().splitlines())
    assert [shard.hash for shard in manifest.shards] == [
        f"md5:{md5s[f]}" for f in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL)
    ]
    assert manifest.provenance["archives"] == md5s
    for file in manifest.all_files()[2:]:
        assert file.hash == f"blake3:{blake3((folder / file.path).read_bytes()).hexdigest()}"
        assert file.bytes == (folder / file.path).stat().st_size
    reader = DatasetReader(folder)
    for split in ("train", "val"):
        images = reader.open_split(split)
        assert images.read(0)[0][:3] == b"\xff\xd8\xff"
        for i in range(0, len(images), 97):
            label = images.read(i)[1]
            if split == "train":
                assert images.name(i).startswith(f"{manifest.classes[label].wnid}_")


@pytest.mark.slow
def test_dataset_is_committed_under_a_lock(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_archives(tmp_path, small)
    original, locked = {name: getattr(process, name) for name in ("_write_split", "_build_manifest")}, []

    def check_lock(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            with pytest.raises(Timeout), FileLock(tmp_path / "datasets" / ".numbers.lock", timeout=0):
                pass
            locked.append(name)
            return original[name](*arguments)

        return call

    for name in original:
        monkeypatch.setattr(process, name, check_lock(name))
    run_stage(process, config)
    assert locked == ["_write_split", "_write_split", "_build_manifest", "_build_manifest"]


@pytest.mark.slow
def test_default_content_hash_is_stable(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small)
    run_stage(process, config)
    first = load_manifest(dataset(config)).content
    assert len(first) == 12
    run_stage(process, config)
    assert load_manifest(dataset(config)).content == first


@pytest.mark.slow
def test_meta_bin_equals_that_of_torchvision(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_archives(tmp_path, source)
    run_stage(process, config)
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)
    expected = tmp_path / "expected"
    shutil.copytree(source, expected)
    imagenet.parse_devkit_archive(expected)
    mine = torch.load(dataset(config) / "meta.bin", weights_only=True)
    assert mine == torch.load(expected / "meta.bin", weights_only=True)
    assert isinstance(mine, tuple)
    assert mine[0]["n90000003"] == ("three", "3")
    assert len(mine[1]) == 360


def test_missing_or_changed_archives_are_rejected(tmp_path: Path, small: Path) -> None:
    assert "+stage=download" in stage_error(process, config_of(tmp_path, small))
    config = config_with_archives(tmp_path, small)
    archive = tmp_path / "archives" / "numbers" / ilsvrc_writer.VAL
    os.utime(archive, ns=(0, 0))
    error = stage_error(process, config)
    assert "changed after it was verified" in error
    assert "+stage=download" in error
    assert not dataset(config).exists()


def test_decoded_dataset_that_a_run_of_headers_replaced_is_decoded_again(tmp_path: Path, small: Path) -> None:
    header = config_with_archives(tmp_path, small)
    header.datastore.content = "abc"
    decode = copy.deepcopy(header)
    decode.process.check = "decode"
    run_stage(process, decode)
    PROCESS.check_output(decode)
    run_stage(process, header)
    PROCESS.check_output(header)
    with pytest.raises(UserError, match="not all images were decoded"):
        PROCESS.check_output(decode)
    run_stage(process, decode)
    PROCESS.check_output(decode)
    PROCESS.check_output(header)


def test_mismatched_archives_leave_the_dataset_unchanged(tmp_path: Path, small: Path) -> None:
    config = config_with_archives(tmp_path, small)
    run_stage(process, config)
    before = killing.snapshot(dataset(config))
    shutil.rmtree(tmp_path / "archives")
    other = tmp_path / "other"
    shutil.copytree(small, other)
    ilsvrc_writer.write_val(other / ilsvrc_writer.VAL, [b"too", b"few"])
    ilsvrc_writer.write_md5sums(other)
    config = config_with_archives(tmp_path, other)
    assert "2 images, but the ground truth" in stage_error(process, config)
    assert killing.snapshot(dataset(config)) == before


def test_archive_that_changes_during_the_scan_is_rejected(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_archives(tmp_path, small)
    original = scan.scan

    def scan_and_touch(train: Path, *rest: object, **options: object) -> scan.Scan:
        found = original(train, *rest, **options)  # type: ignore[arg-type]
        os.utime(train)
        return found

    monkeypatch.setattr(scanned_archives, "scan", scan_and_touch)
    assert "changed" in stage_error(process, config)
    assert not (dataset(config) / "manifest.json").exists()


def test_shards_are_found_through_symlinks(tmp_path: Path, small: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "datasets").symlink_to(tmp_path / "far" / "away")
    config = config_with_archives(workspace, small)
    run_stage(process, config)
    assert DatasetReader(dataset(config)).open_split("val").read(0)[0][:2] == b"\xff\xd8"


def test_only_rank_zero_runs_the_stage(tmp_path: Path, small: Path) -> None:
    config = config_of(tmp_path, small)
    assert process.run(config, run_of(config), DistEnv(rank=1, size=2)) == {}
    assert not (tmp_path / "datasets").exists()


def test_certificate_lists_counts_sizes_and_files(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source)
    run_stage(process, config)
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
    assert "Processed with: layout index, check header." in page
    assert "None." in page


def test_certificate_names_unusual_images(tmp_path: Path, small: Path) -> None:
    source, bits = tmp_path / "source", random.Random(1)
    shutil.copytree(small, source)
    unusual = [
        encoded("PNG"),
        encoded(mode="CMYK"),
        encoded(mode="L"),
        encoded(progressive=True),
        encoded("BMP"),
    ]
    ilsvrc_writer.write_val(source / ilsvrc_writer.VAL, [*unusual, *(jpeg(bits) for _ in range(7))])
    ilsvrc_writer.write_md5sums(source)
    config = config_with_archives(tmp_path, source)
    assert run_stage(process, config)["images"] == 132, "no unusual image is left out"
    found = json.loads((dataset(config) / "certificate.json").read_text())["oddities"]["val"]
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)]
    assert [flagged["named"] for flagged in found.values()] == [[names[i]] for i in (0, 4, 2, 1, 3)]
    assert [flagged["images"] for flagged in found.values()] == [1] * 5
    assert names[0] in (dataset(config) / "certificate.md").read_text()


def test_certificate_page_says_how_many_more_images_were_encoded_again() -> None:
    folder = {"layout": "x", "skipped": {}, "oriented": 60, "reencoded": [f"{i}.jpg" for i in range(53)]}
    lines = certificate._folder_lines(folder)
    assert lines[-2:] == ["  - 49.jpg", "  - and 3 more, which certificate.json names"]
    assert "more" not in certificate._folder_lines({**folder, "reencoded": ["1.jpg"]})[-1]
