"""The download stage: fetch and verify the archives of a dataset into `archives/<dataset>/`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.downloader import Downloader
from hpc_imagenet.data.download.expected import (
    MD5SUMS_FILE,
    ExpectedArchive,
    archive_folder,
    expected_archives,
    parse_sums,
    set_aside,
)
from hpc_imagenet.data.download.origin import check_same_origin, has_archives, origin_of, source_folder
from hpc_imagenet.data.download.partial_file import allocated_bytes
from hpc_imagenet.data.layouts.image_finder import LabelledImages, find_images
from hpc_imagenet.data.sources import class_folder_source, labelled_images_source, parquet_source
from hpc_imagenet.data.sources.archive_folder import ArchiveFolder, verify_in_place
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.data.sources.range_source import RangeSource
from hpc_imagenet.data.sources.s3_source import S3Source
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk
from hpc_imagenet.io.printable import escape_name
from hpc_imagenet.runs.store import Progress, Run


class ArchiveSource(Protocol):
    """A source of archives: a URL prefix, a bucket, a folder.

    Attributes:
        copies: whether archives are copied into the workspace and need free space; else they are linked.
    """

    copies: bool

    def text(self, file: str) -> str | None:
        """Return the content of a small text file; None if it does not exist."""

    def size(self, expected: ExpectedArchive) -> int | None:
        """Return the size of an archive in bytes; None if unknown."""

    def fetch(self, expected: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Copy or link an archive to its final path; return the bytes transferred over the network."""


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Fetch the archives of `config.dataset` into the workspace and verify them.

    Returns:
        `bytes` and number (`files`) of all archives, `downloaded`: bytes transferred over the network, and
        `md5`: the MD5 of each file.

    Raises:
        UserError: an archive cannot be fetched, or is not the expected one.
    """
    if not dist_env.is_rank_zero:
        return {}
    folder = archive_folder(Path(config.workspace), config.dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"workspace={config.workspace} cannot be written: {error}; set workspace= to a folder of yours"
        ) from None
    progress = Progress(run)
    archives = expected_archives(config.dataset, {})
    downloaded = 0
    if not all(_is_up_to_date(folder, expected, config) for expected in archives):
        source = open_source(config)
        if any(expected.md5 is None for expected in archives):
            sums = parse_sums(source.text(MD5SUMS_FILE) or "", origin_of(config.dataset))
            archives = expected_archives(config.dataset, sums)
        downloaded = _fetch_missing(archives, folder, source, config, progress)
    labelled_images_source.remove_upright_copies(folder)
    # All are complete, so files of killed attempts are not needed any more.
    for file in (*(expected.file for expected in archives), labelled_images_source.FOUND):
        for leftover in (*folder.glob(f".{file}.*"), folder / f"{file}.part.json"):
            leftover.unlink(missing_ok=True)
    total = sum((folder / expected.file).stat().st_size for expected in archives)
    progress(total, total, "B")
    md5s = _require_same_archives(config, run, folder, archives)
    return {"bytes": total, "files": len(archives), "downloaded": downloaded, "md5": md5s}


def _require_same_archives(
    config: Config, run: Run, folder: Path, archives: Sequence[ExpectedArchive]
) -> dict[str, str]:
    """Return the MD5 of each archive; they must be those of this run's earlier attempts.

    A run's signature stands for its images, also where datasets and trainings are looked up. If the settings
    have no MD5s, the source may have changed since.

    Raises:
        UserError: they differ. Their receipts are removed, so that no other stage takes them; archives that
            were made or linked here are renamed to `<file>.bad`.
    """
    receipts = {each.file: receipt.load_receipt(folder / each.file) for each in archives}
    md5s = {file: made.md5 for file, made in receipts.items() if made}
    results = [outcome.result or {} for attempt in run.attempts() if (outcome := attempt.outcome)]
    for before in (result["md5"] for result in results if isinstance(result.get("md5"), dict)):
        if changed := [file for file, md5 in md5s.items() if before.get(file, md5) != md5]:
            for file in md5s:
                receipt.remove_receipt(folder / file)
                if source_folder(config.dataset) is not None:
                    set_aside(folder / file, folder / file)
            also = "; photos turned upright differ on a node without jpegtran, or with another version of it"
            raise UserError(
                f"{folder / changed[0]} has other images than before, of which a dataset may have been made: "
                "set dataset.revision=NAME, a new name, to keep both apart"
                + (also if config.dataset.orient else "")
            )
    return md5s


def open_source(config: Config) -> ArchiveSource:
    """Return the source of the archives.

    A folder without the archives is searched for class folders, the Kaggle layout and parquet shards, or with
    dataset.format=images for labelled images in any layout, and archives are made of them. A missing folder
    is first created by dataset.make, if set. Archives of an earlier run whose files have changed are removed.

    Raises:
        UserError: dataset.source has an unsupported scheme, dataset.make fails, or an MD5 or size is
            configured for archives that are made of images.
    """
    settings, source = config.download, config.dataset.source
    folder = source_folder(config.dataset)
    if folder is None and source.lower().startswith("s3:"):
        return _downloader(S3Source(source, settings.timeout, settings.connections), config)
    if folder is None:
        credentials = HttpCredentials(source, settings.login)
        return _downloader(HttpSource(source, settings.timeout, settings.connections, credentials), config)
    if config.dataset.make and not folder.exists():
        _make_source(config.dataset.make, folder)
    if not has_archives(folder, config.dataset):
        files = {split: archive.file for split, archive in config.dataset.archives.items()}
        target = archive_folder(Path(config.workspace), config.dataset)
        if config.dataset.format == "images":
            found = find_images(folder, config.dataset, settings.connections)
            _announce_images(config, found)
            images = labelled_images_source.LabelledImagesSource(
                found, config.dataset, target, settings.connections
            )
            images.remove_outdated(target)
            labelled_images_source.record_images(found, target)
            return _downloader(images, config)
        if layout := class_folder_source.detect_layout(folder):
            _announce_packing(config, layout.kind)
            class_folders = class_folder_source.ClassFolderSource(
                layout, origin_of(config.dataset), files, settings.connections
            )
            class_folders.remove_outdated(target)
            return _downloader(class_folders, config)
        if shards := parquet_source.find_parquet_shards(folder):
            _announce_packing(config, parquet_source.KIND)
            parquet = parquet_source.ParquetSource(shards, origin_of(config.dataset), files)
            parquet.remove_outdated(target)
            return parquet
    return ArchiveFolder(folder, origin_of(config.dataset))


def _downloader(source: RangeSource, config: Config) -> Downloader:
    settings = config.download
    return Downloader(
        source,
        settings.retries,
        settings.timeout,
        connections=settings.connections,
        limit=None if settings.limit is None else settings.limit * 1e6,
        hint=config.dataset.hint,
        origin=origin_of(config.dataset),
    )


def _announce_packing(config: Config, kind: str) -> None:
    """Print that archives are made of images; they differ in bytes from the published archives.

    Raises:
        UserError: an MD5 or size is configured.
    """
    source = config.dataset.source
    for split, archive in config.dataset.archives.items():
        if archive.md5 or archive.bytes:
            field = "md5" if archive.md5 else "bytes"
            raise UserError(
                f"dataset.source={source} contains {kind}; archives made of them differ from the published "
                f"ones, so dataset.archives.{split}.{field} cannot match: set dataset=ilsvrc "
                "dataset.name=NAME, which has no MD5s"
            )
    print(f"dataset.source={source} contains {kind}: making archives of them", flush=True)


def _announce_images(config: Config, found: LabelledImages) -> None:
    """Print what was found, what was left out, and what the user should know.

    Raises:
        UserError: as `_announce_packing`.
    """
    _announce_packing(config, escape_name(found.layout))
    for reason, count in found.skipped.items():
        print(f"left out, {escape_name(reason)}: {count}", flush=True)
    for line in found.warnings:
        print(f"warning: {escape_name(line)}", flush=True)


def _fetch_missing(
    archives: list[ExpectedArchive], folder: Path, source: ArchiveSource, config: Config, progress: Progress
) -> int:
    """Fetch or verify all archives without a receipt; return the bytes transferred over the network."""
    sizes = [_archive_size(folder, expected, source) for expected in archives]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if source.copies:
        missing = [
            max(0, (size or 0) - allocated_bytes(folder / expected.file))
            for expected, size in zip(archives, sizes, strict=True)
            if not (folder / expected.file).exists()
        ]
        disk.require_free_space(folder, sum(missing), f"{len(missing)} archives", 2 * len(missing))
    done = downloaded = 0
    for expected in archives:
        report = partial(_report_progress, progress, done, total, expected.file)
        target = folder / expected.file
        with disk.explain_disk_full(folder):
            if receipt.load_receipt(target) is not None:
                if not _is_up_to_date(folder, expected, config):
                    check_same_origin(config.dataset, folder)
                    raise UserError(
                        f"{target}: was fetched from another source, and without an MD5 it cannot be "
                        f"compared with dataset.source={config.dataset.source}; set {expected.setting}.md5 "
                        "or another dataset.name, or remove the file"
                    )
            elif target.exists():
                verify_in_place(target, expected, origin_of(config.dataset), report)
            else:
                downloaded += source.fetch(expected, target, report)
        done += target.stat().st_size
    return downloaded


def _report_progress(progress: Progress, before: int, total: int | None, file: str, done: int) -> None:
    progress(before + done, total, "B", file)


def _archive_size(folder: Path, expected: ExpectedArchive, source: ArchiveSource) -> int | None:
    verified = receipt.load_receipt(folder / expected.file)
    return verified.bytes if verified else expected.bytes or source.size(expected)


def _is_up_to_date(folder: Path, expected: ExpectedArchive, config: Config) -> bool:
    """Whether an archive has a valid receipt and comes from dataset.source or has the expected MD5.

    Raises:
        UserError: the receipt has another MD5 or size than expected.
    """
    verified = receipt.load_receipt(folder / expected.file)
    if verified is None:
        return False
    for name, actual, required in (
        ("MD5", verified.md5, expected.md5),
        ("size", verified.bytes, expected.bytes),
    ):
        if required is not None and actual != required:
            raise UserError(
                f"{folder / expected.file}: is another archive: its {name} is {actual}, not {required}; "
                "set another dataset.name, or remove the file"
            )
    return expected.md5 is not None or verified.source == origin_of(config.dataset)


def _make_source(function: str, folder: Path) -> None:
    module, _, name = function.partition(":")
    try:
        write = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"dataset.make={function}: {error}; set a function as package.module:name") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # several datasets may have one source
        if not folder.exists():
            write(folder)
