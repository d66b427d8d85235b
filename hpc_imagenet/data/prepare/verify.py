"""Verify a dataset or a datastore version against its manifest and certificate, and list all problems.

Every file is read and hashed, several in parallel; class folders are compared with the archives byte by byte.
With `quick` only file sizes, image counts and a sample of index entries are checked, which takes seconds.
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

from hpc_imagenet.data.prepare import certificate, class_folder_writer
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends.storage_backend import ProgressCounter
from hpc_imagenet.datastore.file_hash import hash_file
from hpc_imagenet.datastore.index import Index, open_index
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, load_manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.io.tar_header import BLOCK, member_size, name_before

SAMPLE = 1000  # index entries checked per split

LogCallback = Callable[[str], None]


@dataclass
class VerifyReport:
    """Result of verifying a dataset or datastore version."""

    folder: Path
    problems: list[str] = field(default_factory=list)  # problems, one line each
    images: int = 0
    files: int = 0
    bytes: int = 0  # bytes hashed or compared


def find_folders(workspace: Path, target: str) -> list[Path]:
    """Return the folders to verify for a target.

    Args:
        workspace: the workspace folder.
        target: a folder, NAME (the dataset and the newest datastore version of that name), or NAME@vN.

    Raises:
        UserError: no dataset, datastore or folder matches.
    """
    folder = expand_home(target)
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
    """Return the folders of all datasets and of all datastore versions in a workspace."""
    return sorted(
        path.parent
        for pattern in (f"datasets/*/{FILE}", f"datastores/*/v*/{FILE}")
        for path in workspace.glob(pattern)
    )


def verify_dataset(
    folder: Path, *, quick: bool, workers: int, log: LogCallback = lambda line: None
) -> VerifyReport:
    """Verify all files of a dataset or datastore version.

    Args:
        folder: folder with a manifest.
        quick: whether to skip reading the files.
        workers: number of threads that read and hash.
        log: callback with one line per verified file.
    """
    report = VerifyReport(folder)
    try:
        manifest = load_manifest(folder)
    except FileNotFoundError:
        report.problems.append(f"{folder / FILE} is missing")
        return report
    except OSError as error:
        report.problems.append(f"{folder / FILE} cannot be read: {error.strerror}")
        return report
    except UserError as error:
        report.problems.append(str(error))
        return report
    report.images = manifest.images
    counter = ProgressCounter(lambda done, note: None)
    with counter.threads(workers) as threads:
        files = manifest.all_files()
        results = threads.map(
            lambda file: _verify_file(folder, file, quick, counter.for_file(file.path)), files
        )
        for file, problems in zip(files, results, strict=True):
            report.files += 1
            report.bytes += 0 if quick else file.bytes
            report.problems += problems
            log(f"{'wrong' if problems else 'ok':6}{file.path}")
        splits = _verify_indexes(folder, manifest, report)
        _verify_certificate(folder, manifest, splits, report)
        if manifest.provenance.get("layout") == "folders" and "upload" not in manifest.provenance:
            for split, entries in splits.items():
                _verify_class_folders(folder, manifest, split, entries, quick, threads, report, log)
    archives = manifest.provenance.get("archives") or {}
    report.problems += [
        f"{folder / split}: class folders of other archives than {FILE}; remove them, or submit "
        "+stage=process process.layout=folders"
        for split in class_folder_writer.splits_of_other_archives(folder, archives.values())
    ]
    return report


def _verify_file(folder: Path, file: File, quick: bool, progress: Callable[[int], None]) -> list[str]:
    path = folder / file.path
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return [f"{path} has {size} bytes instead of {file.bytes}"]
        if quick:
            return []
        damage = file.damage(path, hash_file(path, file, progress))
    except UserError as error:
        return [str(error)]
    except FileNotFoundError:
        damage = file.damage(path, None)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    return [damage] if damage else []


def _verify_indexes(folder: Path, manifest: Manifest, report: VerifyReport) -> dict[str, Index]:
    """Check that each index entry is inside its shard; return the valid indexes by split."""
    splits = {}
    for split, split_info in manifest.splits.items():
        path = folder / split_info.index.path
        try:
            entries = open_index(path)
        except UserError as error:
            report.problems.append(str(error))
            continue
        if len(entries) != split_info.images:
            report.problems.append(f"{path} has {len(entries)} images instead of {split_info.images}")
        if not len(entries) or not manifest.shards:
            report.problems.append(f"{path}: without images, or without shards")
            continue
        sizes = np.array([shard.bytes for shard in manifest.shards], np.uint64)
        known = entries["shard"] < len(sizes)
        ends = entries["offset"] + entries["length"]
        inside = known & (entries["offset"] >= BLOCK) & (ends <= sizes[np.where(known, entries["shard"], 0)])
        good = inside & (entries["label"] < len(manifest.classes)) & (entries["length"] > 0)
        if not good.all():
            first = int(np.argmin(good))
            report.problems.append(
                f"{path}: {int((~good).sum())} entries are invalid, the first is entry {first}"
            )
            continue
        splits[split] = entries
        report.problems += list(_verify_sample(folder, manifest, path, entries))
    return splits


def _verify_sample(folder: Path, manifest: Manifest, path: Path, entries: Index) -> Iterator[str]:
    """Check a sample of the index entries: the tar header before an image must have its length."""
    rows = np.unique(np.linspace(0, len(entries) - 1, SAMPLE).astype(np.int64))
    shards = [folder / shard.path for shard in manifest.shards]
    for number in np.unique(entries["shard"][rows]).tolist():
        try:
            descriptor = os.open(shards[number], os.O_RDONLY)
        except OSError:
            continue  # already reported
        try:
            for row in rows[entries["shard"][rows] == number].tolist():
                offset, length = int(entries["offset"][row]), int(entries["length"][row])
                try:
                    is_header = member_size(os.pread(descriptor, BLOCK, offset - BLOCK)) == length
                except ValueError:
                    is_header = False
                except OSError as error:
                    yield f"{shards[number]} cannot be read: {error.strerror}"
                    return
                if not is_header:
                    yield f"{path}: entry {row} is byte {offset} of {shards[number]}, where no image begins"
                    return
        finally:
            os.close(descriptor)


def _verify_certificate(
    folder: Path, manifest: Manifest, splits: dict[str, Index], report: VerifyReport
) -> None:
    path = folder / certificate.JSON
    if not any(file.path == certificate.JSON for file in manifest.files):
        report.problems.append(f"{folder} has no certificate; submit +stage=process to write one")
        return
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        if stored["content"] != manifest.content:
            report.problems.append(f"{path} is for content {stored['content']} instead of {manifest.content}")
        for split, entries in splits.items():
            counted = np.bincount(entries["label"], minlength=len(manifest.classes)).tolist()
            for category, images in zip(manifest.classes, counted, strict=True):
                expected = stored["counts"][category.wnid][split]
                if expected != images:
                    report.problems.append(
                        f"{path} lists {expected} images of {category.wnid} in {split}, "
                        f"but the index has {images}"
                    )
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.problems.append(f"{path} cannot be read: {error!r}")


def _verify_class_folders(
    folder: Path,
    manifest: Manifest,
    split: str,
    entries: Index,
    quick: bool,
    threads: ThreadPoolExecutor,
    report: VerifyReport,
    log: LogCallback,
) -> None:
    shards = [folder / shard.path for shard in manifest.shards]
    have_shards = all(shard.exists() for shard in shards)

    def verify_class(label: int) -> tuple[list[str], int]:
        rows = np.flatnonzero(entries["label"] == label)
        class_folder = folder / split / manifest.classes[label].wnid
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(class_folder)}
        except OSError as error:
            return [f"{class_folder}: {error.strerror}"], 0
        if len(sizes) != len(rows):
            return [f"{class_folder} has {len(sizes)} files instead of {len(rows)}"], 0
        if quick or not have_shards:
            return [], 0
        try:
            return _compare(class_folder, sizes, shards, entries[rows])
        except OSError as error:
            return [f"{class_folder} cannot be compared with the shards: {error.strerror}"], 0

    labels = range(len(manifest.classes))
    bad_classes = 0
    for problems, size in threads.map(verify_class, labels):
        report.problems += problems
        report.bytes += size
        bad_classes += bool(problems)
    log(f"{'wrong' if bad_classes else 'ok':6}{split}/ ({len(labels)} class folders)")


def _compare(
    class_folder: Path, sizes: dict[str, int], shards: list[Path], entries: Array
) -> tuple[list[str], int]:
    """Compare the files of a class with the images in the shards; return the problems and the bytes read."""
    problems, size = [], 0
    numbers = np.unique(entries["shard"]).tolist()
    descriptors = {number: os.open(shards[number], os.O_RDONLY) for number in numbers}
    try:
        for offset, length, _, shard in entries.tolist():
            before = min(offset, 3 * BLOCK)
            data = os.pread(descriptors[shard], before + length, offset - before)
            stored_name = name_before(data[:before]).rsplit(b"/", 1)[-1]
            path = class_folder / os.fsdecode(stored_name)
            if path.name not in sizes:
                # A header has only the first 100 bytes of a name; find a longer name by this prefix.
                matches = (name for name in sizes if os.fsencode(name).startswith(stored_name))
                path = class_folder / next(matches, path.name)
            try:
                if path.read_bytes() != data[before:]:
                    problems.append(f"{path} differs from the image in {shards[shard]}")
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
            size += length
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return problems, size
