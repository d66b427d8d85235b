"""New shards: which image lies in which, and how one is made, independent of all others.

Where each image belongs is a function of the scan and the settings, so that any number of jobs can share the
work: a shard's bytes are the same whoever makes it. A shard is whole when its receipt `<shard>.json` is
written; beside it `<shard>.npy` says where each image lies. All of a transform is in one folder of its own.

Members are called `<wnid>/<name>.JPEG` and `<wnid>/<name>.cls`, which holds the label in digits: webdataset
makes one sample of the two, and GNU tar one folder a class.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpc_imagenet.config.schema import Process
from hpc_imagenet.data.ilsvrc.scan import SPLITS, open_for_pread
from hpc_imagenet.data.ilsvrc.scanned_archives import ScannedArchives
from hpc_imagenet.data.images.image_header import FACTS, OTHER, PNG, ImageInfo
from hpc_imagenet.data.images.shard_transform import ShardTransform, shard_transform
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.data.tar.tar_writer import TarWriter
from hpc_imagenet.datastore.index import ENTRY, Index
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.reader.dataset_reader import TAR_BLOCK
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk, process_pool
from hpc_imagenet.io.atomic_files import atomic_write, make_read_only, read_json, write_json

# Where an image of a shard lies; `row` is its place in the index. One left out as corrupt has length 0.
PLACED = np.dtype([("row", "<u4"), *ENTRY.descr[:2], *FACTS.descr])
_AROUND = 3 * TAR_BLOCK  # two headers and the label: what a shard holds beside an image
_LABEL = ".cls"
_JPEG = (".jpg", ".jpeg")


@dataclass(frozen=True)
class PlannedShard:
    """One shard to be made: the images `rows` of a split's scan, in this order."""

    name: str
    split: str
    rows: Array
    bytes: int  # about


@dataclass(frozen=True)
class ShardReceipt:
    """The receipt of a shard."""

    key: str  # of the plan it belongs to
    bytes: int
    hash: str
    images: int
    skipped: list[str]  # names of images that could not be decoded


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a transform of some archives, and the folder they belong in."""

    folder: Path
    key: str
    survey: ScannedArchives
    process: Process
    transform: ShardTransform
    tools: dict[str, str]
    shards: list[PlannedShard]

    def receipt(self, shard: PlannedShard) -> ShardReceipt | None:
        """Return the receipt of a shard that is whole."""
        try:
            made = ShardReceipt(**(read_json(self.folder / f"{shard.name}.json") or {}))
            size = (self.folder / f"{shard.name}.tar").stat().st_size
        except (TypeError, ValueError, FileNotFoundError):
            return None
        whole = (made.key, made.bytes) == (self.key, size) and (self.folder / f"{shard.name}.npy").exists()
        return made if whole else None


@dataclass(frozen=True)
class ShardContents:
    """What all shards hold together, in the order of the archives whatever that of the shards is."""

    shards: tuple[File, ...]
    splits: dict[str, Index]
    facts: dict[str, Array]
    names: dict[str, Array]
    skipped: list[str]


def plan_shards(root: Path, survey: ScannedArchives, process: Process) -> ShardPlan:
    """Return which shards there shall be.

    A shard of images that stay as they are has the wanted size, up to an image; one of resized images about,
    as what comes out is only guessed from the number of pixels.

    Raises:
        UserError: jpegtran is needed and missing; two images of a class have one name.
    """
    how = shard_transform(process)
    tools = how.tools()
    shards = []
    for split in SPLITS:
        sizes = _guess(survey, split, how)
        rows = np.arange(len(sizes))
        if process.order == "shuffled" and split == "train":
            rows = np.random.Generator(np.random.PCG64(process.seed)).permutation(len(sizes))
        ends = np.cumsum(sizes[rows])
        numbers = (ends - 1) // max(1, int(process.shard_size * 2**30))
        for number, of in enumerate(np.split(rows, np.flatnonzero(np.diff(numbers)) + 1)):
            shards.append(PlannedShard(f"{split}-{number:05d}", split, of, int(sizes[of].sum())))
    if len(shards) > np.iinfo(ENTRY["shard"]).max:
        raise UserError(f"process.shard_size={process.shard_size} makes {len(shards)} shards: 65535 at most")
    _require_distinct(survey)
    key = survey.key(process.identity(), tools)
    return ShardPlan(root / f"shards-{key}", key, survey, process, how, tools, shards)


def write_shards(
    plan: ShardPlan, shards: Sequence[PlannedShard], workers: int, progress: Callable[[int, int], None]
) -> int:
    """Make those of `shards` that are not there yet.

    Args:
        plan: what they belong to.
        shards: some of it.
        workers: processes that may be used.
        progress: told (images done, images of these shards).

    Returns:
        the images of all of `shards`.

    Raises:
        UserError: no room; an image is corrupt, and `process.on_corrupt` is fail; an archive changed.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if plan.receipt(shard) is None]
    disk.require_free_space(
        plan.folder, sum(shard.bytes for shard in missing), "the shards", 3 * len(missing)
    )
    total = sum(len(shard.rows) for shard in shards)
    done = total - sum(len(shard.rows) for shard in missing)
    progress(done, total)
    work = functools.partial(_make, _Work.of(plan))
    for made in process_pool.map_in_order(work, [_Images.of(plan, shard) for shard in missing], workers):
        done += made
        progress(done, total)
    plan.survey.require_unchanged()
    return total


def combine_receipts(plan: ShardPlan) -> ShardContents:
    """Put together what the shards' receipts say; no shard is read.

    Raises:
        UserError: shards are missing.
    """
    receipts = {shard.name: plan.receipt(shard) for shard in plan.shards}
    if missing := [name for name, made in receipts.items() if made is None]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{plan.folder}: of {len(receipts)} shards {', '.join(missing[:3])}{more} are not there: "
            "retry the parts of this run"
        )
    splits = {split: of.copy() for split, of in plan.survey.scan.splits.items()}
    facts = {split: of.copy() for split, of in plan.survey.scan.facts.items()}
    files, skipped = [], []
    for entries in splits.values():
        entries["length"] = 0
    for number, shard in enumerate(plan.shards):
        made = receipts[shard.name]
        assert made is not None
        placed = np.load(plan.folder / f"{shard.name}.npy", allow_pickle=False)
        if not np.array_equal(placed["row"], shard.rows):
            raise UserError(f"{plan.folder / shard.name}.npy is damaged: remove it, then ask again")
        entries, rows = splits[shard.split], shard.rows
        entries["offset"][rows], entries["length"][rows] = placed["offset"], placed["length"]
        entries["shard"][rows] = number
        for column in FACTS.names or ():
            facts[shard.split][column][rows] = placed[column]
        files.append(File(f"{plan.folder.name}/{shard.name}.tar", made.bytes, made.hash))
        skipped += made.skipped
    kept = {split: entries["length"] > 0 for split, entries in splits.items()}
    return ShardContents(
        tuple(files),
        {split: entries[kept[split]] for split, entries in splits.items()},
        {split: of[kept[split]] for split, of in facts.items()},
        {split: of[kept[split]] for split, of in plan.survey.scan.names.items()},
        skipped,
    )


@dataclass(frozen=True)
class _Work:
    """What all shards have in common, in a form that travels to another process."""

    folder: Path
    key: str
    archives: dict[str, Path]
    mtimes: dict[str, int]
    wnids: list[str]
    transform: ShardTransform
    skip: bool

    @classmethod
    def of(cls, plan: ShardPlan) -> _Work:
        survey = plan.survey
        return cls(
            plan.folder,
            plan.key,
            survey.archives,
            {split: receipt.mtime_ns for split, receipt in survey.receipts.items()},
            list(survey.devkit.names),
            plan.transform,
            plan.process.on_corrupt == "skip",
        )


@dataclass(frozen=True)
class _Images:
    """What a shard is made of, in a form that travels."""

    shard: PlannedShard
    entries: Index
    facts: Array
    names: Array

    @classmethod
    def of(cls, plan: ShardPlan, shard: PlannedShard) -> _Images:
        found, split, rows = plan.survey.scan, shard.split, shard.rows
        return cls(shard, found.splits[split][rows], found.facts[split][rows], found.names[split][rows])

    def __iter__(self) -> Iterator[tuple[int, int, int, ImageInfo, str]]:
        columns: tuple[Iterable[int], ...] = tuple(
            self.entries[column].tolist() for column in ("offset", "length", "label")
        )
        looks = (ImageInfo(*facts) for facts in self.facts.tolist())
        return zip(*columns, looks, map(os.fsdecode, self.names.tolist()), strict=True)


def _make(work: _Work, images: _Images) -> int:
    """Make one shard; return how many images were put in or left out."""
    shard, path = images.shard, work.folder / f"{images.shard.name}.tar"
    for leftover in work.folder.glob(f".{path.stem}.*.tmp"):  # of a try that was killed
        leftover.unlink(missing_ok=True)
    placed = np.zeros(len(shard.rows), PLACED)
    placed["row"] = shard.rows
    skipped = []
    with (
        open_for_pread(
            work.archives[shard.split], ahead=len(shard.rows) == np.ptp(shard.rows) + 1
        ) as descriptor,
        atomic_write(path) as file,
    ):
        with TarWriter(file) as packer:
            for i, (offset, length, label, look, name) in enumerate(images):
                try:
                    put = _put(packer, work, descriptor, offset, length, label, look, name)
                except ValueError as error:
                    if not work.skip:
                        raise UserError(
                            f"{work.archives[shard.split]}: {name} cannot be decoded ({error}); "
                            "process.on_corrupt=skip leaves such images out"
                        ) from None
                    skipped.append(name)
                else:
                    placed[i] = (shard.rows[i], *put)
        if os.fstat(descriptor).st_mtime_ns != work.mtimes[shard.split]:
            raise _changed(work.archives[shard.split])
        make_read_only(file.fileno())  # a datastore will have it by a second name
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, placed, allow_pickle=False)
    made = ShardReceipt(work.key, packer.size, packer.hash, len(shard.rows) - len(skipped), skipped)
    write_json(path.with_suffix(".json"), asdict(made))
    return len(shard.rows)


def _put(
    packer: TarWriter,
    work: _Work,
    descriptor: int,
    offset: int,
    length: int,
    label: int,
    look: ImageInfo,
    name: str,
) -> tuple[int, int, int, int, int]:
    """Put an image and its label into a shard; return the columns of `PLACED` behind the row."""
    stem, ending = posixpath.splitext(f"{work.wnids[label]}/{name}")
    if work.transform.copies:
        try:
            begin = packer.copy(stem + ending, descriptor, offset, length)
        except EOFError:
            raise _changed(work.archives["train"].parent) from None
    else:
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise _changed(work.archives["train"].parent)
        data, look = work.transform(data, look)
        if not look.flags & (PNG | OTHER) and ending.lower() not in _JPEG:
            ending = _JPEG[0]  # webdataset decodes by the ending
        begin, length = packer.add(stem + ending, data), len(data)
    packer.add(stem + _LABEL, b"%d" % label)
    return begin, length, *look


def _changed(path: Path) -> UserError:
    return UserError(f"{path} changed while it was read: +stage=download looks at it again")


def _guess(survey: ScannedArchives, split: str, how: ShardTransform) -> Array:
    """Return how many bytes of a shard each image will take, about."""
    facts, lengths = survey.scan.facts[split], survey.scan.splits[split]["length"].astype(np.int64)
    if how.side:
        width, height = facts["width"].astype(np.float64), facts["height"].astype(np.float64)
        side = np.minimum(width, height) if how.side == "short" else np.maximum(width, height)
        lengths = (lengths * np.minimum(1, how.px / side) ** 2).astype(np.int64)
    return lengths + -lengths % TAR_BLOCK + _AROUND


def _require_distinct(survey: ScannedArchives) -> None:
    """Refuse images that would be one sample: of one class, and the same name up to its ending."""
    for split in SPLITS:
        labels = survey.scan.splits[split]["label"].tolist()
        seen: set[tuple[int, bytes]] = set()
        for label, name in zip(labels, survey.scan.names[split].tolist(), strict=True):
            stem = (label, name.rpartition(b".")[0])
            if stem in seen:
                raise UserError(
                    f"{survey.archives[split]}: two images of class {list(survey.devkit.names)[label]} are "
                    f"called {os.fsdecode(stem[1])}; shards have one folder a class"
                )
            seen.add(stem)
