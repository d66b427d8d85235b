"""Class folders, the Kaggle layout and parquet shards: by way of the stage, the images that lay there."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import ask, config_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.devkit import read_devkit
from hpc_imagenet.data.sources.virtual_tar import VirtualTar, VirtualTarOfTars, long_name_header
from hpc_imagenet.demo import digits
from hpc_imagenet.stages import download

Images = dict[str, dict[str, bytes]]  # class → name → bytes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Images]:
    """The digits, a few of each, as they lie in their archives."""
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


def write(root: Path, classes: Images, flat: bool = False) -> None:
    for wnid, files in classes.items():
        folder = root if flat else root / wnid
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)


def class_folders(root: Path, images: dict[str, Images]) -> Path:
    write(root / "train", images["train"])
    write(root / "val", images["val"])
    (root / "train" / ".DS_Store").write_text("what a Mac leaves behind")
    return root


def kaggle(root: Path, images: dict[str, Images]) -> Path:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write(data / "train", images["train"])
    write(data / "val", images["val"], flat=True)
    lines = [
        f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for wnid, of in images["val"].items() for name in of
    ]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines[::-1]]) + "\n")
    mapping = [f"{wnid} {digits.WORDS[i]}, number {i}" for i, wnid in enumerate(sorted(images["train"]))]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(mapping))
    return root


def shards(root: Path, images: dict[str, Images]) -> Path:
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
        rows.sort(key=lambda row: row["image"]["bytes"])  # in no order
        for part in range(2):
            table = pyarrow.Table.from_pylist(rows[part::2]).replace_schema_metadata(metadata)
            path = root / "data" / f"{name}-{part:05d}-of-00002.parquet"
            parquet.write_table(table, path, row_group_size=7)
    return root


LAYOUTS = {"class folders": class_folders, "the Kaggle layout": kaggle, "parquet shards": shards}
Write = Callable[[Path, dict[str, Images]], Path]


def made(workspace: Path) -> tuple[Images, Images, dict[str, tuple[str, ...]]]:
    """Return train, val and the names of the classes as the archives of the workspace have them."""
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


@pytest.mark.parametrize("kind", LAYOUTS)
def test_archives_are_made(
    tmp_path: Path, images: dict[str, Images], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = LAYOUTS[kind](tmp_path / "source", images)
    config = config_of(tmp_path, source)
    config.download.connections = 3
    result = ask(download, config)
    assert f"has {kind}: archives are made of them" in capsys.readouterr().out
    train, val, names = made(tmp_path)
    assert train == images["train"]
    assert val == images["val"]
    wnid = digits.wnid(3)
    words = {
        "class folders": (wnid,),
        "the Kaggle layout": ("three", "number 3"),
        "parquet shards": ("three", "so named"),
    }
    assert names[wnid] == words[kind]
    assert result["files"] == 3
    # Made again, the bytes are the same; the receipts say what they are.
    other = config_of(tmp_path / "again", source)
    other.download.connections = 1
    ask(download, other)
    for file in (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT):
        one, two = (place / "archives/numbers" / file for place in (tmp_path, tmp_path / "again"))
        assert one.read_bytes() == two.read_bytes()
        got = receipt.load_receipt(one)
        assert got
        assert (got.source, got.verified) == (str(source), "")
    assert len(list((tmp_path / "archives/numbers").iterdir())) == 6


def test_a_kaggle_folder_may_be_given_from_within(tmp_path: Path, images: dict[str, Images]) -> None:
    source = kaggle(tmp_path / "source", images)
    ask(download, config_of(tmp_path, source / "ILSVRC" / "Data" / "CLS-LOC"))
    assert made(tmp_path)[:2] == (images["train"], images["val"])


def test_val_images_of_the_same_name(tmp_path: Path, images: dict[str, Images]) -> None:
    val = {
        wnid: {"1.JPEG": data, "2.JPEG": data} for wnid, of in images["val"].items() for data in of.values()
    }
    ask(download, config_of(tmp_path, class_folders(tmp_path / "source", {**images, "val": val})))
    got = made(tmp_path)[1]
    assert got == {wnid: {f"{wnid}_{name}": data for name, data in of.items()} for wnid, of in val.items()}


def test_parquet_without_paths(tmp_path: Path, images: dict[str, Images]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = next(iter(images["train"][digits.wnid(0)].values()))
    (tmp_path / "source").mkdir()
    table = pyarrow.Table.from_pylist(
        [{"image": {"bytes": data, "path": None}, "label": n % 3} for n in range(9)]
    )
    for name in ("train", "val"):
        parquet.write_table(table, tmp_path / "source" / f"{name}-0.parquet")
    ask(download, config_of(tmp_path, tmp_path / "source"))
    train, val, _ = made(tmp_path)
    assert {wnid: len(of) for wnid, of in train.items()} == {f"class{n:05d}": 3 for n in range(3)}
    assert list(train["class00001"]) == ["train_00000002.JPEG", "train_00000005.JPEG", "train_00000008.JPEG"]
    assert sum(map(len, val.values())) == 9


def spoil_solution(source: Path) -> None:
    path = source / "LOC_val_solution.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def lose_an_image(source: Path) -> None:
    min((source / "ILSVRC/Data/CLS-LOC/val").iterdir()).unlink()


def lose_the_solution(source: Path) -> None:
    (source / "LOC_val_solution.csv").unlink()


def add(path: str, data: bytes = b"x") -> Callable[[Path], None]:
    def do(source: Path) -> None:
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_bytes(data)

    return do


FAULTS: list[tuple[Write, Callable[[Path], Any], str]] = [
    (kaggle, spoil_solution, "has no line in"),
    (kaggle, lose_an_image, "LOC_val_solution.csv has 60 images, and"),
    (kaggle, lose_the_solution, "has no class folders, and no LOC_val_solution.csv lies in"),
    (class_folders, add("train/n90000001/notes.txt"), "notes.txt is no image (.jpg"),
    (class_folders, add("train/n90000001/empty.JPEG", b""), "empty.JPEG is empty"),
    (class_folders, add("train/not a class/1.JPEG"), "a class folder has a name such as"),
    (class_folders, add("val/n99999999/1.JPEG"), "class n99999999 is in val, but not in train"),
    (class_folders, lambda source: (source / "train" / "n99999999").mkdir(), "n99999999 holds no images"),
    (shards, add("data/train-00001-of-00002.parquet"), "not shards with the columns image and label"),
]


@pytest.mark.parametrize(("write", "spoil", "words"), FAULTS, ids=[words for *_, words in FAULTS])
def test_bad_folders_are_told_in_one_line(
    tmp_path: Path, images: dict[str, Images], write: Write, spoil: Callable[[Path], Any], words: str
) -> None:
    source = write(tmp_path / "source", images)
    spoil(source)
    assert words in refused(download, config_of(tmp_path, source))
    assert not list((tmp_path / "archives" / "numbers").glob("*.tar"))


def test_pins_of_the_published_archives_do_not_fit(tmp_path: Path, images: dict[str, Images]) -> None:
    source = class_folders(tmp_path / "source", images)
    told = refused(download, config_of(tmp_path, source, train={"md5": "0" * 32}))
    assert "dataset.archives.train.md5" in told
    assert "dataset=ilsvrc dataset.name=NAME takes them without" in told


def test_files_that_change_meanwhile(
    tmp_path: Path, images: dict[str, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = class_folders(tmp_path / "source", images)
    victim = max((source / "train" / "n90000005").iterdir())
    real = os.pwrite

    def write_and_grow(*args: Any) -> int:
        victim.write_bytes(b"12")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", write_and_grow)
    told = refused(download, config_of(tmp_path, source))
    assert f"{victim}: had " in told
    assert "bytes and has 2: it changes" in told
    assert not receipt.load_receipt(tmp_path / "archives/numbers" / ilsvrc_writer.TRAIN)
    monkeypatch.undo()
    # Listed anew it is another archive, and what was written of the first one is thrown away.
    ask(download, config_of(tmp_path, source))
    assert made(tmp_path)[0]["n90000005"][victim.name] == b"12"


@given(names=st.lists(st.text("abcdé", min_size=1, max_size=110), unique=True, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_byte_of_a_virtual_tar(names: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = {f"{i}.JPEG": data.draw(st.binary(max_size=1100)) for i in range(len(names))}
        for path, content in files.items():
            (root / path).write_bytes(content)
        tar = VirtualTar(
            root, names, list(files), [len(content) for content in files.values()], [0] * len(files)
        )
        nested = VirtualTarOfTars({"n1": tar, "n2": tar})
        whole = b"".join(pieces(nested, 0))
        assert len(whole) == nested.length
        with tarfile.open(fileobj=io.BytesIO(whole)) as outer:
            assert outer.getnames() == ["n1.tar", "n2.tar"]
            for member in outer:
                with tarfile.open(fileobj=io.BytesIO(read(outer, member))) as inner:
                    assert [(m.name, read(inner, m)) for m in inner] == list(
                        zip(names, files.values(), strict=True)
                    )
        for at in {0, nested.length - 1, *(data.draw(st.integers(0, nested.length - 1)) for _ in range(4))}:
            assert b"".join(pieces(nested, at)) == whole[at:]
    assert (
        long_name_header("x", 5)
        == tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)[:124] + long_name_header("x", 5)[124:]
    )


def pieces(nested: VirtualTarOfTars, at: int) -> list[bytes]:
    found = []
    while at < nested.length:
        found.append(nested.read_from(at))
        assert found[-1]
        at += len(found[-1])
    return found
