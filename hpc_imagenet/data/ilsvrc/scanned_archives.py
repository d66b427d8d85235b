"""Scanned archives: the verified archives and the list of their images, the input of a process job.

Parallel jobs of one dataset need the same scan: the first job makes it and stores it in the dataset's folder
under a lock; the others wait for the lock and load it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import archive_folder
from hpc_imagenet.data.download.receipt import Receipt
from hpc_imagenet.data.ilsvrc.devkit import Devkit, read_devkit
from hpc_imagenet.data.ilsvrc.scan import SPLITS, Scan, name_list, scan
from hpc_imagenet.datastore.index import Index
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write

_SCAN, _LOCK = ".scan.npz", ".scan.lock"
_COLUMNS = ("splits", "facts", "names")

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class ScannedArchives:
    """Verified archives and their images.

    Attributes:
        archives: split (train, val, devkit; test of labelled images) → path.
        receipts: split → receipt of the verified download.
        devkit: classes and ground truth.
        scan: the images to process.
        skipped: names of the corrupt images, which are left out of `scan`.
    """

    archives: dict[str, Path]
    receipts: dict[str, Receipt]
    devkit: Devkit
    scan: Scan
    skipped: list[str]

    def md5s(self) -> dict[str, str]:
        """Return split → MD5 of the archive."""
        return {split: receipt.md5 for split, receipt in self.receipts.items()}

    def key(self, *more: Any) -> str:
        """Return a hash (8 hex digits) of the archives and of `more`: settings, as JSON values."""
        return _hash(self.md5s(), *more)

    def require_unchanged(self) -> None:
        """Check that the archives did not change while they were processed.

        Raises:
            UserError: an archive was modified after it was verified.
        """
        if _receipts(self.archives) != self.receipts:
            raise UserError(
                f"{self.archives['train'].parent}: an archive was replaced while it was processed; "
                "retry the run"
            )


def load_or_scan(
    config: Config, folder: Path, shared: bool, workers: int, progress: ProgressCallback
) -> ScannedArchives:
    """Scan the archives of `config.dataset`, or load a shared scan of them.

    Args:
        config: run configuration; the sections `dataset` and `process` are used.
        folder: the dataset's folder.
        shared: whether other jobs need the same scan.
        workers: maximum number of processes.
        progress: callback with (tars scanned, tars in total).

    Raises:
        UserError: an archive is missing or damaged, or the archives do not match each other; an image is
            corrupt and `process.on_corrupt` is fail, or all of a class or of a split are corrupt.
    """
    source = archive_folder(Path(config.workspace), config.dataset)
    archives = {split: source / archive.file for split, archive in config.dataset.archives.items()}
    receipts = _receipts(archives)
    devkit = read_devkit(archives["devkit"])

    def run_scan() -> Scan:
        return scan(
            archives["train"],
            archives["val"],
            devkit,
            test=archives.get("test"),
            check=config.process.check,
            workers=workers,
            progress=progress,
        )

    if shared:
        key = _hash({split: record.md5 for split, record in receipts.items()}, config.process.check)
        prepare_folder(folder)
        with FileLock(folder / _LOCK):
            found = _load(folder / _SCAN, key)
            if found is None:
                found = run_scan()
                _save(folder / _SCAN, key, found)
    else:
        found = run_scan()
    skipped = found.corrupt()
    if skipped and config.process.on_corrupt == "fail":
        raise UserError(
            f"{source}: {name_list(skipped)} cannot be decoded; "
            "set process.on_corrupt=skip to leave such images out"
        )
    kept = found.without_corrupt() if skipped else found
    require_images(source, found.splits, kept.splits, list(devkit.names))
    return ScannedArchives(archives, receipts, devkit, kept, skipped)


def require_images(
    source: Path, before: Mapping[str, Index], after: Mapping[str, Index], wnids: Sequence[str]
) -> None:
    """Check that leaving out corrupt images empties no split, and no class of train.

    Args:
        source: folder of the archives, for errors.
        before: split → images in the archives.
        after: split → images that are left.
        wnids: wnids in label order.

    Raises:
        UserError: names the split or the classes.
    """
    if all(len(after[split]) == len(entries) for split, entries in before.items()):
        return
    had, have = (set(np.unique(splits["train"]["label"]).tolist()) for splits in (before, after))
    emptied = [f"all images of {split}" for split in before if not len(after[split])]
    if lost := [wnids[label] for label in sorted(had - have)]:
        emptied.append(f"all training images of {name_list(lost)}")
    if emptied:
        raise UserError(
            f"{source}: {emptied[0]} are corrupt, and process.on_corrupt=skip would leave none; replace "
            "them in dataset.source, or leave that class or split out there"
        )


def prepare_folder(folder: Path) -> None:
    """Create the dataset's folder.

    Raises:
        UserError: permission denied.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise UserError(f"workspace={folder.parent.parent} cannot be written: {error}") from None


def remove_shared_scan(folder: Path) -> None:
    """Remove the scan that parallel jobs shared, and its lock."""
    for name in (_SCAN, _LOCK):
        (folder / name).unlink(missing_ok=True)


def _receipts(archives: dict[str, Path]) -> dict[str, Receipt]:
    found = {split: receipt.load_receipt(path) for split, path in archives.items()}
    for split, path in archives.items():
        if found[split] is None:
            problem = "changed after it was verified" if path.exists() else "is missing"
            raise UserError(f"{path} {problem}; submit +stage=download to fetch or verify it")
    return {split: record for split, record in found.items() if record is not None}


def _save(path: Path, key: str, found: Scan) -> None:
    arrays = {
        f"{column}.{split}": part for column in _COLUMNS for split, part in getattr(found, column).items()
    }
    with atomic_write(path) as file:
        np.savez(file, key=np.array(key), **arrays)


def _load(path: Path, key: str) -> Scan | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            splits = [split for split in SPLITS if f"splits.{split}" in arrays]
            return Scan(*({split: arrays[f"{column}.{split}"] for split in splits} for column in _COLUMNS))
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
