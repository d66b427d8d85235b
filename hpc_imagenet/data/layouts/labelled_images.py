"""The labelled images of a folder: classes in label order, and the files of each split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")
Labels = dict[str, str]  # path of an image → its class


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image and its label.

    Attributes:
        path: relative to the root, with `/`.
        label: index of its class.
        size: bytes.
        time: mtime in ns.
    """

    path: str
    label: int
    size: int
    time: int


@dataclass(frozen=True)
class LabelledImages:
    """The images of a folder by split.

    Attributes:
        root: folder that the paths are relative to.
        layout: how classes and splits were found, for the log.
        classes: names of the classes as written, in label order.
        splits: train, val and test → images, sorted by class and path; train is never empty.
        skipped: reason → number of files that are no images of the dataset.
        warnings: what the user should know, one line each.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
