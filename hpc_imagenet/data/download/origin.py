"""Where the archives of a dataset come from: dataset.source, as a folder and as receipts record it."""

from __future__ import annotations

import json
import os
import re
import urllib.parse
import urllib.request
from dataclasses import fields
from pathlib import Path

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.download import receipt
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home


def source_folder(dataset: Dataset) -> Path | None:
    """Return dataset.source as a folder; None for a server or a bucket.

    Raises:
        UserError: an unsupported scheme, or a file: URL with a host.
    """
    source = dataset.source
    parts = urllib.parse.urlsplit(source)
    scheme = parts.scheme
    if scheme in ("http", "https", "s3"):
        return None
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"dataset.source={source}: write file:///FOLDER, or the folder alone")
        source = urllib.request.url2pathname(parts.path)
    elif re.match(r"[a-z][a-z0-9+.-]*://", source):
        raise UserError(
            f"dataset.source={source}: {scheme}:// is not supported; set a folder, http://, https:// or s3://"
        )
    return expand_home(source)


def has_archives(folder: Path, dataset: Dataset) -> bool:
    """Whether a folder contains archives; else archives are made of its files.

    Any of ILSVRC's is enough. Of labelled images all are needed, as a file beside images may be named so.
    """
    enough = all if dataset.format == "images" else any
    return enough((folder / archive.file).exists() for archive in dataset.archives.values())


def origin_of(dataset: Dataset) -> str:
    """Return the origin of a dataset's archives for their receipts.

    It is dataset.source with dataset.revision, if set: else archives of an earlier state would be taken for
    those of a new revision; for a folder of labelled images also what decides which archives are made of it.
    """
    settings = {} if re.match(r"(https?|s3)://", dataset.source) else dataset.identity()
    settings["revision"] = dataset.revision
    defaults = {field.name: field.default for field in fields(Dataset)} | {"format": dataset.format}
    shown = {name: value for name, value in settings.items() if value and value != defaults[name]}
    if not (shown or dataset.identity()):
        return dataset.source
    return f"{dataset.source} with {json.dumps(shown, sort_keys=True, ensure_ascii=False)}"


def check_same_origin(dataset: Dataset, folder: Path) -> None:
    """Compare where the archives come from, and for which revision, with the settings.

    Those with an expected MD5 are the same wherever they come from.

    Args:
        dataset: the dataset.
        folder: folder of its archives in the workspace.

    Raises:
        UserError: they come from elsewhere, or were made with other settings.
    """
    for split, archive in dataset.archives.items():
        made = receipt.load_receipt(folder / archive.file)
        if made and not made.verified and archive.md5 is None and made.source != origin_of(dataset):
            if dataset.format != "images":
                raise UserError(
                    f"{folder / archive.file}: was fetched from {made.source}, and without an MD5 it cannot "
                    f"be compared with that of {origin_of(dataset)}; set dataset.archives.{split}.md5 or "
                    "another dataset.name, or remove the file"
                )
            raise UserError(
                f"{folder / archive.file} was made of {made.source}, not of {origin_of(dataset)}; set "
                f"another dataset.name, or remove {folder}"
            )


def has_at_most(folder: Path, entries: int) -> bool:
    """Whether a folder and its subfolders have at most so many files and folders together."""
    for _, folders, files in os.walk(folder, followlinks=True):  # a circle of links ends by the count
        entries -= len(folders) + len(files)
        if entries < 0:
            return False
    return True
