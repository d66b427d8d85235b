"""The process stage with process.layout=shards, in a single run and in parts."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_stage import config_of, run_stage, stage_error
from sample_images import encoded, jpeg

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.data.images import shard_transform
from hpc_imagenet.data.prepare import shard_writer
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.stages.work import download, process

SIZE = 40_000 / 2**30  # GiB of a shard: about three train images, or all val images


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of three classes, with one image of each unusual format."""
    folder, bits = tmp_path_factory.mktemp("sources") / "unusual", random.Random(6)
    folder.mkdir()
    unusual = [
        encoded("PNG", size=(60, 40)),
        encoded(mode="CMYK", size=(60, 40)),
        encoded(mode="L", size=(60, 40)),
        encoded(progressive=True, size=(60, 40)),
    ]
    plain = [encoded(size=(60 + i, 40)) for i in range(5)]
    synsets = [Synset(3 - i, f"n{i}", f"word {i}") for i in range(3)]
    ilsvrc_writer.write_train(
        folder / ilsvrc_writer.TRAIN,
        [
            ("n1", unusual + plain),
            ("n0", [jpeg(bits, bits.randrange(500, 12_000)) for _ in range(10)]),
            ("n2", [jpeg(bits, bits.randrange(500, 12_000)) for _ in range(9)]),
        ],
    )
    ilsvrc_writer.write_val(folder / ilsvrc_writer.VAL, [jpeg(bits, 900) for _ in range(6)])
    ilsvrc_writer.write_devkit(folder / ilsvrc_writer.DEVKIT, synsets, [1 + i % 3 for i in range(6)])
    ilsvrc_writer.write_md5sums(folder)
    return folder


def config_with_archives(workspace: Path, source: Path, **settings: object) -> Config:
    config = config_of(workspace, source, layout="shards")
    config.process.shard_size = SIZE
    for name, value in settings.items():
        setattr(config.process, name, value)
    run_stage(download, config)
    return config


def dataset(config: Config) -> Path:
    return Path(config.workspace) / "datasets" / config.dataset.name


def part_of(config: Config, part: int | None, parts: int) -> Config:
    config = copy.deepcopy(config)
    config.stage.part, config.stage.parts = part, parts
    return config


def files(config: Config) -> dict[str, bytes]:
    """Return path → bytes of the files that the manifest lists."""
    folder = dataset(config)
    return {file.path: (folder / file.path).read_bytes() for file in load_manifest(folder).all_files()}


def images(folder: Path, split: str) -> list[tuple[str, bytes, int]]:
    reader = DatasetReader(folder).open_split(split)
    return [(reader.name(i), *reader.read(i)) for i in range(len(reader))]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["archive", "shuffled"])
def test_shards_contain_the_images_in_archive_order(tmp_path: Path, source: Path, order: str) -> None:
    config = config_with_archives(tmp_path / "shards", source, order=order)
    assert run_stage(process, config)["images"] == 34
    index = config_of(tmp_path / "index", source)
    run_stage(download, index)
    run_stage(process, index)
    for split in ("train", "val"):
        assert images(dataset(config), split) == images(dataset(index), split)
    manifest = load_manifest(dataset(config))
    assert len(manifest.shards) > 4
    assert all(shard.bytes <= 40_000 + 12_000 for shard in manifest.shards)
    shutil.rmtree(Path(config.workspace) / "archives")  # shards do not need the archives
    assert len(images(dataset(config), "train")) == 28
    rows = DatasetReader(dataset(config)).open_split("train").index
    assert all(np.diff(rows["shard"].astype(int)) >= 0) == (order == "archive")


def test_shards_have_the_bytes_that_tarfile_writes(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source)
    run_stage(process, config)
    folder = dataset(config)
    labels = {c.wnid: label for label, c in enumerate(load_manifest(folder).classes)}
    for shard in load_manifest(folder).shards:
        written = (folder / shard.path).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(written)) as archive:
            images = [(m.name, archive.extractfile(m).read()) for m in archive][::2]  # type: ignore[union-attr]
        expected = io.BytesIO()
        with tarfile.open(fileobj=expected, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, data in images:
                label = str(labels[name.split("/")[0]]).encode()
                for member, content in ((name, data), (name.rpartition(".")[0] + ".cls", label)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        assert written == expected.getvalue()[: len(written)]
        assert len(written) <= len(expected.getvalue()) < len(written) + 10_240 + 1024


def names_of(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


@pytest.mark.slow
def test_shuffle_depends_only_on_the_seed(tmp_path: Path, source: Path) -> None:
    names = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = config_with_archives(tmp_path / folder, source, order="shuffled", seed=seed)
        run_stage(process, config)
        names.append([names_of(path) for path in sorted(dataset(config).rglob("train*.tar"))])
    assert names[0] == names[1] != names[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"order": "shuffled"}, {"resize": "short:20"}, {"resize": "long:33", "order": "shuffled"}],
)
def test_shards_in_parts_equal_a_single_run(
    tmp_path: Path, source: Path, settings: dict[str, object]
) -> None:
    single = config_with_archives(tmp_path / "whole", source, **settings)
    result = run_stage(process, single)
    for parts in (5,) if settings else (2, 5, 40):  # 40: more parts than images
        in_parts = config_with_archives(tmp_path / str(parts), source, **settings)
        counts = [
            run_stage(process, part_of(in_parts, part, parts))["images"] for part in reversed(range(parts))
        ]
        assert sum(counts) == 34
        assert not (dataset(in_parts) / "manifest.json").exists()
        assert run_stage(process, part_of(in_parts, None, parts)) == result
        assert files(in_parts) == files(single)
        assert not list(dataset(in_parts).glob(".*")), "the shared scan was not removed"


@pytest.mark.slow
def test_shards_with_workers_equal_a_single_run(tmp_path: Path, source: Path) -> None:
    one = config_with_archives(tmp_path / "one", source, resize="short:20")
    two = config_with_archives(tmp_path / "two", source, resize="short:20", workers=2)
    assert run_stage(process, one) == run_stage(process, two)
    assert files(one) == files(two)


def test_missing_shards_are_reported(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source)
    run_stage(process, part_of(config, 0, 3))
    run_stage(process, part_of(config, 2, 3))
    error = stage_error(process, part_of(config, None, 3))
    assert "are missing; retry the parts" in error
    assert not (dataset(config) / "manifest.json").exists()
    run_stage(process, part_of(config, 1, 3))
    assert run_stage(process, part_of(config, None, 3))["images"] == 34


@pytest.mark.slow
def test_only_incomplete_shards_are_rewritten(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source)
    run_stage(process, config)
    before = files(config)
    shards = sorted(dataset(config).rglob("*.tar"))
    inodes = [path.stat().st_ino for path in shards]
    shards[1].with_suffix(".json").unlink()
    assert not [path for path in shards if path.stat().st_mode & 0o222]
    shards[2].unlink()
    shards[2].write_bytes(b"short")
    (shards[0].parent / ".train-00003.tar.abc.tmp").write_bytes(b"from a killed attempt")
    shards[3].unlink()
    run_stage(process, config)
    assert files(config) == before
    kept = [path.stat().st_ino == inode for path, inode in zip(shards, inodes, strict=True)]
    assert kept[0]
    assert all(kept[4:])
    assert not list(shards[0].parent.glob(".*"))


@pytest.mark.slow
def test_shards_written_in_two_numbers_of_parts_at_once(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config_with_archives(tmp_path / "whole", source)
    run_stage(process, whole)
    config = config_with_archives(tmp_path / "parts", source)
    config.process.workers = 1
    real = shard_writer._add_image

    def add(*arguments: Any) -> Any:
        monkeypatch.setattr(shard_writer, "_add_image", real)
        for part in (0, 1, 2, None):  # removes the temporary files that it finds
            run_stage(process, part_of(config, part, 3))
        return real(*arguments)

    monkeypatch.setattr(shard_writer, "_add_image", add)
    for part in (0, 1, None):
        run_stage(process, part_of(config, part, 2))
    assert shard_writer._add_image is real
    assert files(config) == files(whole)


@pytest.mark.slow
def test_shards_of_other_settings_are_separate(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source)
    run_stage(process, config)
    before = files(config)
    small = config_with_archives(tmp_path, source, resize="short:20")
    run_stage(process, part_of(small, 0, 2))
    assert files(config) == before, "the old dataset stays until the final job"
    run_stage(process, part_of(small, 1, 2))
    run_stage(process, part_of(small, None, 2))
    assert all(min(Image.open(io.BytesIO(data)).size) <= 20 for _, data, _ in images(dataset(small), "train"))
    assert load_manifest(dataset(small)).provenance["process"]["resize"] == "short:20"


@pytest.mark.slow
def test_resized_shards(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source, resize="short:20", quality=80)
    run_stage(process, config)
    index = config_of(tmp_path / "index", source)
    run_stage(download, index)
    run_stage(process, index)
    for split in ("train", "val"):
        pairs = zip(images(dataset(index), split), images(dataset(config), split), strict=True)
        for (name, data, label), (new_name, new, new_label) in pairs:
            assert (name, label) == (new_name, new_label)
            before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(new))
            assert after.size == shard_transform.ShardTransform("short", 20).size(*before.size)
            assert (data == new) == (min(before.size) <= 20)
    certificate = json.loads((dataset(config) / "certificate.json").read_text())
    assert certificate["sizes"]["train"]["height"][2] == 20 or certificate["sizes"]["train"]["width"][2] <= 40
    assert certificate["tools"]["pillow"].startswith(Image.__version__)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("jpegtran"), reason="no jpegtran on the PATH")
def test_normalised_and_tiled_shards(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path, source, normalise=True, tile=True)
    run_stage(process, config)
    for name, data, _ in images(dataset(config), "train"):
        image = Image.open(io.BytesIO(data))
        assert (image.format, "progressive" in image.info) == ("JPEG", False), name
        assert image.mode in ("RGB", "L")
        assert b"\xff\xdd\x00\x04\x00\x01" in data
    certificate = json.loads((dataset(config) / "certificate.json").read_text())
    assert certificate["restart_markers"] == {"train": 28, "val": 6}
    assert list(certificate["oddities"]["train"]) == ["grey"]


def test_gnu_tar_extracts_class_folders(tmp_path: Path, source: Path) -> None:
    config = config_with_archives(tmp_path / "w", source)
    run_stage(process, config)
    target = tmp_path / "out"
    target.mkdir()
    for path in sorted(dataset(config).rglob("train-*.tar")):
        subprocess.run(["tar", "xf", path], cwd=target, check=True)
    extracted = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*.JPEG")}
    manifest = load_manifest(dataset(config))
    expected = {f"{manifest.classes[label].wnid}/{n}": d for n, d, label in images(dataset(config), "train")}
    assert extracted == expected
    labels = {path.parent.name: path.read_text() for path in target.rglob("*.cls")}
    assert labels == {f"n{i}": str(i) for i in range(3)}


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_shards(tmp_path: Path, source: Path) -> None:
    wds = pytest.importorskip("webdataset")
    config = config_with_archives(tmp_path, source, order="shuffled")
    run_stage(process, config)
    urls = [str(path) for path in sorted(dataset(config).rglob("train-*.tar"))]
    samples = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        samples[sample["__key__"]] = (sample["jpeg"], int(sample["cls"]))
    manifest = load_manifest(dataset(config))
    expected = {
        f"{manifest.classes[label].wnid}/{name.removesuffix('.JPEG')}": (data, label)
        for name, data, label in images(dataset(config), "train")
    }
    assert samples == expected


def test_images_with_the_same_stem_are_rejected(tmp_path: Path, source: Path) -> None:
    other = shutil.copytree(source, tmp_path / "source")
    with tarfile.open(other / ilsvrc_writer.VAL, "w") as archive:
        for name in ("a.JPEG", "a.png", *(f"{i}.JPEG" for i in range(4))):
            header, data = tarfile.TarInfo(name), encoded()
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    ilsvrc_writer.write_devkit(
        other / ilsvrc_writer.DEVKIT,
        [Synset(3 - i, f"n{i}", f"word {i}") for i in range(3)],
        [1, 1, 1, 1, 2, 2],
    )
    ilsvrc_writer.write_md5sums(other)
    assert "are named a;" in stage_error(process, config_with_archives(tmp_path, other))


@pytest.mark.parametrize("layout", ["index", "shards", "folders"])
@pytest.mark.parametrize("check", ["header", "decode"])
def test_corrupt_images_are_named_or_skipped(tmp_path: Path, source: Path, layout: str, check: str) -> None:
    other = tmp_path / "source"
    shutil.copytree(source, other)
    bits = random.Random(1)
    image_bytes = encoded(size=(200, 200), quality=95)
    damaged = bytearray(image_bytes)
    damaged[len(damaged) // 2 : len(damaged) // 2 + 200] = bytes(200)  # header and end marker are intact
    truncated = image_bytes[: len(image_bytes) // 2]
    ilsvrc_writer.write_val(
        other / ilsvrc_writer.VAL,
        [jpeg(bits), truncated, jpeg(bits), b"no image", jpeg(bits), bytes(damaged)],
    )
    ilsvrc_writer.write_md5sums(other)
    config = config_with_archives(tmp_path, other, layout=layout, check=check)
    error = stage_error(process, config)
    assert "ILSVRC2012_val_00000002.JPEG, ILSVRC2012_val_00000004.JPEG" in error
    assert "on_corrupt=skip" in error
    assert not dataset(config).exists()
    config.process.on_corrupt = "skip"
    result = run_stage(process, config)
    assert (result["val"], result["skipped"]) == (4, 2)
    names = [name for name, _, _ in images(dataset(config), "val")]
    assert names == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 3, 5, 6)]
    certificate = json.loads((dataset(config) / "certificate.json").read_text())
    assert certificate["skipped"] == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (2, 4)]
    assert "ILSVRC2012_val_00000004.JPEG" in (dataset(config) / "certificate.md").read_text()
    if layout == "folders":
        assert len(list((dataset(config) / "val").rglob("*.JPEG"))) == 4


@pytest.mark.slow
def test_decode_check_finds_images_with_an_intact_header(tmp_path: Path, source: Path) -> None:
    other = tmp_path / "source"
    shutil.copytree(source, other)
    bits = random.Random(1)
    image_bytes = encoded(size=(200, 200), quality=95)
    no_tables = image_bytes.replace(b"\xff\xdb", b"\xff\xfe")
    ilsvrc_writer.write_val(
        other / ilsvrc_writer.VAL, [jpeg(bits), no_tables, *(jpeg(bits) for _ in range(4))]
    )
    ilsvrc_writer.write_md5sums(other)
    header_check = config_with_archives(tmp_path / "header", other, layout="index")
    assert run_stage(process, header_check)["images"] == 34, "header and end marker are intact"
    decode_check = config_with_archives(tmp_path / "decode", other, layout="index", check="decode")
    assert "ILSVRC2012_val_00000002.JPEG cannot be decoded" in stage_error(process, decode_check)
    resized = config_with_archives(tmp_path / "resized", other, resize="short:20")
    assert "ILSVRC2012_val_00000002.JPEG cannot be decoded" in stage_error(process, resized)
    assert not (dataset(resized) / "manifest.json").exists()
    resized.process.on_corrupt = "skip"
    result = run_stage(process, resized)
    assert (result["val"], result["skipped"]) == (5, 1)
    assert len(images(dataset(resized), "val")) == 5


def test_archive_that_changes_while_shards_are_written_is_rejected(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_archives(tmp_path, source)
    train = Path(config.workspace) / "archives" / config.dataset.name / ilsvrc_writer.TRAIN
    real, calls = os.preadv, []

    def read_and_touch(descriptor: int, *rest: object) -> int:
        calls.append(1)
        if len(calls) == 60:
            os.utime(train)
        return real(descriptor, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", read_and_touch)
    assert "changed while it was read" in stage_error(process, config)
    assert len(calls) >= 60
    assert not (dataset(config) / "manifest.json").exists()
