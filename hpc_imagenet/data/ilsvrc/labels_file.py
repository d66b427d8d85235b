"""labels.json: the classes and labels of archives that are made of labelled images, as the kit of ILSVRC.

    {"format": 1, "classes": ["café", …], "val": [0, …], "test": [0, …], "layout": …, "skipped": {…: n}, …}

The position of a class is its label. `val` and `test` have one label per image of the flat archives, in the
order of the file names' bytes. Class names are as people wrote them. As the name of a folder or of a tar a
class has an id, in which `/` and unprintable characters are percent-encoded.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import decode_json
from hpc_imagenet.io.printable import UNPRINTABLE, escape_name, percent_encoded

FORMAT = 1
MAX_ID_BYTES = 200  # of a class id: the name of a folder has at most 255 bytes

_NOT_IN_IDS = re.compile(f"[/{UNPRINTABLE}]|%(?=[0-9A-Fa-f]{{2}})|^\\.+$")


@dataclass(frozen=True)
class LabelsFile:
    """Contents of a labels.json.

    Attributes:
        classes: names of the classes as written, in label order.
        val: label of each val image, in the order of the file names.
        test: label of each test image.
        layout: layout of the folder, in words.
        skipped: reason → number of files that were left out.
        oriented: number of images that were turned upright by their EXIF orientation.
        reencoded: paths of those that could not be turned without loss.
    """

    classes: tuple[str, ...]
    val: tuple[int, ...] = ()
    test: tuple[int, ...] = ()
    layout: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    oriented: int = 0
    reencoded: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return (json.dumps({"format": FORMAT, **asdict(self)}) + "\n").encode()

    def describe(self) -> dict[str, Any]:
        """Return what the certificate reports about the folder."""
        return {
            "layout": escape_name(self.layout),
            "skipped": {escape_name(reason): count for reason, count in self.skipped.items()},
            "oriented": self.oriented,
            "reencoded": [escape_name(path) for path in self.reencoded],
        }


def parse_labels(data: bytes, path: Path) -> LabelsFile:
    """Parse a labels.json.

    Args:
        data: contents of the file.
        path: its path, for errors.

    Raises:
        UserError: not a labels.json, or inconsistent.
    """
    try:
        raw: Any = decode_json(data)
        if raw.pop("format") != FORMAT:
            raise ValueError("unknown format")
        lists: Any = {
            key: tuple(_list_of(kind, raw.pop(key)))
            for key, kind in (("classes", str), ("val", int), ("test", int), ("reencoded", str))
        }
        found = LabelsFile(**lists, **raw)
        labels = range(len(found.classes))
        if not all(label in labels for label in (*found.val, *found.test)):
            raise ValueError("a label without a class")
        _list_of(int, [found.oriented, *found.skipped.values()])
        _list_of(str, [found.layout, *found.skipped])
        ids = [class_id(name) for name in found.classes]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a labels.json of this package ({error!r})") from None
    if not ids or len(set(ids)) < len(ids):
        raise UserError(f"{path}: {'a class occurs twice' if ids else 'it has no class'}")
    return found


def _list_of(kind: type, values: Any) -> list[Any]:
    """Return a list of a labels.json.

    Raises:
        TypeError: it is not a list of this type.
    """
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise TypeError(f"a value that is not of type {kind.__name__}")
    return values


def class_id(name: str) -> str:
    """Return the id of a class: its name, percent-encoded where it cannot name a folder."""
    return _NOT_IN_IDS.sub(percent_encoded, name)
