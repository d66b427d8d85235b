"""Class folders, as torchvision's ImageFolder and ImageNet read them: `train/<wnid>/` and `val/<wnid>/`.

The images go straight from the archives to their files; inner tars are never written. A split grows in
`.<split>.partial/`, class by class, and gets its name when all of it is there: torchvision takes any folder
called train/ for whole. Killed at any moment and asked again, it goes on with the first unfinished class.
Times of change are those of the writing, so that a file system that purges by age leaves the files alone.
"""

from __future__ import annotations

import functools
import os
import posixpath
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hpc_imagenet.archives import space
from hpc_imagenet.archives.devkit import Devkit
from hpc_imagenet.archives.ilsvrc import Scan, class_members, opened
from hpc_imagenet.archives.tar import Member
from hpc_imagenet.durable import read_json, replacing, sync_folder, write_json
from hpc_imagenet.errors import UserError

SPLITS = ("train", "val")
NOTE = "folders.json"  # whose images these are
_BLOCK = 4096  # bytes: what file systems round a file up to

Images = Callable[[], list[Member]]  # the images of a class, found when they are needed


def write(
    root: Path,
    archives: dict[str, Path],
    devkit: Devkit,
    found: Scan,
    meta: bytes,
    identity: dict[str, str],
    progress: Callable[[int, int, str], None],
) -> None:
    """Write the class folders of both splits into `root`, with meta.bin in each.

    Args:
        root: the dataset's folder.
        archives: split → archive.
        devkit: the classes.
        found: what lies in the archives.
        meta: the bytes of meta.bin.
        identity: which archives these are: folders of others are replaced.
        progress: told (images there, images in all, split).

    Raises:
        UserError: not enough bytes or inodes, or folders are in the way that were not made here.
    """
    _claim(root, identity)
    classes = _classes(archives, devkit, found)
    todo = [split for split in SPLITS if not (root / split).exists()]
    finished = {split: _finished(_partial(root, split), classes[split]) for split in todo}
    _require_space(root, devkit, found, finished)
    total = sum(len(entries) for entries in found.splits.values())
    done = sum(len(found.splits[split]) for split in SPLITS if split not in todo)
    for split in todo:
        folder = _partial(root, split)
        folder.mkdir(exist_ok=True)
        with opened(archives[split]) as descriptor:
            for wnid, images in classes[split].items():
                members = images()
                if wnid not in finished[split]:
                    _write_class(descriptor, archives[split], members, folder, wnid)
                done += len(members)
                progress(done, total, split)
        with replacing(folder / "meta.bin") as file:
            file.write(meta)
    if todo:
        os.sync()  # one for all files: a name must not survive a power cut that the bytes do not
    for split in todo:
        _partial(root, split).rename(root / split)
    sync_folder(root)


def _partial(root: Path, split: str) -> Path:
    return root / f".{split}.partial"


def _claim(root: Path, identity: dict[str, str]) -> None:
    """Make sure that what is in `root` already comes from the same archives; remove what does not."""
    made = read_json(root / NOTE)
    if made == identity:
        return
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


def _classes(archives: dict[str, Path], devkit: Devkit, found: Scan) -> dict[str, dict[str, Images]]:
    val: dict[str, list[Member]] = {wnid: [] for wnid in devkit.names}
    wnids = list(devkit.names)
    for name, entry in zip(found.val_names, found.splits["val"], strict=True):
        offset, length, label, _ = entry.item()
        val[wnids[label]].append(Member(name, offset, length))

    def of_train(number: int) -> list[Member]:
        tar = found.class_tars[number]
        with opened(archives["train"]) as descriptor:
            members = list(class_members(descriptor, archives["train"], tar))
        names = [posixpath.basename(member.name) for member in members]
        if len(set(names)) < len(names):
            raise UserError(f"{archives['train']}: {tar.wnid}.tar has two files of one name in its folders")
        return [member._replace(name=name) for member, name in zip(members, names, strict=True)]

    return {
        "train": {tar.wnid: functools.partial(of_train, n) for n, tar in enumerate(found.class_tars)},
        "val": {wnid: functools.partial(list[Member], members) for wnid, members in val.items()},
    }


def _finished(folder: Path, classes: dict[str, Images]) -> set[str]:
    """Return the classes that an earlier try has finished; remove what it has begun."""
    finished = set()
    for path in list(folder.iterdir()) if folder.exists() else []:
        if path.name in classes and _sizes(path) == {
            image.name: image.length for image in classes[path.name]()
        }:
            finished.add(path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return finished


def _sizes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def _require_space(root: Path, devkit: Devkit, found: Scan, finished: dict[str, set[str]]) -> None:
    size = files = 0
    labels = {wnid: label for label, wnid in enumerate(devkit.names)}
    for split, there in finished.items():
        entries = found.splits[split]
        rest = entries["length"][~np.isin(entries["label"], [labels[wnid] for wnid in there])]
        size += int((-(-rest.astype(np.int64) // _BLOCK) * _BLOCK).sum())
        files += len(rest) + len(labels) - len(there) + 3  # and class folders, the split's and its meta.bin
    space.require(root, size, "the class folders", files)


def _write_class(descriptor: int, archive: Path, members: list[Member], folder: Path, wnid: str) -> None:
    draft = folder / f".{wnid}.tmp"
    draft.mkdir()
    prefix = f"{draft}/"
    for data, name in _read(descriptor, archive, members):
        file = os.open(prefix + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)
    draft.rename(folder / wnid)


def _read(descriptor: int, archive: Path, members: list[Member]) -> Iterator[tuple[memoryview, str]]:
    for name, offset, length in members:
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise UserError(f"{archive}: ends inside {name}; did it change while it was read?")
        yield memoryview(data), name
