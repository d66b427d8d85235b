from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hpc_imagenet.data.ilsvrc import ilsvrc_writer, scan
from hpc_imagenet.data.ilsvrc.devkit import META, TRUTH, Devkit, read_devkit
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import BLOCK

# In devkit order, which is not the order of the wnids; the last row is not a class.
SYNSETS = [
    Synset(1, "n003", "tench, Tinca tinca"),
    Synset(2, "n001", "kite"),
    Synset(3, "n002", "goldfish, Carassius auratus"),
    Synset(4, "n000", "animal", (1, 2, 3)),
]
TRAIN = [("n001", [b"a", b"bb"]), ("n003", [b"ccc"]), ("n002", [b"d" * 600, b"e"])]
VAL = [b"v1", b"v22", b"v333"]
TRUTH_IDS = [2, 3, 1]


def write(folder: Path) -> tuple[Path, Path, Path]:
    paths = folder / "train.tar", folder / "val.tar", folder / "devkit.tar.gz"
    ilsvrc_writer.write_train(paths[0], TRAIN)
    ilsvrc_writer.write_val(paths[1], VAL)
    ilsvrc_writer.write_devkit(paths[2], SYNSETS, TRUTH_IDS)
    return paths


def read(folder: Path) -> scan.Scan:
    return scan.scan(folder / "train.tar", folder / "val.tar", read_devkit(folder / "devkit.tar.gz"))


def repack(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


@pytest.mark.slow
def test_read_devkit(tmp_path: Path) -> None:
    _, _, path = write(tmp_path)
    assert read_devkit(path) == Devkit(
        {"n001": ("kite",), "n002": ("goldfish", "Carassius auratus"), "n003": ("tench", "Tinca tinca")},
        ["n001", "n002", "n003"],
    )
    assert list(read_devkit(path).names) == ["n001", "n002", "n003"], "a label is the index in this order"


@pytest.mark.slow
def test_read_devkit_with_one_class(tmp_path: Path) -> None:
    ilsvrc_writer.write_devkit(tmp_path / "kit", [Synset(7, "n1", "x")], [7])
    assert read_devkit(tmp_path / "kit") == Devkit({"n1": ("x",)}, ["n1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("synsets", "truth", "message"),
    [
        (SYNSETS, [2, 9], r"line 2 is '9', which is not the id of a class"),
        (SYNSETS, [4], r"line 1 is '4', which is not the id of a class"),
        ([*SYNSETS, Synset(9, "n001", "again")], [1], "an id or a wnid occurs twice in"),
        ([*SYNSETS, Synset(1, "n009", "again")], [1], "an id or a wnid occurs twice in"),
        ([Synset(1, "../x", "up")], [1], "invalid wnid"),
        ([Synset(1, "n1", "x", (2,))], [], "has no class"),
    ],
)
def test_inconsistent_devkit_is_rejected(
    tmp_path: Path, synsets: list[Synset], truth: list[int], message: str
) -> None:
    ilsvrc_writer.write_devkit(tmp_path / "kit.tar.gz", synsets, truth)
    with pytest.raises(UserError, match=message):
        read_devkit(tmp_path / "kit.tar.gz")


@pytest.mark.slow
def test_invalid_devkit_error_names_the_problem(tmp_path: Path) -> None:
    _, _, path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(UserError, match="but damaged"):
        read_devkit(path)
    path.write_bytes(b"<html>" + b" " * 1000)
    with pytest.raises(UserError, match="an HTML page"):
        read_devkit(path)
    repack(path, [(f"x/{TRUTH}", b"1\n")])
    with pytest.raises(UserError, match=r"does not contain data/meta.mat"):
        read_devkit(path)
    repack(path, [(f"x/{TRUTH}", b"1\n"), (f"x/{META}", b"no mat")])
    with pytest.raises(UserError, match=r"data/meta\.mat is not a readable MATLAB file"):
        read_devkit(path)
    path.unlink()
    with pytest.raises(UserError, match=r"\+stage=download"):
        read_devkit(path)


@pytest.mark.slow
def test_scan_finds_offsets_lengths_labels_and_names(tmp_path: Path) -> None:
    paths = write(tmp_path)
    found = read(tmp_path)
    for split, expected in (
        ("train", [(b"a", 0), (b"bb", 0), (b"ccc", 2), (b"d" * 600, 1), (b"e", 1)]),
        ("val", [(b"v1", 0), (b"v22", 1), (b"v333", 2)]),
    ):
        got = []
        for offset, length, label, shard in found.splits[split].tolist():
            assert shard == ("train", "val").index(split)
            got.append((paths[shard].read_bytes()[offset : offset + length], label))
        assert got == expected
    train = [f"{wnid}_{i}.JPEG".encode() for wnid, images in TRAIN for i in range(len(images))]
    assert found.names["train"].tolist() == train
    assert found.names["train"].dtype.itemsize == len(max(train, key=len)), "a tar's header has 100 bytes"
    assert found.names["val"].tolist() == [f"ILSVRC2012_val_{i:08d}.JPEG".encode() for i in (1, 2, 3)]


def test_val_labels_follow_file_names_not_archive_order(tmp_path: Path) -> None:
    write(tmp_path)
    repack(tmp_path / "val.tar", [("b.JPEG", b"2"), ("c.JPEG", b"3"), ("a.JPEG", b"1")])
    found = read(tmp_path)
    assert found.names["val"].tolist() == [b"b.JPEG", b"c.JPEG", b"a.JPEG"]
    # The ground truth, in file name order: n001, n002, n003.
    np.testing.assert_array_equal(found.splits["val"]["label"], [1, 2, 0])


def train_without(folder: Path, *omitted: str) -> None:
    ilsvrc_writer.write_train(
        folder / "train.tar", [(wnid, images) for wnid, images in TRAIN if wnid not in omitted]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: train_without(f, "n002"), "class n002 is in the development kit but missing"),
        (
            lambda f: train_without(f, "n002", "n001"),
            "classes n001, n002 are in the development kit but missing",
        ),
        (
            lambda f: ilsvrc_writer.write_train(f / "train.tar", [*TRAIN, ("n9", [b"x"])]),
            "class n9 is in the archive but not",
        ),
        (lambda f: ilsvrc_writer.write_train(f / "train.tar", []), "an empty archive"),
        (
            lambda f: ilsvrc_writer.write_train(f / "train.tar", [*TRAIN[:2], ("n002", [])]),
            "n002.tar: an empty",
        ),
        (
            lambda f: ilsvrc_writer.write_train(f / "train.tar", [*TRAIN[:2], ("n002", [b""])]),
            "n002_0.JPEG has 0 b",
        ),
        (
            lambda f: ilsvrc_writer.write_val(f / "val.tar", VAL[:2]),
            "2 images, but the ground truth .* 3 lines",
        ),
        (lambda f: ilsvrc_writer.write_val(f / "val.tar", []), "an empty archive"),
        (lambda f: (f / "val.tar").replace(f / "train.tar"), "one tar per class is expected"),
        (
            lambda f: repack(f / "train.tar", [("n001.tar", b"x" * 2000)]),
            "n002, n003 are in the development kit but missing",
        ),
        (lambda f: repack(f / "val.tar", [("README", b"x")]), "README, which is not an image"),
        (lambda f: repack(f / "val.tar", [(f"{d}/a.JPEG", b"x") for d in "abc"]), "the same file name"),
        (
            lambda f: repack(f / "train.tar", [("a/n001.tar", b""), ("b/n001.tar", b"")]),
            "n001 occurs twice",
        ),
        (lambda f: (f / "train.tar").unlink(), "no such file"),
        (lambda f: (f / "val.tar").write_bytes((f / "val.tar").read_bytes()[:700]), "truncated"),
    ],
)
def test_damaged_or_mismatched_archives_are_rejected(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_damaged_class_tar_error_names_the_tar_and_byte(tmp_path: Path) -> None:
    path, _, _ = write(tmp_path)
    begin = int(read(tmp_path).splits["train"]["offset"][2]) - BLOCK
    data = bytearray(path.read_bytes())
    data[begin : begin + 5] = b"xxxxx"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"n003.tar: damaged at byte {begin}"):
        read(tmp_path)


def test_too_many_classes_for_the_index_are_rejected(tmp_path: Path) -> None:
    write(tmp_path)
    devkit = Devkit({f"n{i:05d}": ("x",) for i in range(65_537)}, [])
    with pytest.raises(UserError, match="at most 65536"):
        scan.scan(tmp_path / "train.tar", tmp_path / "val.tar", devkit)
