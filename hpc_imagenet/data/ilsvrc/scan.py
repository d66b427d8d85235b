"""From three archives of the ILSVRC shape to the address and label of every image.

The train archive is a tar of one tar a class, `<wnid>.tar`; the val archive is flat, and its images in the
order of their names belong to the lines of the development kit's ground truth. Labels count the wnids in
alphabetical order, as torchvision does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpc_imagenet.data.ilsvrc.devkit import Devkit
from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.tar import tar_scan
from hpc_imagenet.data.tar.tar_reader import members
from hpc_imagenet.data.tar.tar_scan import Array, ImageEntries
from hpc_imagenet.datastore.index import ENTRY, Index
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import process_pool

SPLITS = ("train", "val")  # in the order of their archives' numbers in the index
HEADER, DECODE = "header", "decode"  # how closely each image is looked at
# Bytes of archives from which on several processes pay: below, starting them takes longer than the walk.
_MANY = 16 << 30
_TOGETHER = 500  # images of val that are decoded as one piece of work


@dataclass(frozen=True)
class ClassTar:
    """One class of the train archive: the tar in its bytes [begin, end)."""

    wnid: str
    begin: int
    end: int


@dataclass(frozen=True)
class Scan:
    """What lies in the archives; the images of a split in archive order, those of a class of train together.

    Attributes:
        splits: each of shape [images] and dtype `ENTRY`.
        facts: each of shape [images] and dtype `picture.FACTS`.
        names: each of shape [images]: file names without folders, as bytes.
    """

    splits: dict[str, Index]
    facts: dict[str, Array]
    names: dict[str, Array]

    def corrupt(self) -> list[str]:
        """Return the names of the images that cannot be decoded."""
        bad = {split: facts["marks"] & image_header.CORRUPT != 0 for split, facts in self.facts.items()}
        return [os.fsdecode(name) for split in SPLITS for name in self.names[split][bad[split]].tolist()]

    def without_corrupt(self) -> Scan:
        """Return the same without those images."""
        kept = {split: facts["marks"] & image_header.CORRUPT == 0 for split, facts in self.facts.items()}
        return replace(
            self,
            splits={split: of[kept[split]] for split, of in self.splits.items()},
            facts={split: of[kept[split]] for split, of in self.facts.items()},
            names={split: of[kept[split]] for split, of in self.names.items()},
        )


def scan(
    train: Path,
    val: Path,
    devkit: Devkit,
    *,
    check: str = HEADER,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Find every image of both splits.

    Args:
        train: the train archive.
        val: the val archive.
        devkit: its classes and ground truth.
        check: HEADER: 2 kB of each image are read; DECODE: all of it, and it is decoded.
        workers: processes that may be used.
        progress: told (archives walked, archives there are), counting each class as one and val as one.

    Raises:
        UserError: the archives are damaged, or do not belong to each other.
    """
    labels = {wnid: label for label, wnid in enumerate(devkit.names)}
    if len(labels) - 1 > np.iinfo(ENTRY["label"]).max:
        raise UserError(f"{len(labels)} classes: an index holds at most {np.iinfo(ENTRY['label']).max + 1}")
    with open_for_pread(train) as descriptor:
        size = os.fstat(descriptor).st_size
        tars = find_class_tars(descriptor, train, devkit)
    if check != DECODE and size < _MANY:
        workers = 1
    parts = []
    one_class = functools.partial(_class, train, decode=check == DECODE)
    for number, found in enumerate(process_pool.map_in_order(one_class, tars, workers)):
        parts.append(found)
        progress(number + 1, len(tars) + 1)
    of_train = ImageEntries(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    train_labels = np.repeat([labels[tar.wnid] for tar in tars], [len(part.names) for part in parts])
    with open_for_pread(val) as descriptor:
        of_val = tar_scan.find_images(descriptor, 0, os.fstat(descriptor).st_size, str(val))
    val_labels = np.array([labels[wnid] for wnid in _val_classes(of_val.names.tolist(), devkit, val)])
    if check == DECODE:
        _decode_val(val, of_val, workers)
    progress(len(tars) + 1, len(tars) + 1)
    return Scan(
        {"train": _entries(of_train, train_labels, 0), "val": _entries(of_val, val_labels, 1)},
        {"train": of_train.facts, "val": of_val.facts},
        {"train": of_train.names, "val": of_val.names},
    )


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


@contextlib.contextmanager
def open_for_pread(path: Path, ahead: bool = False) -> Iterator[int]:
    """Open a file for `pread`; tell the kernel whether to read ahead: not of headers 100 kB apart."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; +stage=download fetches it") from None
    try:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                advice = os.POSIX_FADV_SEQUENTIAL if ahead else os.POSIX_FADV_RANDOM
                os.posix_fadvise(descriptor, 0, 0, advice)
        yield descriptor
    finally:
        os.close(descriptor)


def _class(train: Path, tar: ClassTar, decode: bool) -> ImageEntries:
    with open_for_pread(train) as descriptor:
        found = tar_scan.find_images(descriptor, tar.begin, tar.end, f"{train}: {tar.wnid}.tar")
        if decode:
            _decode(descriptor, found)
    return found


def _decode(descriptor: int, found: ImageEntries) -> None:
    """Mark the images that cannot be decoded."""
    for i, (offset, length) in enumerate(zip(found.offsets.tolist(), found.lengths.tolist(), strict=True)):
        if image_header.decode_error(os.pread(descriptor, length, offset)):
            found.facts["marks"][i] |= image_header.CORRUPT


def _decode_val(val: Path, found: ImageEntries, workers: int) -> None:
    pieces = [
        ImageEntries(*(column[begin : begin + _TOGETHER] for column in found))
        for begin in range(0, len(found.names), _TOGETHER)
    ]
    marks = list(process_pool.map_in_order(functools.partial(_marks, val), pieces, workers))
    found.facts["marks"][:] = np.concatenate(marks)


def _marks(val: Path, piece: ImageEntries) -> Array:
    with open_for_pread(val) as descriptor:
        _decode(descriptor, piece)
    return piece.facts["marks"]


def _val_classes(names: list[bytes], devkit: Devkit, val: Path) -> list[str]:
    """Return the class of every val image, in the order of `names`."""
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


def _entries(found: ImageEntries, labels: Array, shard: int) -> Index:
    entries = np.empty(len(found.names), ENTRY)
    entries["offset"], entries["length"] = found.offsets, found.lengths
    entries["label"], entries["shard"] = labels, shard
    return entries


def _some(wnids: list[str]) -> str:
    """Return words such as `classes n1, n2, n3 and 7 more are`."""
    more = f" and {len(wnids) - 3} more" if len(wnids) > 3 else ""
    shown = ", ".join(wnids[:3]) + more
    return f"class {shown} is" if len(wnids) == 1 else f"classes {shown} are"
