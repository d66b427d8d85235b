"""Hold a dataset or a datastore's version against its manifest and certificate; name whatever is wrong.

Every file is read and hashed, several at a time; class folders are compared with the archives byte by byte.
`quick` looks at sizes, counts and a sample of addresses instead, which takes seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_imagenet.data.prepare import certificate
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends.storage_backend import ProgressCounter, hash_file
from hpc_imagenet.datastore.index import Index, open_index
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import TAR_BLOCK
from hpc_imagenet.errors import UserError

SAMPLE = 1000  # addresses of each split that are followed

Say = Callable[[str], None]


@dataclass
class VerifyReport:
    """What was looked at, and what is wrong with it: one line each."""

    folder: Path
    wrong: list[str] = field(default_factory=list)
    images: int = 0
    files: int = 0
    bytes: int = 0  # read and hashed, or compared


def find_folders(workspace: Path, target: str) -> list[Path]:
    """Return the folders that `target` means: a dataset and the newest version of a datastore, or a folder.

    Raises:
        UserError: there is none of that name.
    """
    folder = Path(target).expanduser()
    if (folder / FILE).exists():
        return [folder]
    name, number = versions.parse_reference(target) if "/" not in target else (target, None)
    url = str(workspace / "datastores")
    found = [] if number else [workspace / "datasets" / name]
    numbers = versions.complete_versions(url, name)
    found += [workspace / "datastores" / name / f"v{n}" for n in numbers if n == (number or numbers[-1])]
    found = [folder for folder in found if (folder / FILE).exists()]
    if not found:
        raise UserError(f"{target}: no dataset, datastore or folder with a {FILE} (workspace={workspace})")
    return found


def all_folders(workspace: Path) -> list[Path]:
    """Return all datasets and all versions of datastores of a workspace."""
    return sorted(
        path.parent
        for form in (f"datasets/*/{FILE}", f"datastores/*/v*/{FILE}")
        for path in workspace.glob(form)
    )


def verify_dataset(folder: Path, *, quick: bool, workers: int, say: Say = lambda line: None) -> VerifyReport:
    """Look at all that belongs to a dataset.

    Args:
        folder: with a manifest.
        quick: whether to read no image.
        workers: threads that read and hash.
        say: told of each file that was looked at.
    """
    report = VerifyReport(folder)
    try:
        manifest = load_manifest(folder)
    except (FileNotFoundError, UserError) as error:
        report.wrong.append(f"{folder / FILE} is missing" if isinstance(error, OSError) else str(error))
        return report
    report.images = manifest.images
    tally = ProgressCounter(lambda done, note: None)
    with tally.threads(workers) as threads:
        files = manifest.all_files()
        looked = threads.map(lambda file: _file(folder, file, quick, tally.of(file.path)), files)
        for file, wrong in zip(files, looked, strict=True):
            report.files += 1
            report.bytes += 0 if quick else file.bytes
            report.wrong += wrong
            say(f"{'wrong' if wrong else 'ok':6}{file.path}")
        splits = _indexes(folder, manifest, report)
        _certificate(folder, manifest, splits, report)
        if manifest.provenance.get("layout") == "folders" and "upload" not in manifest.provenance:
            for split, entries in splits.items():
                _class_folders(folder, manifest, split, entries, quick, threads, report, say)
    return report


def _file(folder: Path, file: File, quick: bool, tell: Callable[[int], None]) -> list[str]:
    path = folder / file.path
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return [f"{path} has {size} bytes instead of {file.bytes}"]
        if quick:
            return []
        found = hash_file(path, file, tell)
    except UserError as error:
        return [str(error)]
    except FileNotFoundError:
        return [f"{path} is missing"]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    return [] if found == file.hash else [f"{path} has other bytes than when it was made: {found}"]


def _indexes(folder: Path, manifest: Manifest, report: VerifyReport) -> dict[str, Index]:
    """Look whether each address leads to an image of that length; return the indexes that can be read."""
    splits = {}
    for split, of in manifest.splits.items():
        path = folder / of.index.path
        try:
            entries = open_index(path)
        except UserError as error:
            report.wrong.append(str(error))
            continue
        if len(entries) != of.images:
            report.wrong.append(f"{path} has {len(entries)} images instead of {of.images}")
        sizes = np.array([shard.bytes for shard in manifest.shards], np.uint64)
        known = entries["shard"] < len(sizes)
        ends = entries["offset"] + entries["length"]
        inside = (
            known & (entries["offset"] >= TAR_BLOCK) & (ends <= sizes[np.where(known, entries["shard"], 0)])
        )
        good = inside & (entries["label"] < len(manifest.classes)) & (entries["length"] > 0)
        if not good.all():
            first = int(np.argmin(good))
            report.wrong.append(
                f"{path}: {int((~good).sum())} addresses lead nowhere, the first is entry {first}"
            )
            continue
        splits[split] = entries
        report.wrong += list(_addresses(folder, manifest, path, entries))
    return splits


def _addresses(folder: Path, manifest: Manifest, path: Path, entries: Index) -> Iterator[str]:
    """Follow a sample of the addresses: the tar header in front of an image has its length."""
    rows = np.unique(np.linspace(0, len(entries) - 1, SAMPLE).astype(np.int64))
    shards = [folder / shard.path for shard in manifest.shards]
    for number in np.unique(entries["shard"][rows]).tolist():
        try:
            descriptor = os.open(shards[number], os.O_RDONLY)
        except OSError:
            continue  # told already
        try:
            for row in rows[entries["shard"][rows] == number].tolist():
                offset, length = int(entries["offset"][row]), int(entries["length"][row])
                size = os.pread(descriptor, TAR_BLOCK, offset - TAR_BLOCK)[124:135].strip(b" \0")
                # A size that is not in digits is that of a form which images in tars do not have.
                if not size.isdigit() or int(size, 8) != length:
                    yield f"{path}: entry {row} is byte {offset} of {shards[number]}, where no image begins"
                    return
        finally:
            os.close(descriptor)


def _certificate(folder: Path, manifest: Manifest, splits: dict[str, Index], report: VerifyReport) -> None:
    path = folder / certificate.JSON
    if not any(file.path == certificate.JSON for file in manifest.files):
        report.wrong.append(f"{folder}: has no certificate: +stage=process makes one")
        return
    try:
        of: dict[str, Any] = json.loads(path.read_bytes())
        if of["content"] != manifest.content:
            report.wrong.append(f"{path} is of content {of['content']} instead of {manifest.content}")
        for split, entries in splits.items():
            counted = np.bincount(entries["label"], minlength=len(manifest.classes)).tolist()
            for category, images in zip(manifest.classes, counted, strict=True):
                stated = of["counts"][category.wnid][split]
                if stated != images:
                    report.wrong.append(
                        f"{path}: says {stated} images of {category.wnid} in {split}, the index {images}"
                    )
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.wrong.append(f"{path} cannot be read: {error!r}")


def _class_folders(
    folder: Path,
    manifest: Manifest,
    split: str,
    entries: Index,
    quick: bool,
    threads: ThreadPoolExecutor,
    report: VerifyReport,
    say: Say,
) -> None:
    shards = [folder / shard.path for shard in manifest.shards]
    whole = all(shard.exists() for shard in shards)

    def one(label: int) -> tuple[list[str], int]:
        rows = np.flatnonzero(entries["label"] == label)
        place = folder / split / manifest.classes[label].wnid
        try:
            there = {entry.name: entry.stat().st_size for entry in os.scandir(place)}
        except OSError as error:
            return [f"{place}: {error.strerror}"], 0
        if len(there) != len(rows):
            return [f"{place} has {len(there)} files instead of {len(rows)}"], 0
        return ([], 0) if quick or not whole else _compare(place, there, shards, entries[rows])

    labels = range(len(manifest.classes))
    found = 0
    for wrong, size in threads.map(one, labels):
        report.wrong += wrong
        report.bytes += size
        found += bool(wrong)
    say(f"{'wrong' if found else 'ok':6}{split}/ ({len(labels)} class folders)")


def _compare(place: Path, there: dict[str, int], shards: list[Path], entries: Array) -> tuple[list[str], int]:
    """Compare the files of a class with the images in the archives."""
    wrong, size = [], 0
    opened = {number: os.open(shards[number], os.O_RDONLY) for number in np.unique(entries["shard"]).tolist()}
    try:
        for offset, length, _, shard in entries.tolist():
            block = os.pread(opened[shard], TAR_BLOCK + length, offset - TAR_BLOCK)
            name = os.fsdecode(block[:100].rstrip(b"\0")).rsplit("/", 1)[-1]
            path = place / name
            if name not in there:
                # The header has but 100 bytes of a name; a longer one is found by its beginning.
                path = next((place / other for other in there if other.startswith(name)), path)
            try:
                if path.read_bytes() != block[TAR_BLOCK:]:
                    wrong.append(f"{path} differs from the image in {shards[shard]}")
            except OSError as error:
                wrong.append(f"{path}: {error.strerror}")
            size += length
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return wrong, size
