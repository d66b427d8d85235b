"""Archives made of class folders, the Kaggle layout and parquet shards by the download stage."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_stage import config_of, run_stage, stage_error

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.devkit import read_devkit
from hpc_imagenet.data.sources.virtual_tar import VirtualTar, VirtualTarOfTars
from hpc_imagenet.demo import digits
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.download_stage import DOWNLOAD
from hpc_imagenet.stages.work import download

Images = dict[str, dict[str, bytes]]  # class → name → bytes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Images]:
    """A few images of each digit, read from the archives."""
    folder = tmp_path_factory.mktemp("sources") / "digits"
    digits.write_digits(folder)
    train: Images = {}
    with tarfile.open(folder / ilsvrc_writer.TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=io.BytesIO(read(outer, member))) as inner:
                train[member.name[:-4]] = {m.name: read(inner, m) for m in inner.getmembers()[:12]}
    wnids = read_devkit(folder / ilsvrc_writer.DEVKIT).val_wnids
    val: Images = {}
    with tarfile.open(folder / ilsvrc_writer.VAL) as archive:
        for wnid, member in list(zip(wnids, archive, strict=True))[:60]:
            val.setdefault(wnid, {})[member.name] = read(archive, member)
    return {"train": train, "val": val}


def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file
    return file.read()


def write_images(root: Path, classes: Images, flat: bool = False) -> None:
    for wnid, files in classes.items():
        folder = root if flat else root / wnid
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)


def write_class_folders(root: Path, images: dict[str, Images]) -> Path:
    write_images(root / "train", images["train"])
    write_images(root / "val", images["val"])
    (root / "train" / ".DS_Store").write_text("written by macOS")
    return root


def write_kaggle(root: Path, images: dict[str, Images]) -> Path:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_images(data / "train", images["train"])
    write_images(data / "val", images["val"], flat=True)
    lines = [
        f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8"
        for wnid, files in images["val"].items()
        for name in files
    ]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines[::-1]]) + "\n")
    mapping = [f"{wnid} {digits.WORDS[i]}, number {i}" for i, wnid in enumerate(sorted(images["train"]))]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(mapping))
    return root


def write_shards(root: Path, images: dict[str, Images]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (root / "data").mkdir(parents=True)
    wnids = sorted(images["train"])
    features = {"label": {"_type": "ClassLabel", "names": [f"{word}, so named" for word in digits.WORDS]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = []
        for wnid, files in images[split].items():
            for path, data in files.items():
                rows.append(
                    {"image": {"bytes": data, "path": f"{path[:-5]}_{wnid}.JPEG"}, "label": wnids.index(wnid)}
                )
        rows.sort(key=lambda row: row["image"]["bytes"])  # not in class order
        for part in range(2):
            table = pyarrow.Table.from_pylist(rows[part::2]).replace_schema_metadata(metadata)
            path = root / "data" / f"{name}-{part:05d}-of-00002.parquet"
            parquet.write_table(table, path, row_group_size=7)
    return root


LAYOUTS = {
    "class folders": write_class_folders,
    "the Kaggle layout": write_kaggle,
    "parquet shards": write_shards,
}
Write = Callable[[Path, dict[str, Images]], Path]


def read_archives(workspace: Path) -> tuple[Images, Images, dict[str, tuple[str, ...]]]:
    """Return train images, val images and class names from the archives in the workspace."""
    folder = workspace / "archives" / "numbers"
    train: Images = {}
    with tarfile.open(folder / ilsvrc_writer.TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=io.BytesIO(read(outer, member))) as inner:
                train[member.name[:-4]] = {m.name: read(inner, m) for m in inner}
    kit = read_devkit(folder / ilsvrc_writer.DEVKIT)
    val: Images = {}
    with tarfile.open(folder / ilsvrc_writer.VAL) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        for wnid, member in zip(kit.val_wnids, members, strict=True):
            val.setdefault(wnid, {})[member.name] = read(archive, member)
    assert sorted(train) == list(kit.names)
    return train, val, kit.names


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_archives_are_made_of_every_layout(
    tmp_path: Path, images: dict[str, Images], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = LAYOUTS[kind](tmp_path / "source", images)
    config = config_of(tmp_path, source)
    config.download.connections = 3
    result = run_stage(download, config)
    assert f"contains {kind}: making archives of them" in capsys.readouterr().out
    train, val, names = read_archives(tmp_path)
    assert train == images["train"]
    assert val == images["val"]
    wnid = digits.wnid(3)
    class_names = {
        "class folders": (wnid,),
        "the Kaggle layout": ("three", "number 3"),
        "parquet shards": ("three", "so named"),
    }
    assert names[wnid] == class_names[kind]
    assert result["files"] == 3
    # A second run makes equal bytes.
    other = config_of(tmp_path / "again", source)
    other.download.connections = 1
    run_stage(download, other)
    for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT):
        one, two = (workspace / "archives/numbers" / file for workspace in (tmp_path, tmp_path / "again"))
        assert one.read_bytes() == two.read_bytes()
        loaded = receipt.load_receipt(one)
        assert loaded
        assert (loaded.source, loaded.verified) == (str(source), "")
    assert len(list((tmp_path / "archives/numbers").iterdir())) == 6


@pytest.mark.parametrize("write", [write_class_folders, write_kaggle])
def test_changed_class_folders_are_noticed_before_submission(
    tmp_path: Path, images: dict[str, Images], write: Callable[[Path, dict[str, Images]], Path]
) -> None:
    folder = write(tmp_path / "folders", images)
    config = config_of(tmp_path / "workspace", folder)
    run_stage(download, config)
    DOWNLOAD.check_input(config, config.cluster, planned=False)
    changed = next(folder.rglob("train/*/*"))
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(
        UserError, match=r"has changed since .*archives/numbers was made of it: remove .*archives"
    ):
        DOWNLOAD.check_input(config, config.cluster, planned=False)
    shutil.rmtree(folder)  # the images may go once the archives are made of them
    DOWNLOAD.check_input(config, config.cluster, planned=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_archives_of_changed_files_are_made_again(
    tmp_path: Path, images: dict[str, Images], kind: str
) -> None:
    source = LAYOUTS[kind](tmp_path / "source", images)
    run_stage(download, config_of(tmp_path, source))
    archives = tmp_path / "archives/numbers"
    (archives / ilsvrc_writer.VAL).unlink()  # as if the first job was killed before it
    val = dict(images["val"])
    one, two = sorted(val)[:2]
    val[one], val[two] = val[two], val[one]
    train = {**images["train"], one: images["train"][two]}
    shutil.rmtree(source)
    LAYOUTS[kind](source, {"train": train, "val": val})
    run_stage(download, config_of(tmp_path, source))
    assert read_archives(tmp_path)[:2] == (train, val)


@pytest.mark.slow
def test_source_may_be_the_inner_kaggle_folder(tmp_path: Path, images: dict[str, Images]) -> None:
    source = write_kaggle(tmp_path / "source", images)
    run_stage(download, config_of(tmp_path, source / "ILSVRC" / "Data" / "CLS-LOC"))
    assert read_archives(tmp_path)[:2] == (images["train"], images["val"])


@pytest.mark.slow
def test_equal_val_names_are_prefixed_with_the_class(tmp_path: Path, images: dict[str, Images]) -> None:
    val = {
        wnid: {"1.JPEG": data, "2.JPEG": data}
        for wnid, files in images["val"].items()
        for data in files.values()
    }
    run_stage(download, config_of(tmp_path, write_class_folders(tmp_path / "source", {**images, "val": val})))
    loaded = read_archives(tmp_path)[1]
    assert loaded == {
        wnid: {f"{wnid}_{name}": data for name, data in files.items()} for wnid, files in val.items()
    }


@pytest.mark.slow
def test_parquet_without_paths_names_classes_by_label(tmp_path: Path, images: dict[str, Images]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = next(iter(images["train"][digits.wnid(0)].values()))
    (tmp_path / "source").mkdir()
    table = pyarrow.Table.from_pylist(
        [{"image": {"bytes": data, "path": None}, "label": n % 3} for n in range(9)]
    )
    for name in ("train", "val"):
        parquet.write_table(table, tmp_path / "source" / f"{name}-0.parquet")
    run_stage(download, config_of(tmp_path, tmp_path / "source"))
    train, val, _ = read_archives(tmp_path)
    assert {wnid: len(files) for wnid, files in train.items()} == {f"class{n:05d}": 3 for n in range(3)}
    assert list(train["class00001"]) == ["train_00000002.JPEG", "train_00000005.JPEG", "train_00000008.JPEG"]
    assert sum(map(len, val.values())) == 9


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": None, "label": 1}, "a row with label 1 has no image; fetch the shard again"),
        ({"image": "1.jpg", "label": 1}, "the column image holds '1.jpg', not bytes"),
        ({"image": b"x", "label": "cat"}, "the column label holds 'cat', not the number of a class"),
        ({"image": b"x", "label": None}, "the column label holds None, not the number of a class"),
        ({"image": b"x", "label": -1}, "the column label holds -1, which means that an image has no class"),
    ],
)
def test_parquet_of_another_form_is_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("train", "val"):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{name}-0.parquet")
    assert f"{tmp_path}/train-0.parquet: {reason}" in stage_error(download, config_of(tmp_path, tmp_path))


@pytest.mark.slow
def test_parquet_may_hold_plain_bytes(tmp_path: Path, images: dict[str, Images]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = next(iter(images["train"][digits.wnid(0)].values()))
    for name in ("train", "val"):
        table = pyarrow.Table.from_pylist([{"image": data, "label": n} for n in (0, 1)])
        parquet.write_table(table, tmp_path / f"{name}-0.parquet")
    run_stage(download, config_of(tmp_path, tmp_path))
    assert read_archives(tmp_path)[0]["class00001"] == {"train_00000002.JPEG": data}


def remove_solution_line(source: Path) -> None:
    path = source / "LOC_val_solution.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def remove_image(source: Path) -> None:
    min((source / "ILSVRC/Data/CLS-LOC/val").iterdir()).unlink()


def remove_solution(source: Path) -> None:
    (source / "LOC_val_solution.csv").unlink()


def add_file(path: str, data: bytes = b"x") -> Callable[[Path], None]:
    def write_file(source: Path) -> None:
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_bytes(data)

    return write_file


FAULTS: list[tuple[Write, Callable[[Path], Any], str]] = [
    (write_kaggle, remove_solution_line, "has no line in"),
    (write_kaggle, remove_image, "LOC_val_solution.csv lists 60 images, but"),
    (write_kaggle, remove_solution, "has no LOC_val_solution.csv; add one of them"),
    (write_class_folders, add_file("train/n90000001/notes.txt"), "notes.txt is not an image (.jpg"),
    (write_class_folders, add_file("train/n90000001/empty.JPEG", b""), "empty.JPEG is empty"),
    (write_class_folders, add_file("train/not a class/1.JPEG"), "not a class: not a valid class name"),
    (write_class_folders, add_file("val/n99999999/1.JPEG"), "class n99999999 is in val, but not in train"),
    (
        write_class_folders,
        lambda source: (source / "train" / "n99999999").mkdir(),
        "n99999999 contains no images",
    ),
    (
        write_shards,
        add_file("data/train-00001-of-00002.parquet"),
        "not a parquet shard with the columns image and label",
    ),
]


@pytest.mark.parametrize(("write_source", "damage", "reason"), FAULTS, ids=[reason for *_, reason in FAULTS])
def test_invalid_folder_is_refused_in_one_line(
    tmp_path: Path, images: dict[str, Images], write_source: Write, damage: Callable[[Path], Any], reason: str
) -> None:
    source = write_source(tmp_path / "source", images)
    damage(source)
    assert reason in stage_error(download, config_of(tmp_path, source))
    assert not list((tmp_path / "archives" / "numbers").glob("*.tar"))


def test_md5_setting_is_refused_for_archives_made_of_images(
    tmp_path: Path, images: dict[str, Images]
) -> None:
    source = write_class_folders(tmp_path / "source", images)
    error = stage_error(download, config_of(tmp_path, source, train={"md5": "0" * 32}))
    assert "dataset.archives.train.md5" in error
    assert "set dataset=ilsvrc dataset.name=NAME, which has no MD5s" in error


@pytest.mark.slow
def test_file_that_changes_during_the_download_is_refused(
    tmp_path: Path, images: dict[str, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_class_folders(tmp_path / "source", images)
    changing = max((source / "train" / "n90000005").iterdir())
    real_pwrite = os.pwrite

    def write_and_grow(*args: Any) -> int:
        changing.write_bytes(b"12")
        return real_pwrite(*args)

    monkeypatch.setattr(os, "pwrite", write_and_grow)
    error = stage_error(download, config_of(tmp_path, source))
    assert f"{changing}: changed from " in error
    assert "to 2 bytes while an archive was made" in error
    assert not receipt.load_receipt(tmp_path / "archives/numbers" / ilsvrc_writer.TRAIN)
    monkeypatch.undo()
    # The next run lists the files again, so the state differs and the partial file is discarded.
    run_stage(download, config_of(tmp_path, source))
    assert read_archives(tmp_path)[0]["n90000005"][changing.name] == b"12"


@pytest.mark.slow
@given(names=st.lists(st.text("abcdé", min_size=1, max_size=110), unique=True, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_virtual_tar_can_be_read_from_any_offset(names: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = {f"{i}.JPEG": data.draw(st.binary(max_size=1100)) for i in range(len(names))}
        for path, content in files.items():
            (root / path).write_bytes(content)
        tar = VirtualTar(
            root, names, list(files), [len(content) for content in files.values()], [0] * len(files)
        )
        nested = VirtualTarOfTars({"n1": tar, "n2": tar})
        whole = b"".join(read_chunks(nested, 0))
        assert len(whole) == nested.length
        with tarfile.open(fileobj=io.BytesIO(whole)) as outer:
            assert outer.getnames() == ["n1.tar", "n2.tar"]
            for member in outer:
                with tarfile.open(fileobj=io.BytesIO(read(outer, member))) as inner:
                    assert [(m.name, read(inner, m)) for m in inner] == list(
                        zip(names, files.values(), strict=True)
                    )
        for at in {0, nested.length - 1, *(data.draw(st.integers(0, nested.length - 1)) for _ in range(4))}:
            assert b"".join(read_chunks(nested, at)) == whole[at:]


def read_chunks(nested: VirtualTarOfTars, at: int) -> list[bytes]:
    chunks = []
    while at < nested.length:
        chunks.append(nested.read_from(at))
        assert chunks[-1]
        at += len(chunks[-1])
    return chunks
