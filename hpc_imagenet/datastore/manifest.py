"""The manifest of a dataset: its files with sizes and hashes, its splits and its classes.

It is written last, so a folder with a manifest is complete. Two kinds of folder have one:
`datasets/<name>/`, whose shards are the downloaded archives in another folder, and a datastore's
`<name>/v<N>/`, whose shards are in the folder itself. Training reads both.
"""

from __future__ import annotations

import builtins
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import decode_json, write_json

FORMAT = 1
FILE = "manifest.json"
_HASH = re.compile(r"[a-z0-9]+:[0-9a-f]*")

Value = TypeVar("Value")


@dataclass(frozen=True)
class File:
    """One file of the dataset. `path` is relative to the manifest's folder and may begin with `..`."""

    path: str
    bytes: int
    hash: str  # algorithm:hexdigest, such as blake3:…; see file_hash.py

    def damage(self, place: str | Path, found: str | None) -> str | None:
        """Return one line if the copy at `place` has another hash, or none because it is missing."""
        if found is None:
            return f"{place} is missing"
        return None if found == self.hash else f"{place} is damaged: its hash is {found}, not {self.hash}"


@dataclass(frozen=True)
class Split:
    """One split: its index file and number of images."""

    index: File
    images: int


@dataclass(frozen=True)
class ClassNames:
    """One class; its position in `Manifest.classes` is its label."""

    wnid: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A dataset: uncompressed tar shards, one index per split, and the classes in label order.

    Attributes:
        content: short hash of the archives' identity and the processing settings: two folders with the same
            content train the same model.
        files: further files that belong to the dataset (meta.bin).
        provenance: free-form: source, versions, times.
    """

    name: str
    content: str
    created: str  # ISO 8601, UTC
    classes: tuple[ClassNames, ...]
    shards: tuple[File, ...]  # `shard` of an index entry is the position in this tuple
    splits: dict[str, Split]  # train, val, test
    files: tuple[File, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images in all splits."""
        return sum(split.images for split in self.splits.values())

    @property
    def bytes(self) -> int:
        """Total size of all files."""
        return sum(file.bytes for file in self.all_files())

    def all_files(self) -> tuple[File, ...]:
        """Return shards, indexes and further files: the complete dataset except for the manifest."""
        return (*self.shards, *(split.index for split in self.splits.values()), *self.files)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, which makes the folder complete."""
        write_json(folder / FILE, self._to_dict())

    def encode(self) -> builtins.bytes:
        """Return the contents of the manifest file, as `save` writes it."""
        return (json.dumps(self._to_dict(), indent=2) + "\n").encode()

    def _to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`.

    Raises:
        FileNotFoundError: the folder has no manifest, so it is not (yet) a complete dataset.
        UserError: the file is not a valid manifest.
    """
    path = folder / FILE
    return parse_manifest(path.read_bytes(), path, outside=True)


def parse_manifest(data: bytes, path: Path | str, outside: bool = False) -> Manifest:
    """Parse a manifest file.

    Args:
        data: contents of the file.
        path: its path or URL, for error messages.
        outside: whether its files may be outside its folder, as the archives of a dataset do. A datastore
            may be written by others, and a fetch would write such a file anywhere.

    Raises:
        UserError: the contents are not a valid manifest.
    """
    try:
        raw = decode_json(data)
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']!r}, but this version reads format {FORMAT}")
        manifest = Manifest(
            name=_checked(raw["name"], str),
            content=_checked(raw["content"], str),
            created=_checked(raw["created"], str),
            classes=tuple(_class_names(c) for c in raw["classes"]),
            shards=tuple(_file(file) for file in raw["shards"]),
            splits={k: Split(_file(s["index"]), _count(s["images"])) for k, s in raw["splits"].items()},
            files=tuple(_file(file) for file in raw["files"]),
            provenance=_checked(raw["provenance"], dict),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest ({error!r})") from None
    paths = [file.path for file in manifest.all_files()]
    if len(set(paths)) < len(paths):
        raise UserError(f"{path}: not a manifest (a file occurs twice)")
    for name in paths:
        if not outside and (name.startswith("/") or ".." in name.split("/")):
            raise UserError(
                f"{path}: its file {name!r} would be outside its folder; do not use this datastore"
            )
    return manifest


def _checked(value: Any, kind: type[Value]) -> Value:
    """Return a value of a manifest.

    Raises:
        TypeError: it has another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.60} instead of {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r:.60} instead of a count")
    return value


def _file(raw: Any) -> File:
    file = File(**raw)
    _count(file.bytes)
    if not _checked(file.path, str) or "\0" in file.path or not _HASH.fullmatch(_checked(file.hash, str)):
        raise ValueError(f"{file.path!r:.60} is not a file with a hash")
    return file


def _class_names(raw: Any) -> ClassNames:
    return ClassNames(_checked(raw["wnid"], str), tuple(_checked(name, str) for name in raw["names"]))
