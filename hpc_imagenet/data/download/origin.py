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


def source_folder(dataset: Dataset) -> Path | None:
    """Return dataset.source as a folder; None for a server or a bucket.

    Raises:
        UserError: an unsupported scheme.
    """
    source = dataset.source
    scheme = urllib.parse.urlsplit(source).scheme
    if scheme in ("http", "https", "s3"):
        return None
    if scheme == "file":
        source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    elif re.match(r"[a-z][a-z0-9+.-]*://", source):
        raise UserError(
            f"dataset.source={source}: {scheme}:// is not supported; set a folder, http://, https:// or s3://"
        )
    return Path(source).expanduser()


def has_archives(folder: Path, dataset: Dataset) -> bool:
    """Whether a folder contains any of the archives; else archives are made of its files."""
    return any((folder / archive.file).exists() for archive in dataset.archives.values())


def origin_of(dataset: Dataset) -> str:
    """Return the origin of a dataset's archives for their receipts.

    It is dataset.source; for labelled images also the settings that decide what the archives contain.
    """
    settings = dataset.identity()
    if not settings or re.match(r"(https?|s3)://", dataset.source):
        return dataset.source
    defaults = {field.name: field.default for field in fields(Dataset)} | {"format": dataset.format}
    shown = {name: value for name, value in settings.items() if value and value != defaults[name]}
    return f"{dataset.source} with {json.dumps(shown, sort_keys=True, ensure_ascii=False)}"


def check_same_origin(dataset: Dataset, folder: Path) -> None:
    """Compare the receipts of archives that were made of labelled images with the settings.

    Args:
        dataset: the dataset.
        folder: folder of its archives in the workspace.

    Raises:
        UserError: they were made of another folder, or with other settings.
    """
    if dataset.format != "images":
        return
    for archive in dataset.archives.values():
        made = receipt.load_receipt(folder / archive.file)
        if made and not made.verified and made.source != origin_of(dataset):
            raise UserError(
                f"{folder / archive.file} was made of {made.source}, not of {origin_of(dataset)}; set "
                f"another dataset.name, or remove {folder}"
            )


def has_at_most(folder: Path, entries: int) -> bool:
    """Whether a folder and its subfolders have at most so many files and folders together."""
    for _, folders, files in os.walk(folder):
        entries -= len(folders) + len(files)
        if entries < 0:
            return False
    return True
