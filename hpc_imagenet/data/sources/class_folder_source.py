"""Loose files as a source of archives: class folders, and the layout of ImageNet's Kaggle competition.

    train/<wnid>/*  val/<wnid>/*                                                       class folders
    ILSVRC/Data/CLS-LOC/{train/<wnid>/*, val/*}  LOC_val_solution.csv                  Kaggle

What is made of them has the shape of ILSVRC's archives, so all behind it is the same: a tar of class tars, a
flat val tar, and a development kit with the classes that are there. LOC_synset_mapping.txt, where it lies
beside them, says what the classes are called; else a class is called by its folder.
"""

from __future__ import annotations

import contextlib
import csv
import os
import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.devkit import WNID
from hpc_imagenet.data.sources.range_source import ContentChanged, NotAvailable, Origin
from hpc_imagenet.data.sources.virtual_tar import InMemoryFile, VirtualFile, VirtualTar, VirtualTarOfTars
from hpc_imagenet.data.tar.tar_scan import IMAGES
from hpc_imagenet.errors import UserError

KAGGLE, FOLDERS = "the Kaggle layout", "class folders"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_PLACES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", ".")


@dataclass(frozen=True)
class Layout:
    """Where the loose files of a dataset lie."""

    kind: str
    root: Path  # holds train/ and val/
    solution: Path | None  # the classes of val; None where folders say them
    mapping: Path | None  # what the classes are called


def detect_layout(folder: Path) -> Layout | None:
    """Return the layout of a folder, or None where it is neither."""
    for place in _PLACES:
        root = folder / place if place != "." else folder
        if (root / "train").is_dir() and (root / "val").is_dir():
            beside = [root, *root.parents[:3]] if root.name == "CLS-LOC" else [root]
            solution = _first(path / SOLUTION for path in beside)
            mapping = _first(path / MAPPING for path in beside)
            if _has_folders(root / "val"):
                return Layout(FOLDERS, root, None, mapping)
            if solution is None:
                raise UserError(f"{root / 'val'} has no class folders, and no {SOLUTION} lies in {folder}")
            return Layout(KAGGLE, root, solution, mapping)
    return None


class ClassFolderSource:
    """The archives that could be made of loose files, as a remote.

    Args:
        layout: where the files lie.
        prefix: dataset.source.
        files: the archives' names: train, val and devkit → file.
        threads: how many folders are listed at a time.
    """

    def __init__(self, layout: Layout, prefix: str, files: dict[str, str], threads: int) -> None:
        self.prefix = prefix
        self.reached = True
        self._layout = layout
        self._split_of = {file: split for split, file in files.items()}
        self._threads = threads

    def url(self, file: str) -> str:
        """Return what notes and errors call an archive."""
        return f"{self._layout.root} as {file}"

    def size(self, file: str) -> int | None:
        """Return the bytes of an archive."""
        return self._archives[self._split_of[file]].length

    @contextlib.contextmanager
    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> Iterator[_VirtualResponse]:
        """Make bytes [begin, end) of an archive; see `remote.Remote`."""
        if file not in self._split_of:  # such as md5sums
            raise NotAvailable(404)
        virtual = self._archives[self._split_of[file]]
        now = Origin(self.url(file), virtual.state, None, virtual.length, ranges=True)
        if origin and not origin.same(now):
            raise ContentChanged("the files have changed")
        stop = virtual.length if end is None else min(end, virtual.length)
        yield _VirtualResponse(virtual, begin, stop, now, end is not None)

    @cached_property
    def _archives(self) -> dict[str, VirtualFile]:
        """Listed when first asked for: with a million files it takes its time."""
        root = self._layout.root
        wnids = _classes(root / "train")
        with ThreadPoolExecutor(self._threads) as pool:
            train = dict(zip(wnids, pool.map(partial(_listed, root / "train"), wnids), strict=True))
            val_wnids = _classes(root / "val") if self._layout.solution is None else ["."]
            val = list(pool.map(partial(_listed, root / "val"), val_wnids))
        if self._layout.solution is None:
            labelled = [(file, wnid) for wnid, files in zip(val_wnids, val, strict=True) for file in files]
        else:
            labelled = _solved(self._layout.solution, val[0], root / "val")
        for wnid in {wnid for _, wnid in labelled} - set(wnids):
            raise UserError(f"{root}: class {wnid} is in val, but not in train")
        names = _unique_names(labelled)
        order = sorted(range(len(labelled)), key=names.__getitem__)
        words = _words(self._layout.mapping)
        return {
            "train": VirtualTarOfTars({wnid: _tar(root / "train", files) for wnid, files in train.items()}),
            "val": _tar(root / "val", [labelled[i][0] for i in order], [names[i] for i in order]),
            "devkit": devkit(
                {wnid: (words.get(wnid, wnid), len(files)) for wnid, files in train.items()},
                [labelled[i][1] for i in order],
            ),
        }


class _VirtualResponse:
    """Bytes [at, end) of a virtual archive."""

    content_type = ""

    def __init__(self, virtual: VirtualFile, at: int, end: int, origin: Origin, ranged: bool) -> None:
        self._virtual, self._at = virtual, at
        self.origin, self.ranged = origin, ranged
        self.end: int | None = end
        self._rest = b""

    def read(self, most: int) -> bytes:
        """Return the next bytes; none at the end."""
        most = min(most, (self.end or 0) - self._at)
        if most <= 0:
            return b""
        data = self._rest or self._virtual.read_from(self._at)
        data, self._rest = data[:most], data[most:]
        self._at += len(data)
        return data

    def close(self) -> None:
        """Do nothing: files do not stall."""


@dataclass(frozen=True, slots=True)
class _File:
    path: str  # relative to train/ or val/
    size: int
    time: int  # ns


def devkit(classes: dict[str, tuple[str, int]], val_wnids: Sequence[str]) -> InMemoryFile:
    """Return a development kit made of what is known: wnid → (words, train images), and val's classes."""
    ids = {wnid: number for number, wnid in enumerate(sorted(classes), 1)}
    synsets = [
        ilsvrc_writer.Synset(ids[wnid], wnid, words, train_images=images)
        for wnid, (words, images) in sorted(classes.items())
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ilsvrc_writer.DEVKIT
        ilsvrc_writer.write_devkit(path, synsets, [ids[wnid] for wnid in val_wnids])
        return InMemoryFile(path.read_bytes())


def _tar(root: Path, files: Sequence[_File], names: Sequence[str] | None = None) -> VirtualTar:
    paths = [file.path for file in files]
    names = names or [posixpath.basename(path) for path in paths]
    return VirtualTar(root, names, paths, [file.size for file in files], [file.time for file in files])


def _classes(folder: Path) -> list[str]:
    wnids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    for wnid in wnids:
        if not WNID.fullmatch(wnid):
            raise UserError(f"{folder / wnid}: a class folder has a name such as n01440764")
    if not wnids:
        raise UserError(f"{folder} has no class folders")
    return wnids


def _listed(root: Path, wnid: str) -> list[_File]:
    folder = root / wnid
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.name.lower().endswith(IMAGES) or not entry.is_file():
                raise UserError(f"{entry.path} is no image ({' '.join(IMAGES)})")
            stat = entry.stat()
            if not stat.st_size:
                raise UserError(f"{entry.path} is empty")
            path = entry.name if wnid == "." else f"{wnid}/{entry.name}"
            files.append(_File(path, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise UserError(f"{folder} holds no images")
    return sorted(files, key=lambda file: file.path)


def _solved(solution: Path, files: list[_File], folder: Path) -> list[tuple[_File, str]]:
    """Return the val images with their classes, as the competition's table has them."""
    with solution.open(newline="", errors="replace") as table:
        rows = csv.reader(table)
        next(rows, None)  # ImageId,PredictionString
        known = {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].split()}
    found = []
    for file in files:
        stem = posixpath.splitext(file.path)[0]
        if stem not in known:
            raise UserError(f"{folder / file.path} has no line in {solution}")
        found.append((file, known[stem]))
    if len(found) < len(known):
        raise UserError(f"{solution} has {len(known)} images, and {folder} has {len(found)} of them")
    return found


def _unique_names(labelled: Sequence[tuple[_File, str]]) -> list[str]:
    """Return member names for val: the files' own, with the class in front where two are the same."""
    names = [posixpath.basename(file.path) for file, _ in labelled]
    if max(Counter(names).values()) > 1:
        return [f"{wnid}_{name}" for name, (_, wnid) in zip(names, labelled, strict=True)]
    return names


def _words(mapping: Path | None) -> dict[str, str]:
    if mapping is None:
        return {}
    lines = (line.split(maxsplit=1) for line in mapping.read_text(errors="replace").splitlines())
    return {words[0]: words[1].strip() for words in lines if len(words) == 2}


def _first(paths: Iterator[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and entry.name[0] != "." for entry in entries)
