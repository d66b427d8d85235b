"""Class folders and the layout of ImageNet's Kaggle competition as a source of archives.

    train/<wnid>/*  val/<wnid>/*                                                       class folders
    ILSVRC/Data/CLS-LOC/{train/<wnid>/*, val/*}  LOC_val_solution.csv                  Kaggle

The images are packed into archives of ILSVRC's format, so that all later stages are the same: a tar of one
tar per class, a flat val tar, and a development kit of the classes found. Class names are read from
LOC_synset_mapping.txt beside the images; without it a class is named by its wnid.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.devkit import WNID
from hpc_imagenet.data.sources.labelled_images_source import member_names
from hpc_imagenet.data.sources.virtual_archives import VirtualArchives
from hpc_imagenet.data.sources.virtual_tar import InMemoryFile, VirtualFile, VirtualTar, VirtualTarOfTars
from hpc_imagenet.data.tar.tar_scan import IMAGES
from hpc_imagenet.errors import UserError

KAGGLE, FOLDERS = "the Kaggle layout", "class folders"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_ROOTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", ".")


@dataclass(frozen=True)
class Layout:
    """Layout and paths of a dataset's images."""

    kind: str
    root: Path  # contains train/ and val/
    solution: Path | None  # CSV with the classes of the val images; None for class folders
    mapping: Path | None  # names of the classes


def detect_layout(folder: Path) -> Layout | None:
    """Return the layout of a folder; None if it is neither of the two.

    Raises:
        UserError: val/ is flat and there is no CSV with its classes.
    """
    for relative in _ROOTS:
        root = folder / relative if relative != "." else folder
        if (root / "train").is_dir() and (root / "val").is_dir():
            folders = [root, *root.parents[:3]] if root.name == "CLS-LOC" else [root]
            solution = _first_file(path / SOLUTION for path in folders)
            mapping = _first_file(path / MAPPING for path in folders)
            if _has_folders(root / "val"):
                return Layout(FOLDERS, root, None, mapping)
            if solution is None:
                raise UserError(
                    f"{root / 'val'} has no class folders, and {folder} has no {SOLUTION}; add one of them"
                )
            return Layout(KAGGLE, root, solution, mapping)
    return None


class ClassFolderSource(VirtualArchives):
    """Archives made of image files, computed on request; a `RangeSource`.

    Args:
        layout: layout of the image files.
        prefix: dataset.source.
        files: split (train, val, devkit) → file name of its archive.
        threads: number of folders listed in parallel.
    """

    def __init__(self, layout: Layout, prefix: str, files: dict[str, str], threads: int) -> None:
        super().__init__(layout.root, prefix, files)
        self._layout = layout
        self._threads = threads

    def make(self) -> dict[str, VirtualFile]:
        """List the files, and return the archives by split."""
        root = self._layout.root
        wnids = _class_names(root / "train")
        with ThreadPoolExecutor(self._threads) as pool:
            train = dict(zip(wnids, pool.map(partial(_list_images, root / "train"), wnids), strict=True))
            val_wnids = _class_names(root / "val") if self._layout.solution is None else ["."]
            val = list(pool.map(partial(_list_images, root / "val"), val_wnids))
        if self._layout.solution is None:
            labelled = [(file, wnid) for wnid, files in zip(val_wnids, val, strict=True) for file in files]
        else:
            labelled = _label_by_solution(self._layout.solution, val[0], root / "val")
        for wnid in {wnid for _, wnid in labelled} - set(wnids):
            raise UserError(
                f"{root}: class {wnid} is in val, but not in train; add {root / 'train' / wnid}, or remove "
                "the class from val"
            )
        names = _unique_names(labelled)
        # By bytes, as the scan assigns labels; text has another order if a name is not UTF-8.
        order = sorted(range(len(labelled)), key=lambda i: os.fsencode(names[i]))
        class_names = _read_mapping(self._layout.mapping)
        return {
            "train": VirtualTarOfTars({wnid: _tar(root / "train", files) for wnid, files in train.items()}),
            "val": _tar(root / "val", [labelled[i][0] for i in order], [names[i] for i in order]),
            "devkit": devkit(
                {wnid: (class_names.get(wnid, wnid), len(files)) for wnid, files in train.items()},
                [labelled[i][1] for i in order],
            ),
        }


@dataclass(frozen=True, slots=True)
class _ImageFile:
    path: str  # relative to train/ or val/
    size: int  # bytes
    time: int  # mtime in ns


def devkit(classes: dict[str, tuple[str, int]], val_wnids: Sequence[str]) -> InMemoryFile:
    """Return a development kit.

    Args:
        classes: wnid → (names of the class, number of train images).
        val_wnids: class of each val image, in the order of the val tar.
    """
    ids = {wnid: number for number, wnid in enumerate(sorted(classes), 1)}
    synsets = [
        ilsvrc_writer.Synset(ids[wnid], wnid, names, train_images=images)
        for wnid, (names, images) in sorted(classes.items())
    ]
    return InMemoryFile(ilsvrc_writer.encode_devkit(synsets, [ids[wnid] for wnid in val_wnids]))


def _tar(root: Path, files: Sequence[_ImageFile], names: Sequence[str] | None = None) -> VirtualTar:
    paths = [file.path for file in files]
    names = names or [posixpath.basename(path) for path in paths]
    return VirtualTar(root, names, paths, [file.size for file in files], [file.time for file in files])


def _class_names(folder: Path) -> list[str]:
    wnids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    for wnid in wnids:
        if not WNID.fullmatch(wnid):
            raise UserError(
                f"{folder / wnid}: not a valid class name; use letters, digits and _ . - as in n01440764, or "
                "set dataset=images, which takes any name"
            )
    if not wnids:
        raise UserError(f"{folder} has no class folders; add one folder per class, such as n01440764")
    return wnids


def _list_images(root: Path, wnid: str) -> list[_ImageFile]:
    folder = root / wnid
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.name.lower().endswith(IMAGES) or not entry.is_file():
                raise UserError(
                    f"{entry.path} is not an image ({' '.join(IMAGES)}); remove it, or set dataset=images, "
                    "which leaves it out"
                )
            stat = entry.stat()
            if not stat.st_size:
                raise UserError(f"{entry.path} is empty; replace or remove it")
            path = entry.name if wnid == "." else f"{wnid}/{entry.name}"
            files.append(_ImageFile(path, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise UserError(f"{folder} contains no images; add images or remove it")
    return sorted(files, key=lambda file: file.path)


def _label_by_solution(solution: Path, files: list[_ImageFile], folder: Path) -> list[tuple[_ImageFile, str]]:
    """Return the val images with their classes from the competition's CSV."""
    with solution.open(newline="", errors="replace") as table:
        rows = csv.reader(table)
        next(rows, None)  # ImageId,PredictionString
        wnid_of = {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].split()}
    labelled = []
    for file in files:
        stem = posixpath.splitext(file.path)[0]
        if stem not in wnid_of:
            raise UserError(
                f"{folder / file.path} has no line in {solution}; add the line or remove the image"
            )
        labelled.append((file, wnid_of[stem]))
    if len(labelled) < len(wnid_of):
        raise UserError(
            f"{solution} lists {len(wnid_of)} images, but {folder} contains only {len(labelled)} of them; "
            "add the missing images"
        )
    return labelled


def _unique_names(labelled: Sequence[tuple[_ImageFile, str]]) -> list[str]:
    """Return the member names of val: the file names, prefixed with the class if two are equal."""
    names = [posixpath.basename(file.path) for file, _ in labelled]
    if len(set(names)) == len(names):
        return names
    prefixed = [f"{wnid}_{name}" for name, (_, wnid) in zip(names, labelled, strict=True)]
    # Still equal are big_1.jpg of class cat and 1.jpg of class cat_big.
    return prefixed if len(set(prefixed)) == len(names) else member_names([file.path for file, _ in labelled])


def _read_mapping(mapping: Path | None) -> dict[str, str]:
    """Read wnid → names of the class from LOC_synset_mapping.txt."""
    if mapping is None:
        return {}
    lines = (line.split(maxsplit=1) for line in mapping.read_text(errors="replace").splitlines())
    return {fields[0]: fields[1].strip() for fields in lines if len(fields) == 2}


def _first_file(paths: Iterator[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and entry.name[0] != "." for entry in entries)
