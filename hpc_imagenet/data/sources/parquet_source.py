"""Parquet shards in the format of ILSVRC/imagenet-1k on the Hugging Face hub as a source of archives.

    [data/]train-00000-of-00294.parquet …  [data/]validation-00000-of-00014.parquet …

Columns: `image` (bytes and path, or bytes) and `label`. The wnid is taken from the end of the path
(n01440764_10026_n01440764.JPEG) and removed from the name; where the path has none, the class is named by its
label. The images are unordered, but a class tar is contiguous: so the shards are read twice, for the sizes
and for the bytes, and the archives once more for the MD5.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.partial_file import PartialFile, allocated_bytes
from hpc_imagenet.data.download.verified_download import download_and_verify
from hpc_imagenet.data.sources.class_folder_source import devkit
from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.data.sources.virtual_tar import InMemoryFile
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk
from hpc_imagenet.io.tar_header import END, member_header, tar_member

KIND = "parquet shards"
ROWS = 64  # images in memory at a time
_SPLITS = {"train": ("train",), "val": ("validation", "val")}
_NAME = re.compile(r"(?P<stem>.+)_(?P<wnid>n\d{8})\.(?P<ending>\w+)")
_SHARD = re.compile(r"(?P<begin>.+)-(?P<number>[0-9]{1,9})-of-(?P<of>[0-9]{1,9}).*")


@dataclass
class _SplitPlan:
    """Layout of a split's archive: offsets and sizes by class."""

    archive_bytes: int = 0
    begins: dict[str, int] = field(default_factory=dict)  # class → offset of its first member
    sizes: dict[str, int] = field(default_factory=dict)  # class → bytes of its members
    images: dict[str, int] = field(default_factory=dict)  # class → number of images
    val: list[tuple[str, str]] = field(default_factory=list)  # (member name, class), sorted; val only
    state: str = ""  # hash of the shards' names, sizes and mtimes


def find_parquet_shards(folder: Path) -> dict[str, list[Path]] | None:
    """Return split (train, val) → shards; None if there are none.

    Raises:
        UserError: a split has no shards, some are missing, or they are of several exports.
    """
    found = {}
    for parent in (folder, folder / "data"):
        found[parent] = {
            split: sorted(path for name in names for path in parent.glob(f"{name}-*.parquet"))
            for split, names in _SPLITS.items()
        }
        if all(found[parent].values()):
            for split, paths in found[parent].items():
                _require_all_shards(parent, split, paths)
            return found[parent]
    for parent, shards in found.items():
        if shards["train"]:
            test = any(parent.glob("test-*.parquet"))
            fix = "rename test-* to validation-* if its images have labels" if test else "fetch them"
            raise UserError(
                f"{parent} has train-*.parquet, but no validation-*.parquet; {fix}, or write class folders "
                "and set dataset=images"
            )
        if shards["val"]:
            raise UserError(f"{parent} has validation-*.parquet, but no train-*.parquet; fetch them")
    return None


def _require_all_shards(folder: Path, split: str, paths: list[Path]) -> None:
    """Require all shards of one export: train-00000-of-00294.parquet … train-00293-of-00294.parquet."""
    two: tuple[str, str] | None = None  # shards of different exports
    if paths[0].name.partition("-")[0] != paths[-1].name.partition("-")[0]:  # val and validation
        two = paths[0].name, paths[-1].name
    shards = [path.name for path in paths if _SHARD.fullmatch(path.name)]
    if shards and len(shards) < len(paths):
        two = next(path.name for path in paths if path.name not in shards), shards[0]
    exports: dict[str, dict[int, re.Match[str]]] = {}  # beginning of the names → number → name
    for name in filter(None, (_SHARD.fullmatch(path.name) for path in paths)):
        export = exports.setdefault(name["begin"], {})
        first = next(iter(export.values()), name)
        other = first if first["of"] != name["of"] else export.setdefault(int(name["number"]), name)
        if other is not name:
            two = other.string, name.string
    if two:
        raise UserError(f"{folder} has two exports of {split}, as {two[0]} and {two[1]}; remove those of one")
    for begin, export in exports.items():
        number, of = next(iter(export.values())).group("number", "of")
        start = 1 if int(of) in export else 0
        missing = next((n for n in range(start, start + int(of)) if n not in export), None)
        if missing is not None:
            raise UserError(
                f"{folder}: {begin} has {len(export)} of {int(of)} shards, the first missing is "
                f"{begin}-{missing:0{len(number)}d}-of-{of}; fetch the missing ones"
            )


class ParquetSource:
    """A source of archives that are made of parquet shards.

    Args:
        shards: split (train, val) → shards.
        source: dataset.source.
        files: split (train, val, devkit) → file name of its archive.
    """

    copies = True

    def __init__(self, shards: dict[str, list[Path]], source: str, files: dict[str, str]) -> None:
        self._shards = shards
        self._source = source
        self._split_of = {file: split for split, file in files.items()}

    def remove_outdated(self, folder: Path) -> None:
        """Remove the archives in a folder that were made of shards which have changed since."""
        for file, split in self._split_of.items():
            receipt.remove_outdated(folder / file, self._source, self._state(split))

    def text(self, file: str) -> str | None:
        """Return None: there are no text files such as md5sums beside parquet shards."""
        return None

    def size(self, expected: ExpectedArchive) -> int | None:
        """Return the size that an archive will have, in bytes."""
        split = self._split_of[expected.file]
        return self._devkit.length if split == "devkit" else self._plans[split].archive_bytes

    def fetch(self, expected: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Write an archive and its receipt; return the bytes transferred over the network: 0.

        Raises:
            UserError: the shards are invalid.
        """
        split = self._split_of[expected.file]
        folder = self._shards["train"][0].parent

        def fill(part: PartialFile) -> int:
            size = self.size(expected) or 0
            origin = Origin(f"{folder} as {expected.file}", self._state(split), None, size, ranges=True)
            if part.origin != origin:
                part.restart(origin)
            disk.require_free_space(target.parent, size - allocated_bytes(part.target), expected.file)
            for at, data in self._chunks(split):
                if not part.has(at, at + len(data)):
                    part.write(at, data)
                progress(part.size)
                part.save_state(if_due=True)
            return 0

        return download_and_verify(
            expected, target, f"{folder} as {expected.file}", self._source, fill, progress
        )

    def _state(self, split: str) -> str:
        return self._devkit.state if split == "devkit" else self._plans[split].state

    def _chunks(self, split: str) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, data) until an archive is complete, in the order of the shards."""
        if split == "devkit":
            yield 0, self._devkit.read_from(0)
            return
        plan = self._plans[split]
        next_offset = dict(plan.begins)
        for name, wnid, data in self._images(split):
            member = tar_member(name, data)
            yield next_offset[wnid], member
            next_offset[wnid] += len(member)
        if split == "train":
            for wnid, begin in plan.begins.items():
                header = member_header(f"{wnid}.tar", plan.sizes[wnid] + len(END))
                yield begin - len(header), header
                yield begin + plan.sizes[wnid], END
        yield plan.archive_bytes - len(END), END

    @cached_property
    def _plans(self) -> dict[str, _SplitPlan]:
        return {split: self._plan_split(split) for split in _SPLITS}

    def _plan_split(self, split: str) -> _SplitPlan:
        plan, digest = _SplitPlan(), hashlib.sha256()
        for path in self._shards[split]:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        plan.state = digest.hexdigest()
        names_in_tar: dict[str, set[str]] = {}
        for name, wnid, data in self._images(split):
            plan.sizes[wnid] = plan.sizes.get(wnid, 0) + len(tar_member(name, data))
            plan.images[wnid] = plan.images.get(wnid, 0) + 1
            names = names_in_tar.setdefault(wnid if split == "train" else "", set())
            if name in names:
                raise UserError(
                    f"{self._shards[split][0].parent}: two images of {split} have the name {name}; fetch the "
                    "shards again"
                )
            names.add(name)
            if split == "val":
                plan.val.append((name, wnid))
        plan.val.sort()
        at = 0
        for wnid in sorted(plan.sizes):
            if split == "train":
                at += len(member_header(f"{wnid}.tar", 0))
            plan.begins[wnid] = at
            at += plan.sizes[wnid] + (len(END) if split == "train" else 0)
        plan.archive_bytes = at + len(END)
        return plan

    @cached_property
    def _devkit(self) -> InMemoryFile:
        train, val = self._plans["train"], self._plans["val"]
        for _, wnid in val.val:
            if wnid not in train.images:
                raise UserError(
                    f"{self._source}: class {wnid} is in the val shards, but not in the train shards; add "
                    "the missing train shards"
                )
        class_names = self._class_names()
        classes = {wnid: (class_names.get(wnid, wnid), count) for wnid, count in train.images.items()}
        return devkit(classes, [wnid for _, wnid in val.val])

    def _images(self, split: str) -> Iterator[tuple[str, str, bytes]]:
        """Yield (member name, class, bytes) of every image."""
        pyarrow, parquet = _import_pyarrow()
        number = 0
        for path in self._shards[split]:
            try:
                with parquet.ParquetFile(path) as shard:
                    for batch in shard.iter_batches(ROWS, columns=["image", "label"]):
                        images, labels = batch.column("image"), batch.column("label").to_pylist()
                        for image, label in zip(images.to_pylist(), labels, strict=True):
                            number += 1
                            packed = image if isinstance(image, dict) else {"bytes": image}
                            data = packed["bytes"]
                            if not data:
                                raise UserError(
                                    f"{path}: a row with label {label} has no image; fetch the shard again"
                                )
                            if not isinstance(data, bytes):
                                raise UserError(f"{path}: the column image holds {data!r:.40}, not bytes")
                            yield *_name_and_class(packed.get("path"), split, number, label, path), data
            except (pyarrow.ArrowException, KeyError, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{path}: not a parquet shard with the columns image and label ({reason}); fetch it again"
                ) from None

    def _class_names(self) -> dict[str, str]:
        """Return class → names, from the hub's metadata in the shards; empty without them."""
        _, parquet = _import_pyarrow()
        metadata = parquet.read_schema(self._shards["train"][0]).metadata or {}
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        except (KeyError, TypeError, ValueError):
            return {}
        # The hub's labels are in wnid order too.
        wnids = sorted(self._plans["train"].images)
        if wnids[0].startswith("class"):
            return {_class_of_label(label): str(name) for label, name in enumerate(names)}
        return dict(zip(wnids, map(str, names), strict=True)) if len(names) == len(wnids) else {}


def _name_and_class(path: str | None, split: str, number: int, label: Any, shard: Path) -> tuple[str, str]:
    """Return the member name and the class of an image."""
    name = (path or "").rsplit("/", 1)[-1]
    if match := _NAME.fullmatch(name):
        return f"{match['stem']}.{match['ending']}", match["wnid"]
    if isinstance(label, int) and label < 0:
        raise UserError(
            f"{shard}: the column label holds {label}, which means that an image has no class; write class "
            "folders of those that have one"
        )
    if not isinstance(label, int):
        raise UserError(
            f"{shard}: the column label holds {label!r:.40}, not the number of a class; write class folders"
        )
    return f"{split}_{number:08d}.JPEG", _class_of_label(label)


def _class_of_label(label: int) -> str:
    return f"class{label:05d}"


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "pyarrow, which reads parquet shards, is not installed: "
            "pip install -c constraints.txt -e '.[parquet]' in the checkout"
        ) from None
    return pyarrow, parquet
