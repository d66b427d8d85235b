"""Shard writer: plan which image goes into which shard, and write each shard independently.

The plan is a function of the scan and the settings, so that any number of jobs can share the work and a
shard has the same bytes whichever job writes it. A shard is complete once its receipt `<shard>.json` exists;
`<shard>.npy` stores the byte offset of each image. The shards of one plan are in a folder of their own.

Members are named `<wnid>/<name>.JPEG` and `<wnid>/<name>.cls` (the label in digits): webdataset makes one
sample of the two, and GNU tar extracts one folder per class.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpc_imagenet.config.schema import Process
from hpc_imagenet.data.ilsvrc.scan import name_list, open_for_pread
from hpc_imagenet.data.ilsvrc.scanned_archives import ProgressCallback, ScannedArchives
from hpc_imagenet.data.images.image_header import FACTS, OTHER, PNG, ImageInfo
from hpc_imagenet.data.images.shard_transform import ShardTransform, shard_transform
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.data.tar.tar_writer import TarWriter
from hpc_imagenet.datastore.index import ENTRY, Index
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk, process_pool
from hpc_imagenet.io.atomic_files import (
    atomic_write,
    make_read_only,
    read_json,
    write_again_if_removed,
    write_json,
)
from hpc_imagenet.io.tar_header import BLOCK

# Location of an image in a shard; `row` is its row in the scan, and a corrupt image has length 0.
LOCATION = np.dtype([("row", "<u4"), *ENTRY.descr[:2], *FACTS.descr])
_OVERHEAD = 3 * BLOCK  # bytes per image in addition to its data: two headers and the label
_LABEL = ".cls"
_JPEG = (".jpg", ".jpeg")


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write: the rows of a split's scan, in this order."""

    name: str
    split: str
    rows: Array
    bytes: int  # estimate


@dataclass(frozen=True)
class ShardReceipt:
    """The receipt of a complete shard."""

    key: str  # key of its plan
    bytes: int
    hash: str
    images: int
    skipped: list[str]  # names of images that cannot be decoded


@dataclass(frozen=True)
class ShardPlan:
    """All shards for given archives and settings, and the folder they are written to."""

    folder: Path
    key: str
    scanned: ScannedArchives
    process: Process
    transform: ShardTransform
    tools: dict[str, str]
    shards: list[PlannedShard]

    def receipt(self, shard: PlannedShard) -> ShardReceipt | None:
        """Return the receipt of a shard, or None if the shard is not complete."""
        try:
            receipt = ShardReceipt(**(read_json(self.folder / f"{shard.name}.json") or {}))
            size = (self.folder / f"{shard.name}.tar").stat().st_size
        except (TypeError, ValueError, FileNotFoundError):
            return None
        matches = (receipt.key, receipt.bytes) == (self.key, size)
        complete = matches and (self.folder / f"{shard.name}.npy").exists()
        return receipt if complete else None


@dataclass(frozen=True)
class ShardContents:
    """The images of all shards, in archive order even if the shards are shuffled."""

    shards: tuple[File, ...]
    splits: dict[str, Index]
    facts: dict[str, Array]
    names: dict[str, Array]
    skipped: list[str]


def plan_shards(root: Path, scanned: ScannedArchives, process: Process) -> ShardPlan:
    """Return the plan of all shards.

    The size of a shard of copied images is `process.shard_size`, up to one image. For resized images it is
    approximate, because their sizes are estimated from the number of pixels.

    Raises:
        UserError: jpegtran is needed but not installed, or two images of a class have the same name.
    """
    transform = shard_transform(process)
    tools = transform.tools()
    shards = []
    for split in scanned.scan.splits:
        sizes = _estimate_sizes(scanned, split, transform)
        rows = np.arange(len(sizes))
        if process.order == "shuffled" and split == "train":
            rows = np.random.Generator(np.random.PCG64(process.seed)).permutation(len(sizes))
        ends = np.cumsum(sizes[rows])
        numbers = (ends - 1) // max(1, int(process.shard_size * 2**30))
        for number, shard_rows in enumerate(np.split(rows, np.flatnonzero(np.diff(numbers)) + 1)):
            size = int(sizes[shard_rows].sum())
            shards.append(PlannedShard(f"{split}-{number:05d}", split, shard_rows, size))
    if len(shards) > np.iinfo(ENTRY["shard"]).max:
        raise UserError(
            f"process.shard_size={process.shard_size} (GiB) gives {len(shards)} shards, more than 65535: "
            "use a larger process.shard_size"
        )
    _require_distinct(scanned)
    key = scanned.key(process.identity(), tools)
    return ShardPlan(root / f"shards-{key}", key, scanned, process, transform, tools, shards)


def write_shards(
    plan: ShardPlan, shards: Sequence[PlannedShard], workers: int, progress: ProgressCallback
) -> int:
    """Write those of `shards` that are not complete.

    Args:
        plan: the plan of the shards.
        shards: the shards of `plan` that this job writes.
        workers: maximum number of processes.
        progress: callback with (images done, images in total) of these shards.

    Returns:
        number of images in `shards`.

    Raises:
        UserError: not enough free space; an image is corrupt and `process.on_corrupt` is fail; or an archive
            changed while it was read.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if plan.receipt(shard) is None]
    disk.require_free_space(
        plan.folder, sum(shard.bytes for shard in missing), "the shards", 3 * len(missing)
    )
    total = sum(len(shard.rows) for shard in shards)
    done = total - sum(len(shard.rows) for shard in missing)
    progress(done, total)
    write = functools.partial(_write_shard, _Settings.of(plan))
    for images in process_pool.map_in_order(write, [_Images.of(plan, shard) for shard in missing], workers):
        done += images
        progress(done, total)
    plan.scanned.require_unchanged()
    return total


def combine_receipts(plan: ShardPlan) -> ShardContents:
    """Combine the receipts of all shards; no shard is read.

    Raises:
        UserError: shards are missing.
    """
    receipts = {shard.name: plan.receipt(shard) for shard in plan.shards}
    if missing := [name for name, receipt in receipts.items() if receipt is None]:
        raise UserError(
            f"{plan.folder}: shards {name_list(missing)} of {len(receipts)} are missing; "
            "retry the parts of this run"
        )
    splits = {split: entries.copy() for split, entries in plan.scanned.scan.splits.items()}
    facts = {split: split_facts.copy() for split, split_facts in plan.scanned.scan.facts.items()}
    files, skipped = [], []
    for entries in splits.values():
        entries["length"] = 0
    for number, shard in enumerate(plan.shards):
        receipt = receipts[shard.name]
        assert receipt is not None
        locations = np.load(plan.folder / f"{shard.name}.npy", allow_pickle=False)
        if not np.array_equal(locations["row"], shard.rows):
            raise UserError(f"{plan.folder / shard.name}.npy is damaged; remove it and retry the run")
        entries, rows = splits[shard.split], shard.rows
        entries["offset"][rows], entries["length"][rows] = locations["offset"], locations["length"]
        entries["shard"][rows] = number
        for column in FACTS.names or ():
            facts[shard.split][column][rows] = locations[column]
        files.append(File(f"{plan.folder.name}/{shard.name}.tar", receipt.bytes, receipt.hash))
        skipped += receipt.skipped
    kept = {split: entries["length"] > 0 for split, entries in splits.items()}
    return ShardContents(
        tuple(files),
        {split: entries[kept[split]] for split, entries in splits.items()},
        {split: split_facts[kept[split]] for split, split_facts in facts.items()},
        {split: names[kept[split]] for split, names in plan.scanned.scan.names.items()},
        skipped,
    )


@dataclass(frozen=True)
class _Settings:
    """What all shards of a plan have in common; picklable for worker processes."""

    folder: Path
    key: str
    archives: dict[str, Path]
    mtimes: dict[str, int]
    wnids: list[str]
    transform: ShardTransform
    skip: bool

    @classmethod
    def of(cls, plan: ShardPlan) -> _Settings:
        scanned = plan.scanned
        return cls(
            plan.folder,
            plan.key,
            scanned.archives,
            {split: receipt.mtime_ns for split, receipt in scanned.receipts.items()},
            list(scanned.devkit.names),
            plan.transform,
            plan.process.on_corrupt == "skip",
        )


@dataclass(frozen=True)
class _Images:
    """The images of one shard; picklable for worker processes."""

    shard: PlannedShard
    entries: Index
    facts: Array
    names: Array

    @classmethod
    def of(cls, plan: ShardPlan, shard: PlannedShard) -> _Images:
        found, split, rows = plan.scanned.scan, shard.split, shard.rows
        return cls(shard, found.splits[split][rows], found.facts[split][rows], found.names[split][rows])

    def __iter__(self) -> Iterator[tuple[int, int, int, ImageInfo, str]]:
        columns: tuple[Iterable[int], ...] = tuple(
            self.entries[column].tolist() for column in ("offset", "length", "label")
        )
        infos = (ImageInfo(*facts) for facts in self.facts.tolist())
        return zip(*columns, infos, map(os.fsdecode, self.names.tolist()), strict=True)


def _write_shard(settings: _Settings, images: _Images) -> int:
    """Write one shard; return its number of images, including corrupt ones that are left out."""
    path = settings.folder / f"{images.shard.name}.tar"
    for leftover in settings.folder.glob(f".{path.stem}.*.tmp"):  # of a killed attempt
        leftover.unlink(missing_ok=True)
    return write_again_if_removed(lambda: _write_files(settings, images, path))


def _write_files(settings: _Settings, images: _Images, path: Path) -> int:
    """Write the tar, the locations and the receipt of a shard."""
    shard = images.shard
    locations = np.zeros(len(shard.rows), LOCATION)
    locations["row"] = shard.rows
    skipped = []
    with (
        open_for_pread(
            settings.archives[shard.split], sequential=len(shard.rows) == np.ptp(shard.rows) + 1
        ) as descriptor,
        atomic_write(path) as file,
    ):
        with TarWriter(file) as tar:
            for i, (offset, length, label, info, name) in enumerate(images):
                try:
                    location = _add_image(tar, settings, descriptor, offset, length, label, info, name)
                except ValueError as error:
                    if not settings.skip:
                        raise UserError(
                            f"{settings.archives[shard.split]}: {name} cannot be decoded ({error}); "
                            "set process.on_corrupt=skip to leave such images out"
                        ) from None
                    skipped.append(name)
                else:
                    locations[i] = (shard.rows[i], *location)
        if os.fstat(descriptor).st_mtime_ns != settings.mtimes[shard.split]:
            raise _changed(settings.archives[shard.split])
        make_read_only(file.fileno())  # an upload can hard-link it into a datastore
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, locations, allow_pickle=False)
    receipt = ShardReceipt(settings.key, tar.size, tar.hash, len(shard.rows) - len(skipped), skipped)
    write_json(path.with_suffix(".json"), asdict(receipt))
    return len(shard.rows)


def _add_image(
    tar: TarWriter,
    settings: _Settings,
    descriptor: int,
    offset: int,
    length: int,
    label: int,
    info: ImageInfo,
    name: str,
) -> tuple[int, int, int, int, int]:
    """Add an image and its label to a shard; return the fields of `LOCATION` after `row`."""
    stem, ending = posixpath.splitext(f"{settings.wnids[label]}/{name}")
    if settings.transform.copies:
        try:
            begin = tar.copy(stem + ending, descriptor, offset, length)
        except EOFError:
            raise _changed(settings.archives["train"].parent) from None
    else:
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise _changed(settings.archives["train"].parent)
        data, info = settings.transform(data, info)
        if not info.flags & (PNG | OTHER) and ending.lower() not in _JPEG:
            ending = _JPEG[0]  # webdataset chooses the decoder by the extension
        begin, length = tar.add(stem + ending, data), len(data)
    tar.add(stem + _LABEL, b"%d" % label)
    return begin, length, *info


def _changed(path: Path) -> UserError:
    return UserError(f"{path} changed while it was read; submit +stage=download to verify it again")


def _estimate_sizes(scanned: ScannedArchives, split: str, transform: ShardTransform) -> Array:
    """Return the estimated bytes of each image in a shard, shape [images]."""
    facts, lengths = scanned.scan.facts[split], scanned.scan.splits[split]["length"].astype(np.int64)
    if transform.side:
        width, height = facts["width"].astype(np.float64), facts["height"].astype(np.float64)
        side = np.minimum(width, height) if transform.side == "short" else np.maximum(width, height)
        lengths = (lengths * np.minimum(1, transform.px / side) ** 2).astype(np.int64)
    return lengths + -lengths % BLOCK + _OVERHEAD


def _require_distinct(scanned: ScannedArchives) -> None:
    """Raise if two images of a class have the same name without extension: they would be one sample."""
    for split, entries in scanned.scan.splits.items():
        labels, names = entries["label"], scanned.scan.names[split]
        order = np.argsort(labels, kind="stable")  # class by class, so that few names are in memory
        for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            stems = [name.rpartition(b".")[0] for name in names[rows].tolist()]
            if len(set(stems)) < len(stems):
                ((stem, _),) = Counter(stems).most_common(1)
                wnid = list(scanned.devkit.names)[labels[rows[0]]]
                raise UserError(
                    f"{scanned.archives[split]}: two images of class {wnid} are named {os.fsdecode(stem)}; "
                    "in shards, names must be unique within a class"
                )
