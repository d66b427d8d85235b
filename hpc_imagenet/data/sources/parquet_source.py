"""Parquet shards, as the Hugging Face hub has them for ILSVRC/imagenet-1k, as a source of archives.

    [data/]train-00000-of-00294.parquet …  [data/]validation-00000-of-00014.parquet …

Columns: `image` (bytes, path) and `label`. The wnid stands at the end of the path, as in
n01440764_10026_n01440764.JPEG, and is taken off; where a path has none, a class is called by its label. The
images come in no order, and a class tar must be in one piece: so the shards are read twice, for the sizes and
for the bytes, and what was written is read once more for the MD5.
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

from hpc_imagenet.data.download.downloader import download_and_verify
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.download.partial_file import PartialFile, allocated_bytes
from hpc_imagenet.data.sources.class_folder_source import devkit
from hpc_imagenet.data.sources.range_source import Origin
from hpc_imagenet.data.sources.virtual_tar import END, InMemoryFile, long_name_header, tar_member
from hpc_imagenet.data.tar.tar_reader import BLOCK
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk

KIND = "parquet shards"
ROWS = 64  # images in memory at a time
_SPLITS = {"train": ("train",), "val": ("validation", "val")}
_NAME = re.compile(r"(?P<stem>.+)_(?P<wnid>n\d{8})\.(?P<ending>\w+)")


@dataclass
class _Split:
    """The images of a split: where each goes in its archive."""

    archive_bytes: int = 0
    begins: dict[str, int] = field(default_factory=dict)  # class → where its members begin
    sizes: dict[str, int] = field(default_factory=dict)  # class → bytes of its members
    images: dict[str, int] = field(default_factory=dict)  # class → how many
    val: list[tuple[str, str]] = field(default_factory=list)  # (member, class), in order of names; of val
    state: str = ""


def find_parquet_shards(folder: Path) -> dict[str, list[Path]] | None:
    """Return the shards of train and val, or None where there are none."""
    for place in (folder, folder / "data"):
        found = {
            split: sorted(path for name in names for path in place.glob(f"{name}-*.parquet"))
            for split, names in _SPLITS.items()
        }
        if all(found.values()):
            return found
    return None


class ParquetSource:
    """A source of archives that are made of parquet shards.

    Args:
        shards: of train and val.
        source: dataset.source.
        files: the archives' names: train, val and devkit → file.
    """

    copies = True

    def __init__(self, shards: dict[str, list[Path]], source: str, files: dict[str, str]) -> None:
        self._shards = shards
        self._source = source
        self._split_of = {file: split for split, file in files.items()}

    def text(self, file: str) -> str | None:
        """Return None: no sums lie beside archives that are not made yet."""
        return None

    def size(self, want: ExpectedArchive) -> int | None:
        """Return how many bytes an archive will have."""
        split = self._split_of[want.file]
        return self._devkit.length if split == "devkit" else self._splits[split].archive_bytes

    def fetch(self, want: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Make an archive, whole and with its receipt; return the bytes that came over the network: 0."""
        split = self._split_of[want.file]
        folder = self._shards["train"][0].parent

        def fill(part: PartialFile) -> int:
            size = self.size(want) or 0
            state = self._devkit.state if split == "devkit" else self._splits[split].state
            origin = Origin(f"{folder} as {want.file}", state, None, size, ranges=True)
            if part.origin != origin:
                part.begin(origin)
            disk.require_free_space(target.parent, size - allocated_bytes(part.target), want.file)
            for at, data in self._pieces(split):
                if not part.has(at, at + len(data)):
                    part.write(at, data)
                progress(part.size)
                part.save(when_due=True)
            return 0

        return download_and_verify(want, target, f"{folder} as {want.file}", self._source, fill, progress)

    def _pieces(self, split: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes of an archive with their places, in the order of the shards."""
        if split == "devkit":
            yield 0, self._devkit.read_from(0)
            return
        plan = self._splits[split]
        at = dict(plan.begins)
        for name, wnid, data in self._images(split):
            whole = tar_member(name, data)
            yield at[wnid], whole
            at[wnid] += len(whole)
        if split == "train":
            for wnid, begin in plan.begins.items():
                head = long_name_header(f"{wnid}.tar", plan.sizes[wnid] + len(END))
                yield begin - len(head), head
                yield begin + plan.sizes[wnid], END
        yield plan.archive_bytes - len(END), END

    @cached_property
    def _splits(self) -> dict[str, _Split]:
        return {split: self._measure(split) for split in _SPLITS}

    def _measure(self, split: str) -> _Split:
        plan, told = _Split(), hashlib.sha256()
        for path in self._shards[split]:
            stat = path.stat()
            told.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        plan.state = told.hexdigest()
        names: dict[str, set[str]] = {}
        for name, wnid, data in self._images(split):
            size = len(long_name_header(name, 0)) + len(data) + -len(data) % BLOCK
            plan.sizes[wnid] = plan.sizes.get(wnid, 0) + size
            plan.images[wnid] = plan.images.get(wnid, 0) + 1
            known = names.setdefault(wnid if split == "train" else "", set())
            if name in known:
                raise UserError(f"{self._shards[split][0].parent}: two images of {split} are called {name}")
            known.add(name)
            if split == "val":
                plan.val.append((name, wnid))
        plan.val.sort()
        at = 0
        for wnid in sorted(plan.sizes):
            if split == "train":
                at += len(long_name_header(f"{wnid}.tar", 0))
            plan.begins[wnid] = at
            at += plan.sizes[wnid] + (len(END) if split == "train" else 0)
        plan.archive_bytes = at + len(END)
        return plan

    @cached_property
    def _devkit(self) -> InMemoryFile:
        train, val = self._splits["train"], self._splits["val"]
        for _, wnid in val.val:
            if wnid not in train.images:
                raise UserError(
                    f"{self._source}: class {wnid} is in the val shards, but not in those of train"
                )
        words = self._words()
        classes = {wnid: (words.get(wnid, wnid), count) for wnid, count in train.images.items()}
        return devkit(classes, [wnid for _, wnid in val.val])

    def _images(self, split: str) -> Iterator[tuple[str, str, bytes]]:
        """Yield (member name, class, bytes) of every image."""
        pyarrow, parquet = _pyarrow()
        number = 0
        for path in self._shards[split]:
            try:
                with parquet.ParquetFile(path) as shard:
                    for batch in shard.iter_batches(ROWS, columns=["image", "label"]):
                        images, labels = batch.column("image"), batch.column("label").to_pylist()
                        for image, label in zip(images.to_pylist(), labels, strict=True):
                            number += 1
                            data = image["bytes"]
                            if not data:
                                raise UserError(f"{path}: a row of label {label} holds no image")
                            yield *_named(image.get("path"), split, number, label), data
            except (pyarrow.ArrowException, KeyError, OSError) as error:
                words = " ".join(str(error).split())
                raise UserError(f"{path}: not shards with the columns image and label ({words})") from None

    def _words(self) -> dict[str, str]:
        """Return what the classes are called, as far as the hub's own metadata in the shards say so."""
        _, parquet = _pyarrow()
        metadata = parquet.read_schema(self._shards["train"][0]).metadata or {}
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        except (KeyError, TypeError, ValueError):
            return {}
        # In wnid order on the hub as here; without wnids the class is called by its label.
        wnids = sorted(self._splits["train"].images)
        if wnids[0].startswith("class"):
            return {_by_label(label): str(name) for label, name in enumerate(names)}
        return dict(zip(wnids, map(str, names), strict=True)) if len(names) == len(wnids) else {}


def _named(path: str | None, split: str, number: int, label: int) -> tuple[str, str]:
    """Return the member name and the class of an image."""
    name = (path or "").rsplit("/", 1)[-1]
    if match := _NAME.fullmatch(name):
        return f"{match['stem']}.{match['ending']}", match["wnid"]
    return f"{split}_{number:08d}.JPEG", _by_label(label)


def _by_label(label: int) -> str:
    return f"class{label:05d}"


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "parquet shards are read with pyarrow, which is missing: "
            "pip install -c constraints.txt -e '.[parquet]' in the checkout"
        ) from None
    return pyarrow, parquet
