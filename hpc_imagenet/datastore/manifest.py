"""The manifest: what a dataset is made of, written last, so that a folder with a manifest is whole.

One form serves both folders that hold images: `datasets/<name>/`, whose shards are the archives as they
were downloaded, and a datastore's `<name>/v<N>/`, whose shards lie in the folder itself. Training opens
either.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class File:
    """One file of the dataset. `path` is relative to the manifest's folder and may begin with `..`."""

    path: str
    bytes: int
    hash: str  # algorithm:hexdigest, such as md5:… or sha256:…


@dataclass(frozen=True)
class Split:
    """One split: its index file and how many images that holds."""

    index: File
    images: int


@dataclass(frozen=True)
class ClassNames:
    """One class; its place in `Manifest.classes` is its label."""

    wnid: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A dataset: uncompressed tar shards, an index a split, the classes in label order.

    `content` is the short hash of what the images are (the archives' identity and how they were treated):
    two folders with the same content train the same model. `files` are further files that travel along
    (meta.bin). `provenance` is free: source, versions, times.
    """

    name: str
    content: str
    created: str  # ISO 8601, UTC
    classes: tuple[ClassNames, ...]
    shards: tuple[File, ...]  # an entry's `shard` is the place in here
    splits: dict[str, Split]  # train, val
    files: tuple[File, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images in all splits."""
        return sum(split.images for split in self.splits.values())

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.all_files())

    def all_files(self) -> tuple[File, ...]:
        """Shards, indexes and further files: all that makes a copy whole, but for the manifest."""
        return (*self.shards, *(split.index for split in self.splits.values()), *self.files)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`; from now on the folder counts as whole."""
        write_json(folder / FILE, self._plain())

    def encode(self) -> builtins.bytes:
        """Return the bytes of the manifest's file, the same as `save` writes."""
        return (json.dumps(self._plain(), indent=2) + "\n").encode()

    def _plain(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`.

    Raises:
        FileNotFoundError: there is none, so the folder is not (yet) a dataset.
        UserError: it cannot be understood.
    """
    path = folder / FILE
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """Return the manifest that was read from `path`.

    Raises:
        UserError: it cannot be understood.
    """
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']}, but this version reads format {FORMAT}")
        return Manifest(
            name=raw["name"],
            content=raw["content"],
            created=raw["created"],
            classes=tuple(ClassNames(c["wnid"], tuple(c["names"])) for c in raw["classes"]),
            shards=tuple(File(**file) for file in raw["shards"]),
            splits={k: Split(File(**s["index"]), s["images"]) for k, s in raw["splits"].items()},
            files=tuple(File(**file) for file in raw["files"]),
            provenance=raw["provenance"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest ({error!r})") from None
