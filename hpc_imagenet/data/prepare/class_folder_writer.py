"""Class folders, as torchvision's ImageFolder and ImageNet read them: `train/<wnid>/` and `val/<wnid>/`.

The images go straight from the archives to their files; inner tars are never written. A split grows in
`.<split>.partial/`, class by class, and gets its name when all of it is there: torchvision takes any folder
called train/ for whole. Several jobs may share the classes; each tells in a receipt which ones it has brought
to the disk. Killed at any moment and asked again, each goes on with its first unfinished class.
Times of change are those of the writing, so that a file system that purges by age leaves the files alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from hpc_imagenet.data.ilsvrc.scan import SPLITS, open_for_pread
from hpc_imagenet.data.ilsvrc.scanned_archives import ScannedArchives
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk, process_pool
from hpc_imagenet.io.atomic_files import atomic_write, read_json, sync_folder, write_json

NOTE = "folders.json"  # whose images these are
_LOCK = ".folders.lock"
_BLOCK = 4096  # bytes: what file systems round a file up to

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class ClassImages:
    """The images of one class of one split; arrays of shape [images]."""

    split: str
    wnid: str
    names: Array
    offsets: Array
    lengths: Array

    def sizes(self) -> dict[str, int]:
        """Return file name → bytes."""
        return dict(zip(map(os.fsdecode, self.names.tolist()), self.lengths.tolist(), strict=True))


def write_class_folders(
    root: Path, survey: ScannedArchives, identity: Any, part: int, parts: int, workers: int, progress: Tell
) -> int:
    """Write every so many-th class folder, of both splits, into the dataset's folder `root`.

    Args:
        root: the dataset's folder.
        survey: what lies in the archives.
        identity: which folders these are (a JSON value): those of another are replaced.
        part: 0 to `parts` - 1: whose classes are to be written.
        parts: how many share the work.
        workers: processes that may be used.
        progress: told (images there, images there will be), of this part.

    Returns:
        the images of this part.

    Raises:
        UserError: not enough bytes or inodes, folders are in the way that were not made here, or an archive
            changed while it was read.
    """
    with FileLock(root / _LOCK):
        _claim(root, identity)
    mine = [of for of in classes(survey)[part::parts] if not (root / of.split).exists()]
    total = done = sum(len(of.names) for of in mine)
    told = _told(root, identity)
    missing = [of for of in mine if not _is_finished(root, of, told)]
    done -= sum(len(of.names) for of in missing)
    _require_space(root, missing)
    for split in SPLITS:
        if not (root / split).exists():
            _partial(root, split).mkdir(exist_ok=True)
    progress(done, total)
    for images in process_pool.map_in_order(
        functools.partial(_write, root, survey.archives), missing, workers
    ):
        done += images
        progress(done, total)
    _sync(root)  # once for all files: a name must not survive a power cut that the bytes do not
    survey.require_unchanged()
    listed = [[of.split, of.wnid] for of in mine]
    write_json(root / f".folders-{part}-of-{parts}.json", {"identity": identity, "classes": listed})
    return total


def finalize_class_folders(root: Path, survey: ScannedArchives, identity: Any, meta: bytes) -> None:
    """Give the splits their names, once all classes of all parts are there, with meta.bin in each.

    Raises:
        UserError: classes are missing.
    """
    told = _told(root, identity)
    todo = [split for split in SPLITS if not (root / split).exists()]
    for split in todo:
        wanted = [of.wnid for of in classes(survey) if of.split == split]
        partial = _partial(root, split)
        there = {path.name for path in partial.iterdir()} if partial.exists() else set()
        if missing := [wnid for wnid in wanted if wnid not in there or (split, wnid) not in told]:
            raise UserError(
                f"{partial}: of {len(wanted)} classes {len(missing)} are not there, the first "
                f"is {missing[0]}: retry the parts of this run"
            )
        for name in there.difference(wanted):
            _remove(partial / name)
        with atomic_write(partial / "meta.bin") as file:
            file.write(meta)
    for split in todo:
        _partial(root, split).rename(root / split)
    sync_folder(root)
    for path in (*root.glob(".folders-*.json"), root / _LOCK):
        path.unlink(missing_ok=True)


def classes(survey: ScannedArchives) -> list[ClassImages]:
    """Return the classes of train and of val, in the order of their labels."""
    found = []
    for split in SPLITS:
        entries, names = survey.scan.splits[split], survey.scan.names[split]
        order = np.argsort(entries["label"], kind="stable")
        ends = np.cumsum(np.bincount(entries["label"], minlength=len(survey.devkit.names)))
        for wnid, rows in zip(survey.devkit.names, np.split(order, ends[:-1]), strict=True):
            of = ClassImages(split, wnid, names[rows], entries["offset"][rows], entries["length"][rows])
            if len(of.sizes()) < len(rows):
                raise UserError(f"{survey.archives[split]}: class {wnid} has two files of one name")
            found.append(of)
    return found


def _partial(root: Path, split: str) -> Path:
    return root / f".{split}.partial"


def _claim(root: Path, identity: Any) -> None:
    """Make sure that what is in `root` already is of the same identity; remove what is not."""
    made = read_json(root / NOTE)
    if made == identity:
        return
    for path in root.glob(".folders-*.json"):
        path.unlink()
    for split in SPLITS:
        old = root / f".{split}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (root / split).exists():
            if made is None:
                raise UserError(f"{root / split}: is there and was not made by this stage; move it away")
            # Away with the name first: a folder that is half removed must not look whole.
            (root / split).rename(old)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(_partial(root, split), ignore_errors=True)
    write_json(root / NOTE, identity)


def _told(root: Path, identity: Any) -> set[tuple[str, str]]:
    """Return (split, wnid) of all classes that are on the disk, by the receipts of the parts."""
    told = set()
    for path in root.glob(".folders-*.json"):
        receipt = read_json(path) or {}
        if receipt.get("identity") == identity:
            told |= {(split, wnid) for split, wnid in receipt["classes"]}
    return told


def _is_finished(root: Path, of: ClassImages, told: set[tuple[str, str]]) -> bool:
    """Say whether an earlier try has finished a class; remove what it has begun."""
    folder = _partial(root, of.split) / of.wnid
    _remove(_draft(root, of))
    if not folder.exists():
        return False
    if (of.split, of.wnid) in told or _sizes(folder) == of.sizes():
        return True
    _remove(folder)
    return False


def _sizes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def _require_space(root: Path, missing: list[ClassImages]) -> None:
    size = sum(int((-(-of.lengths.astype(np.int64) // _BLOCK) * _BLOCK).sum()) for of in missing)
    # Each class's folder, and each split's with its meta.bin and the copy of that before its name is given.
    files = sum(len(of.names) + 1 for of in missing) + 3 * len({of.split for of in missing})
    disk.require_free_space(root, size, "the class folders", files)


def _draft(root: Path, of: ClassImages) -> Path:
    return _partial(root, of.split) / f".{of.wnid}.tmp"


def _write(root: Path, archives: dict[str, Path], of: ClassImages) -> int:
    draft, archive = _draft(root, of), archives[of.split]
    draft.mkdir()
    prefix = f"{draft}/"
    with open_for_pread(archive, ahead=of.split == "train") as descriptor:
        for name, offset, length in zip(
            map(os.fsdecode, of.names.tolist()), of.offsets.tolist(), of.lengths.tolist(), strict=True
        ):
            data = memoryview(os.pread(descriptor, length, offset))
            if len(data) != length:
                raise UserError(f"{archive}: ends inside {name}; did it change while it was read?")
            file = os.open(prefix + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                while data:
                    data = data[os.write(file, data) :]
            finally:
                os.close(file)
    draft.rename(_partial(root, of.split) / of.wnid)
    return len(of.names)


def _sync(root: Path) -> None:
    """Bring all files to the disk: of this file system alone, as another may be far away and hang."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        if syncfs is None:
            os.sync()
        elif syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(root))
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
