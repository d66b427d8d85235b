"""From three archives of the ILSVRC shape to the address and label of every image, reading headers only.

The train archive is a tar of one tar a class, `<wnid>.tar`; the val archive is flat, and its images in the
order of their names belong to the lines of the development kit's ground truth. Labels count the wnids in
alphabetical order, as torchvision does.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_imagenet.archives.devkit import Devkit
from hpc_imagenet.archives.tar import Member, members
from hpc_imagenet.datastore.index import ENTRY, Index
from hpc_imagenet.errors import UserError

TRAIN_SHARD, VAL_SHARD = 0, 1
# What torchvision's ImageFolder takes for an image: a file of another kind would shift the labels of val.
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ClassTar:
    """One class of the train archive: the tar in its bytes [begin, end)."""

    wnid: str
    begin: int
    end: int


@dataclass(frozen=True)
class Scan:
    """What lies in the archives.

    Attributes:
        splits: train and val, each of shape [images] and dtype `ENTRY`, in archive order.
        class_tars: where the classes lie in the train archive, in archive order.
        val_names: file names, in the order of the val split.
    """

    splits: dict[str, Index]
    class_tars: list[ClassTar]
    val_names: list[str]


def scan(
    train: Path, val: Path, devkit: Devkit, progress: Callable[[int, int], None] = lambda done, total: None
) -> Scan:
    """Find every image of both splits.

    Args:
        train: the train archive.
        val: the val archive.
        devkit: its classes and ground truth.
        progress: told (archives walked, archives there are), counting each class as one and val as one.

    Raises:
        UserError: the archives are damaged, or do not belong to each other.
    """
    labels = {wnid: label for label, wnid in enumerate(devkit.names)}
    if len(labels) - 1 > np.iinfo(ENTRY["label"]).max:
        raise UserError(f"{len(labels)} classes: an index holds at most {np.iinfo(ENTRY['label']).max + 1}")
    with opened(train) as descriptor:
        tars = find_class_tars(descriptor, train, devkit)
        parts = []
        for number, tar in enumerate(tars):
            found = list(class_members(descriptor, train, tar))
            parts.append(_entries(found, [labels[tar.wnid]] * len(found), TRAIN_SHARD))
            progress(number + 1, len(tars) + 1)
    with opened(val) as descriptor:
        images = list(_images(members(descriptor, 0, os.fstat(descriptor).st_size, str(val)), str(val)))
    names = [posixpath.basename(image.name) for image in images]
    val_labels = [labels[wnid] for wnid in _val_classes(names, devkit, val)]
    progress(len(tars) + 1, len(tars) + 1)
    return Scan({"train": np.concatenate(parts), "val": _entries(images, val_labels, VAL_SHARD)}, tars, names)


def find_class_tars(descriptor: int, train: Path, devkit: Devkit) -> list[ClassTar]:
    """Return the class tars of an open train archive: exactly the classes of the kit.

    Raises:
        UserError: a class is missing, unknown or there twice, or the archive holds something else.
    """
    tars = []
    for member in members(descriptor, 0, os.fstat(descriptor).st_size, str(train)):
        wnid, ending = posixpath.splitext(posixpath.basename(member.name))
        if ending != ".tar":
            raise UserError(
                f"{train}: holds {member.name}, where one tar a class is expected (n01440764.tar …); "
                "is dataset.archives.train.file the train archive?"
            )
        tars.append(ClassTar(wnid, member.offset, member.offset + member.length))
    if not tars:
        raise UserError(f"{train}: an empty archive")
    found = {tar.wnid for tar in tars}
    if len(found) < len(tars):
        twice = next(tar.wnid for tar in tars if sum(other.wnid == tar.wnid for other in tars) > 1)
        raise UserError(f"{train}: class {twice} is there twice")
    if unknown := sorted(found - devkit.names.keys()):
        raise UserError(f"{train}: {_some(unknown)} in it, but not in the development kit")
    if missing := sorted(devkit.names.keys() - found):
        raise UserError(f"{train}: {_some(missing)} missing in it, but in the development kit")
    return tars


def class_members(descriptor: int, train: Path, tar: ClassTar) -> Iterator[Member]:
    """Yield the images of one class of an open train archive.

    Raises:
        UserError: the class's tar is damaged or empty, or holds something that is no image.
    """
    where = f"{train}: {tar.wnid}.tar"
    empty = True
    for image in _images(members(descriptor, tar.begin, tar.end, where), where):
        yield image
        empty = False
    if empty:
        raise UserError(f"{where}: an empty archive")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for `pread`; tell the kernel not to read ahead of headers that lie 100 kB apart."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; +stage=download fetches it") from None
    try:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def _images(found: Iterator[Member], where: str) -> Iterator[Member]:
    limit = np.iinfo(ENTRY["length"]).max
    for member in found:
        if not member.name.lower().endswith(IMAGES):
            raise UserError(f"{where}: holds {member.name}, which is no image ({' '.join(IMAGES)})")
        if not 0 < member.length <= limit:
            raise UserError(f"{where}: {member.name} has {member.length} bytes: an image has 1 to {limit}")
        yield member


def _val_classes(names: list[str], devkit: Devkit, val: Path) -> list[str]:
    """Return the class of every val image, in the order of `names`."""
    if not names:
        raise UserError(f"{val}: an empty archive")
    if len(names) != len(devkit.val_wnids):
        raise UserError(
            f"{val}: {len(names)} images, but the ground truth of the development kit has "
            f"{len(devkit.val_wnids)} lines"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{val}: two images have the same file name in different folders")
    order = sorted(range(len(names)), key=names.__getitem__)
    classes = [""] * len(names)
    for place, wnid in zip(order, devkit.val_wnids, strict=True):
        classes[place] = wnid
    return classes


def _entries(images: Sequence[Member], labels: Sequence[int], shard: int) -> Index:
    entries = np.empty(len(images), ENTRY)
    entries["offset"] = [image.offset for image in images]
    entries["length"] = [image.length for image in images]
    entries["label"] = labels
    entries["shard"] = shard
    return entries


def _some(wnids: list[str]) -> str:
    """Return words such as `classes n1, n2, n3 and 7 more are`."""
    more = f" and {len(wnids) - 3} more" if len(wnids) > 3 else ""
    shown = ", ".join(wnids[:3]) + more
    return f"class {shown} is" if len(wnids) == 1 else f"classes {shown} are"
