"""What every job of a process stage begins with: which archives these are, and what lies in them.

Jobs that work on one dataset side by side need the same scan: whoever comes first makes it and leaves it in
the dataset's folder, the others wait for that and read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
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
from hpc_imagenet.data.ilsvrc.scan import SPLITS, Scan, scan
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write

_SCAN, _LOCK = ".scan.npz", ".scan.lock"
_COLUMNS = ("splits", "facts", "names")

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class ScannedArchives:
    """Archives, what vouches for them, and what lies in them.

    Attributes:
        archives: train, val and devkit.
        receipts: of each.
        devkit: the classes.
        scan: every image that is to be processed.
        skipped: the names of those that are not, because they are corrupt.
    """

    archives: dict[str, Path]
    receipts: dict[str, Receipt]
    devkit: Devkit
    scan: Scan
    skipped: list[str]

    def md5s(self) -> dict[str, str]:
        """Return split → MD5: which archives these are."""
        return {split: receipt.md5 for split, receipt in self.receipts.items()}

    def key(self, *more: Any) -> str:
        """Return eight hex digits for these archives and what else decides a result (JSON values)."""
        return _hash(self.md5s(), *more)

    def require_unchanged(self) -> None:
        """Refuse to call anything whole that was made of archives which were not.

        Raises:
            UserError: an archive was written to since it was verified.
        """
        if _receipts(self.archives) != self.receipts:
            raise UserError(
                f"{self.archives['train'].parent}: an archive changed while it was read; ask again"
            )


def load_or_scan(config: Config, folder: Path, shared: bool, workers: int, progress: Tell) -> ScannedArchives:
    """Find out what lies in the archives of `config.dataset`.

    Args:
        config: dataset and process.
        folder: the dataset's.
        shared: whether other jobs ask for the same.
        workers: processes that may be used.
        progress: told (archives walked, archives there are).

    Raises:
        UserError: archives are missing, damaged or do not belong to each other; an image is corrupt, and
            `process.on_corrupt` is fail.
    """
    source = archive_folder(Path(config.workspace), config.dataset)
    archives = {split: source / archive.file for split, archive in config.dataset.archives.items()}
    receipts = _receipts(archives)
    devkit = read_devkit(archives["devkit"])

    def look() -> Scan:
        check = config.process.check
        return scan(
            archives["train"], archives["val"], devkit, check=check, workers=workers, progress=progress
        )

    if shared:
        key = _hash({split: got.md5 for split, got in receipts.items()}, config.process.check)
        prepare_folder(folder)
        with FileLock(folder / _LOCK):
            found = _load(folder / _SCAN, key)
            if found is None:
                found = look()
                _save(folder / _SCAN, key, found)
    else:
        found = look()
    skipped = found.corrupt()
    if skipped and config.process.on_corrupt == "fail":
        raise UserError(
            f"{source}: {_listed(skipped)} cannot be decoded; process.on_corrupt=skip leaves such images out"
        )
    return ScannedArchives(archives, receipts, devkit, found.without_corrupt() if skipped else found, skipped)


def prepare_folder(folder: Path) -> None:
    """Make the dataset's folder.

    Raises:
        UserError: no right to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise UserError(f"workspace={folder.parent.parent} cannot be written: {error}") from None


def remove_shared_scan(folder: Path) -> None:
    """Remove what jobs side by side have shared."""
    for name in (_SCAN, _LOCK):
        (folder / name).unlink(missing_ok=True)


def _receipts(archives: dict[str, Path]) -> dict[str, Receipt]:
    found = {split: receipt.load_receipt(path) for split, path in archives.items()}
    for split, path in archives.items():
        if found[split] is None:
            why = "changed since it was verified" if path.exists() else "is missing"
            raise UserError(f"{path} {why}; +stage=download makes it whole")
    return {split: got for split, got in found.items() if got is not None}


def _save(path: Path, key: str, found: Scan) -> None:
    arrays = {f"{column}.{split}": getattr(found, column)[split] for column in _COLUMNS for split in SPLITS}
    with atomic_write(path) as file:
        np.savez(file, key=np.array(key), **arrays)


def _load(path: Path, key: str) -> Scan | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            return Scan(*({split: arrays[f"{column}.{split}"] for split in SPLITS} for column in _COLUMNS))
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _listed(names: list[str]) -> str:
    shown = ", ".join(os.fsdecode(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
