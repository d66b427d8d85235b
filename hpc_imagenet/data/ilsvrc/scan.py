"""Archive scan: byte offset, length and label of every image in three archives with the ILSVRC layout.

The train archive is a tar of one tar per class, `<wnid>.tar`. The val archive is flat; its images, sorted by
name, correspond to the lines of the development kit's ground truth. A label is the index of the wnid in
alphabetical order, as in torchvision. Archives made of labelled images have the same layout with a
labels.json instead of the kit. They may have a test archive like val's, and no val.
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hpc_imagenet.data.ilsvrc.column_file import ColumnFile
from hpc_imagenet.data.ilsvrc.devkit import Devkit
from hpc_imagenet.data.images import image_header
from hpc_imagenet.data.tar import tar_scan
from hpc_imagenet.data.tar.tar_reader import members
from hpc_imagenet.data.tar.tar_scan import Array, ImageEntries
from hpc_imagenet.datastore.index import ENTRY, Index
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import process_pool

SPLITS = ("train", "val", "test")  # all that a dataset may have
HEADER, DECODE = "header", "decode"  # values of process.check
PARALLEL_BYTES = 16 << 30
PARALLEL_LABELLED_BYTES = 1 << 30  # labelled images in formats other than JPEG and PNG are decoded
DECODE_CHUNK = 500


@dataclass(frozen=True)
class ClassTar:
    """The tar of one class: bytes [begin, end) of the train archive."""

    wnid: str
    begin: int
    end: int


@dataclass(frozen=True)
class Scan:
    """The images of the archives by split, in archive order.

    Attributes:
        splits: split → index entries, shape [images], dtype `ENTRY`; the position of a split is the number
            of its shard, which is its archive.
        facts: split → header facts, shape [images], dtype `image_header.FACTS`.
        names: split → file names without folders, as bytes, shape [images].
    """

    splits: dict[str, Index]
    facts: dict[str, Array]
    names: dict[str, Array]

    def corrupt(self) -> list[str]:
        """Return the names of the images with the flag CORRUPT."""
        bad = {split: facts["marks"] & image_header.CORRUPT != 0 for split, facts in self.facts.items()}
        return [os.fsdecode(name) for split in self.names for name in self.names[split][bad[split]].tolist()]

    def without_corrupt(self) -> Scan:
        """Return a copy without the corrupt images."""
        kept = {split: facts["marks"] & image_header.CORRUPT == 0 for split, facts in self.facts.items()}
        return replace(
            self,
            splits={split: entries[kept[split]] for split, entries in self.splits.items()},
            facts={split: facts[kept[split]] for split, facts in self.facts.items()},
            names={split: names[kept[split]] for split, names in self.names.items()},
        )


def scan(
    train: Path,
    val: Path,
    devkit: Devkit,
    *,
    test: Path | None = None,
    check: str = HEADER,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parallel_bytes: int = PARALLEL_BYTES,
    decode_chunk: int = DECODE_CHUNK,
) -> Scan:
    """Find every image of all splits.

    Args:
        train: path of the train archive.
        val: path of the val archive.
        devkit: classes and ground truth.
        test: path of the test archive; of labelled images only.
        check: HEADER reads 2 kB of each image; DECODE reads and decodes every image.
        workers: maximum number of processes.
        progress: callback with (tars scanned, tars in total): one tar per class, and the val archive.
        parallel_bytes: size of ILSVRC's train archive below which HEADER uses one process, since starting
            worker processes takes longer than the scan; of labelled images it is `PARALLEL_LABELLED_BYTES`.
        decode_chunk: number of val images that one call of a worker decodes.

    Raises:
        UserError: an archive is damaged, or the archives do not match each other.
    """
    labels = {wnid: label for label, wnid in enumerate(devkit.names)}
    if len(labels) - 1 > np.iinfo(ENTRY["label"]).max:
        raise UserError(
            f"{len(labels)} classes, but an index can hold at most {np.iinfo(ENTRY['label']).max + 1}"
        )
    with open_for_pread(train) as descriptor:
        size = os.fstat(descriptor).st_size
        tars = find_class_tars(descriptor, train, devkit)
    if check != DECODE and size < (PARALLEL_LABELLED_BYTES if devkit.labels else parallel_bytes):
        workers = 1
    columns: dict[str, _Columns] = {"train": _Columns()}
    flat = {"val": (val, devkit.val_wnids)} if devkit.val_wnids or not devkit.labels else {}
    flat |= {"test": (test, devkit.test_wnids)} if test and devkit.test_wnids else {}
    total = len(tars) + len(flat)
    any_extension = devkit.labels is not None
    scan_class = functools.partial(_scan_class, train, decode=check == DECODE, any_extension=any_extension)
    found_in_classes = process_pool.map_in_order(scan_class, tars, workers)
    for number, (tar, found) in enumerate(zip(tars, found_in_classes, strict=True), 1):
        columns["train"].add(found, labels[tar.wnid], shard=0)
        progress(number, total)
    for number, (split, (path, wnids)) in enumerate(flat.items(), len(tars) + 1):
        with open_for_pread(path) as descriptor:
            found = tar_scan.find_images(
                descriptor, 0, os.fstat(descriptor).st_size, str(path), any_extension
            )
        classes = [labels[wnid] for wnid in _flat_classes(found.names.tolist(), wnids, path)]
        if check == DECODE:
            _decode_flat(path, found, workers, decode_chunk)
        columns[split] = _Columns()
        columns[split].add(found, np.array(classes), shard=len(columns) - 1)
        progress(number, total)
    return Scan(
        {split: parts.index.array() for split, parts in columns.items()},
        {split: parts.facts.array() for split, parts in columns.items()},
        {split: parts.names.array() for split, parts in columns.items()},
    )


@dataclass
class _Columns:
    """Columns of a scan, in temporary files."""

    index: ColumnFile = field(default_factory=ColumnFile)
    facts: ColumnFile = field(default_factory=ColumnFile)
    names: ColumnFile = field(default_factory=ColumnFile)

    def add(self, found: ImageEntries, labels: Array | int, shard: int) -> None:
        entries = np.empty(len(found.names), ENTRY)
        entries["offset"], entries["length"] = found.offsets, found.lengths
        entries["label"], entries["shard"] = labels, shard
        self.index.append(entries)
        self.facts.append(found.facts)
        self.names.append(_shortened(found.names))


def _shortened(names: Array) -> Array:
    """Return names without the columns that are empty in all of them; a tar's header has 100."""
    columns = np.flatnonzero(names.view(np.uint8).reshape(len(names), -1).any(0))
    return names.astype(f"S{columns[-1] + 1 if len(columns) else 1}")


def find_class_tars(descriptor: int, train: Path, devkit: Devkit) -> list[ClassTar]:
    """Return the class tars of an open train archive and check that they are exactly the devkit's classes.

    Raises:
        UserError: a class is missing, unknown or duplicated, or a member is not a class tar.
    """
    tars = []
    for member in members(descriptor, 0, os.fstat(descriptor).st_size, str(train)):
        wnid, ending = posixpath.splitext(posixpath.basename(member.name))
        if ending != ".tar":
            raise UserError(
                f"{train}: contains {member.name}, but one tar per class is expected (n01440764.tar …); "
                "is dataset.archives.train.file the train archive?"
            )
        tars.append(ClassTar(wnid, member.offset, member.offset + member.length))
    if not tars:
        raise UserError(f"{train}: an empty archive")
    found = {tar.wnid for tar in tars}
    if len(found) < len(tars):
        duplicate = next(tar.wnid for tar in tars if sum(other.wnid == tar.wnid for other in tars) > 1)
        raise UserError(f"{train}: class {duplicate} occurs twice")
    if unknown := sorted(found - devkit.names.keys()):
        raise UserError(f"{train}: {_classes_are(unknown)} in the archive but not in the development kit")
    if missing := sorted(devkit.names.keys() - found):
        raise UserError(f"{train}: {_classes_are(missing)} in the development kit but missing in the archive")
    return tars


@contextlib.contextmanager
def open_for_pread(path: Path, sequential: bool = False) -> Iterator[int]:
    """Open a file for `pread`, with a hint for the kernel.

    Args:
        path: file to read.
        sequential: whether the kernel should read ahead; not useful for headers that are 100 kB apart.

    Raises:
        UserError: the file does not exist.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; submit +stage=download to fetch it") from None
    try:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                advice = os.POSIX_FADV_SEQUENTIAL if sequential else os.POSIX_FADV_RANDOM
                os.posix_fadvise(descriptor, 0, 0, advice)
        yield descriptor
    finally:
        os.close(descriptor)


def _scan_class(train: Path, tar: ClassTar, decode: bool, any_extension: bool) -> ImageEntries:
    with open_for_pread(train) as descriptor:
        where = f"{train}: {tar.wnid}.tar"
        found = tar_scan.find_images(descriptor, tar.begin, tar.end, where, any_extension)
        if decode:
            _decode(descriptor, found)
    return found


def _decode(descriptor: int, found: ImageEntries) -> None:
    """Set the flag CORRUPT of the images that cannot be decoded."""
    for i, (offset, length) in enumerate(zip(found.offsets.tolist(), found.lengths.tolist(), strict=True)):
        if image_header.decode_error(os.pread(descriptor, length, offset)):
            found.facts["marks"][i] |= image_header.CORRUPT


def _decode_flat(path: Path, found: ImageEntries, workers: int, chunk: int) -> None:
    chunks = [
        ImageEntries(*(column[begin : begin + chunk] for column in found))
        for begin in range(0, len(found.names), chunk)
    ]
    flags = list(process_pool.map_in_order(functools.partial(_decoded_flags, path), chunks, workers))
    found.facts["marks"][:] = np.concatenate(flags)


def _decoded_flags(path: Path, chunk: ImageEntries) -> Array:
    with open_for_pread(path) as descriptor:
        _decode(descriptor, chunk)
    return chunk.facts["marks"]


def _flat_classes(names: list[bytes], wnids: Sequence[str], path: Path) -> list[str]:
    """Return the wnid of every image of a flat archive, in the order of `names`.

    Args:
        names: file names in the archive.
        wnids: wnid of every image, in the order of the sorted names.
        path: the archive, for errors.
    """
    if len(names) != len(wnids):
        raise UserError(
            f"{path}: {len(names)} images, but the ground truth of the development kit has {len(wnids)} lines"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two images have the same file name in different folders")
    order = sorted(range(len(names)), key=names.__getitem__)
    classes = [""] * len(names)
    for i, wnid in zip(order, wnids, strict=True):
        classes[i] = wnid
    return classes


def name_list(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _classes_are(wnids: list[str]) -> str:
    """Return the start of a sentence, such as `classes n1, n2, n3 and 7 more are`."""
    return f"class {wnids[0]} is" if len(wnids) == 1 else f"classes {name_list(wnids)} are"
