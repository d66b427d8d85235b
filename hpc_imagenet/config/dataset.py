"""Schema of a dataset: its archives, or labelled images and the layout in which they are found.

Values: conf/dataset/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpc_imagenet.config.setting import MISSING, setting


@dataclass
class Archive:
    """One file to download. `md5` and `bytes` are checked if set."""

    file: str = setting(MISSING, "file name")
    md5: str | None = setting(None, "expected MD5 in hex; null: not checked")
    bytes: int | None = setting(None, "expected size in bytes; null: not checked")


@dataclass
class Dataset:
    """A dataset and its source: archives in ILSVRC format, or, with `dataset.format=images`, labelled images.

    `source` is a folder or a URL prefix. `revision` identifies the data in signatures if no MD5 does.
    `make` is an importable `module:function` that writes the archives into the source folder if that
    folder does not exist yet. `hint` is appended to the error of a failed download. The fields from
    `splits` on are for `dataset.format=images`.
    """

    name: str = setting(MISSING, "name of the dataset, also of its folders")
    source: str = setting(
        MISSING, "folder, URL prefix or s3://bucket/prefix of the archives; see docs/data.md"
    )
    revision: str = setting(
        "", "name of the state of the images, if no MD5s identify them; a new one if they have changed"
    )
    archives: dict[str, Archive] = setting(
        factory=dict, meaning="keys: train, val, devkit; test as well with dataset.format=images"
    )
    make: str | None = setting(
        None, "module:function that writes the archives into a source folder that does not exist"
    )
    hint: str = setting("", "appended to the error of a failed download")
    format: str = setting(
        "ilsvrc",
        "ilsvrc: archives, or a folder of wnids; images: labelled images in any layout of docs/data.md",
        choices=("ilsvrc", "images"),
    )
    splits: dict[str, str | None] = setting(
        factory=dict,
        meaning="keys: train, val, test; folder, pattern of folders or list of images, within the source",
    )
    labels: str | None = setting(
        None,
        "FILE, FILE:COLUMN or FILE:IMAGES:COLUMN, a table in the source; folder:N, the N-th folder of a "
        "path; folder:path; filename or filename:REGEX; null: detected",
    )
    val_fraction: float | None = setting(
        None,
        "share of the training images for a validation split, stratified by class",
        minimum=0.001,
        maximum=0.999,
    )
    split_seed: int = setting(0, "seed of that split", minimum=0, maximum=2**32 - 1)
    empty_classes: str = setting(
        "fail",
        "what to do about a class without training images; skip: left out of all splits",
        choices=("fail", "skip"),
    )
    orient: bool = setting(
        False, "whether to apply EXIF orientations when archives are made of labelled images"
    )

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide which labelled images are taken, for the signature."""
        if self.format != "images":
            return {}
        names = ("format", "labels", "empty_classes", "orient", "val_fraction")
        identity: dict[str, Any] = {name: getattr(self, name) for name in names}
        identity["splits"] = {split: path for split, path in self.splits.items() if path}
        return identity | ({} if self.val_fraction is None else {"split_seed": self.split_seed})
