"""Class folder writer: `train/<wnid>/`, `val/<wnid>/` and so on, for torchvision's ImageFolder and ImageNet.

Images are extracted directly from the archives; inner tars are never written to disk. A split is written to
`.<split>.partial/`, class by class, and renamed when it is complete, because torchvision assumes that a
folder train/ is complete. Parallel jobs can share the classes; each job records the classes that it has
synced to disk in a receipt. A job that was killed resumes at its first unfinished class.
The modification time is the time of writing, so that a file system with purging by age keeps the files.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from hpc_imagenet.data.ilsvrc.scan import SPLITS, open_for_pread
from hpc_imagenet.data.ilsvrc.scanned_archives import ProgressCallback, ScannedArchives
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk, process_pool
from hpc_imagenet.io.atomic_files import atomic_write, read_json, sync_folder, write_json

IDENTITY_FILE = "folders.json"  # stores the identity of the class folders
_LOCK = ".folders.lock"
_BLOCK = 4096  # bytes: file systems round the size of a file up to a multiple of this


@dataclass(frozen=True)
class ClassImages:
    """The images of one class of one split; the arrays have shape [images]."""

    split: str
    wnid: str
    names: Array
    offsets: Array
    lengths: Array

    def sizes(self) -> dict[str, int]:
        """Return file name → bytes."""
        return dict(zip(map(os.fsdecode, self.names.tolist()), self.lengths.tolist(), strict=True))


def write_class_folders(
    root: Path,
    scanned: ScannedArchives,
    identity: Any,
    part: int,
    parts: int,
    workers: int,
    progress: ProgressCallback,
) -> int:
    """Write the class folders of one part, for all splits.

    Args:
        root: the dataset's folder.
        scanned: the archives and their images.
        identity: JSON value that identifies the images; folders with another identity are replaced.
        part: index of the part, 0 to `parts` - 1; it has every `parts`-th class.
        parts: number of parts.
        workers: maximum number of processes.
        progress: callback with (images written, images in total) of this part.

    Returns:
        number of images of this part.

    Raises:
        UserError: not enough free bytes or inodes, `root` has class folders that this stage did not make, or
            an archive changed while it was read.
    """
    with FileLock(root / _LOCK):
        _replace_other_identity(root, scanned, identity)
    groups = [group for group in classes(scanned)[part::parts] if not (root / group.split).exists()]
    total = done = sum(len(group.names) for group in groups)
    synced = _synced_classes(root, identity)
    missing = [group for group in groups if not _is_finished(root, group, synced)]
    done -= sum(len(group.names) for group in missing)
    _require_space(root, missing)
    for split in scanned.scan.splits:
        if not (root / split).exists():
            _partial(root, split).mkdir(exist_ok=True)
    progress(done, total)
    for images in process_pool.map_in_order(
        functools.partial(_write, root, scanned.archives), missing, workers
    ):
        done += images
        progress(done, total)
    _sync(root)  # once for all files: after a power cut no name may exist without its bytes
    scanned.require_unchanged()
    synced_classes = [[group.split, group.wnid] for group in groups]
    write_json(root / f".folders-{part}-of-{parts}.json", {"identity": identity, "classes": synced_classes})
    return total


def finalize_class_folders(root: Path, scanned: ScannedArchives, identity: Any, meta: bytes) -> None:
    """Rename the complete splits from `.<split>.partial` to `<split>`, with meta.bin in each.

    Also in splits that an earlier run has finished: its meta.bin may differ.

    Raises:
        UserError: classes are missing: not all parts are finished.
    """
    synced = _synced_classes(root, identity)
    unfinished = [split for split in scanned.scan.splits if not (root / split).exists()]
    for split in unfinished:
        expected = [group.wnid for group in classes(scanned) if group.split == split]
        partial = _partial(root, split)
        existing = {path.name for path in partial.iterdir()} if partial.exists() else set()
        if missing := [wnid for wnid in expected if wnid not in existing or (split, wnid) not in synced]:
            raise UserError(
                f"{partial}: {len(missing)} of {len(expected)} classes are missing, the first is "
                f"{missing[0]}; retry the parts of this run"
            )
        for name in existing.difference(expected):
            _remove(partial / name)
    for split in scanned.scan.splits:
        path = (_partial(root, split) if split in unfinished else root / split) / "meta.bin"
        if not path.exists() or path.read_bytes() != meta:
            with atomic_write(path) as file:
                file.write(meta)
    for split in unfinished:
        _partial(root, split).rename(root / split)
    sync_folder(root)
    for path in (*root.glob(".folders-*.json"), root / _LOCK):
        path.unlink(missing_ok=True)


def splits_of_other_archives(root: Path, md5s: Collection[str]) -> list[str]:
    """Return the splits whose class folders were made of other archives, as an earlier run may have left.

    Args:
        root: the dataset's folder.
        md5s: MD5s of the archives of its index.
    """
    try:
        stored: Any = read_json(root / IDENTITY_FILE)
        made_of = sorted(stored["archives"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # no class folders, or damaged
        return []
    if not md5s or made_of == sorted(md5s):
        return []
    return [split for split in SPLITS if (root / split).exists()]


def classes(scanned: ScannedArchives) -> list[ClassImages]:
    """Return the classes of all splits, in the order of their labels."""
    found = []
    for split, entries in scanned.scan.splits.items():
        names = scanned.scan.names[split]
        order = np.argsort(entries["label"], kind="stable")
        ends = np.cumsum(np.bincount(entries["label"], minlength=len(scanned.devkit.names)))
        for wnid, rows in zip(scanned.devkit.names, np.split(order, ends[:-1]), strict=True):
            group = ClassImages(split, wnid, names[rows], entries["offset"][rows], entries["length"][rows])
            if len(group.sizes()) < len(rows):
                raise UserError(f"{scanned.archives[split]}: class {wnid} has two files of the same name")
            found.append(group)
    return found


def _partial(root: Path, split: str) -> Path:
    return root / f".{split}.partial"


def _replace_other_identity(root: Path, scanned: ScannedArchives, identity: Any) -> None:
    """Remove the class folders of another identity, and store this identity in `root`."""
    stored = read_json(root / IDENTITY_FILE)
    if stored == identity:
        return
    for path in root.glob(".folders-*.json"):
        path.unlink()
    for split in SPLITS if stored else scanned.scan.splits:
        old = root / f".{split}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (root / split).exists():
            if stored is None:
                raise UserError(f"{root / split} exists and was not made by this stage; move it away")
            # Rename first: a partly removed folder must not look complete.
            (root / split).rename(old)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(_partial(root, split), ignore_errors=True)
    write_json(root / IDENTITY_FILE, identity)


def _synced_classes(root: Path, identity: Any) -> set[tuple[str, str]]:
    """Return the (split, wnid) of all classes that are synced to disk, from the receipts of the parts."""
    synced = set()
    for path in root.glob(".folders-*.json"):
        receipt = read_json(path) or {}
        if receipt.get("identity") == identity:
            synced |= {(split, wnid) for split, wnid in receipt["classes"]}
    return synced


def _is_finished(root: Path, group: ClassImages, synced: set[tuple[str, str]]) -> bool:
    """Whether an earlier attempt has written a class; removes what it has left incomplete."""
    folder = _partial(root, group.split) / group.wnid
    for leftover in folder.parent.glob(f".{glob.escape(group.wnid)}.*tmp"):
        # Renamed first: a job that still writes it finds it gone, and begins anew.
        removed = _temporary(folder)
        with contextlib.suppress(FileNotFoundError):
            leftover.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
    if not folder.exists():
        return False
    if (group.split, group.wnid) in synced or _sizes(folder) == group.sizes():
        return True
    _remove(folder)
    return False


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.urandom(8).hex()}.tmp")


def _sizes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def _require_space(root: Path, missing: list[ClassImages]) -> None:
    size = sum(int((-(-group.lengths.astype(np.int64) // _BLOCK) * _BLOCK).sum()) for group in missing)
    # One inode per class folder, and three per split: its folder, meta.bin and the temporary meta.bin.
    files = sum(len(group.names) + 1 for group in missing) + 3 * len({group.split for group in missing})
    disk.require_free_space(root, size, "the class folders", files)


def _write(root: Path, archives: dict[str, Path], group: ClassImages) -> int:
    """Write the folder of a class, unless a job of another number of parts has written it meanwhile.

    Such a job removes temporary folders when it starts, so the folder is written again if it is gone.
    """
    folder, complete = _partial(root, group.split) / group.wnid, root / group.split / group.wnid
    while not (folder.exists() or complete.exists()):
        temporary, made = _temporary(folder), False
        try:
            temporary.mkdir()
            made = True
            _extract(archives[group.split], group, temporary)
            temporary.rename(folder)
        except OSError:
            removed = made and not temporary.exists()
            if not (removed or folder.exists() or complete.exists()):
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return len(group.names)


def _extract(archive: Path, group: ClassImages, folder: Path) -> None:
    prefix = f"{folder}/"
    with open_for_pread(archive, sequential=group.split == "train") as descriptor:
        for name, offset, length in zip(
            map(os.fsdecode, group.names.tolist()),
            group.offsets.tolist(),
            group.lengths.tolist(),
            strict=True,
        ):
            data = memoryview(os.pread(descriptor, length, offset))
            if len(data) != length:
                raise UserError(
                    f"{archive} ends inside {name}; if it changed while it was read, "
                    "submit +stage=download again"
                )
            file = os.open(prefix + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                while data:
                    data = data[os.write(file, data) :]
            finally:
                os.close(file)


def _sync(root: Path) -> None:
    """Flush this file system to disk; not with `sync`, which hangs if any network file system hangs."""
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
