"""The download stage: the archives of a dataset, whole and verified, into `archives/<dataset>/`."""

from __future__ import annotations

import importlib
import re
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.download.downloader import Downloader
from hpc_imagenet.data.download.expected import (
    MD5SUMS_FILE,
    ExpectedArchive,
    archive_folder,
    expected_archives,
    parse_sums,
)
from hpc_imagenet.data.download.partial_file import allocated_bytes
from hpc_imagenet.data.sources import class_folder_source, parquet_source
from hpc_imagenet.data.sources.archive_folder import ArchiveFolder, verify_in_place
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.sources.http_source import HttpSource
from hpc_imagenet.data.sources.range_source import RangeSource
from hpc_imagenet.data.sources.s3_source import S3Source
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import disk
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs.store import Progress, Run


class ArchiveSource(Protocol):
    """Where archives come from: a URL prefix, a bucket, a folder.

    Attributes:
        copies: whether they take room in the workspace; else they are linked.
    """

    copies: bool

    def text(self, file: str) -> str | None:
        """Return a small text file, or None where there is none."""

    def size(self, want: ExpectedArchive) -> int | None:
        """Return the bytes of an archive, or None where that cannot be known."""

    def fetch(self, want: ExpectedArchive, target: Path, progress: Callable[[int], None]) -> int:
        """Bring an archive to its final place; return the bytes that came over the network."""


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Bring the archives of `config.dataset` into the workspace.

    Returns:
        `bytes` of all archives, `files`, and `downloaded`: bytes that came over the network.

    Raises:
        UserError: an archive cannot be had, or is not what it should be.
    """
    if not dist_env.is_rank_zero:
        return {}
    folder = archive_folder(Path(config.workspace), config.dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workspace={config.workspace} cannot be written: {error}") from None
    progress = Progress(run)
    files = expected_archives(config.dataset, {})
    downloaded = 0
    if not all(_is_settled(folder, want, config) for want in files):
        source = open_source(config)
        if any(want.md5 is None for want in files):
            files = expected_archives(config.dataset, parse_sums(source.text(MD5SUMS_FILE) or ""))
        downloaded = _bring(files, folder, source, config, progress)
    for want in files:  # all are whole: what a killed try has left of them is litter
        for leftover in (*folder.glob(f".{want.file}.*"), folder / f"{want.file}.part.json"):
            leftover.unlink(missing_ok=True)
    total = sum((folder / want.file).stat().st_size for want in files)
    progress(total, total, "B")
    return {"bytes": total, "files": len(files), "downloaded": downloaded}


def open_source(config: Config) -> ArchiveSource:
    """Return dataset.source, made first where dataset.make can and it is a folder that is not there.

    A folder is looked at: archives are taken as they are, and of loose files archives are made.

    Raises:
        UserError: neither a folder nor http(s) nor s3, or its files cannot have the MD5s that are asked.
    """
    asked, source = config.download, config.dataset.source
    scheme = urllib.parse.urlsplit(source).scheme
    if scheme in ("http", "https"):
        return _fetched(
            HttpSource(source, asked.timeout, asked.connections, HttpCredentials(source, asked.login)), config
        )
    if scheme == "s3":
        return _fetched(S3Source(source, asked.timeout, asked.connections), config)
    if scheme == "file":
        source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    elif re.match(r"[a-z][a-z0-9+.-]*://", source):
        raise UserError(
            f"dataset.source={source}: a folder, http://, https:// or s3:// is read, not {scheme}://"
        )
    folder = Path(source).expanduser()
    if config.dataset.make and not folder.exists():
        _make(config.dataset.make, folder)
    files = {split: archive.file for split, archive in config.dataset.archives.items()}
    if not any((folder / file).exists() for file in files.values()):
        if layout := class_folder_source.detect_layout(folder):
            _unpinned(config, layout.kind)
            return _fetched(
                class_folder_source.ClassFolderSource(
                    layout, config.dataset.source, files, asked.connections
                ),
                config,
            )
        if shards := parquet_source.find_parquet_shards(folder):
            _unpinned(config, parquet_source.KIND)
            return parquet_source.ParquetSource(shards, config.dataset.source, files)
    return ArchiveFolder(folder, config.dataset.source)


def _fetched(remote: RangeSource, config: Config) -> Downloader:
    asked = config.download
    return Downloader(
        remote,
        asked.retries,
        asked.timeout,
        connections=asked.connections,
        limit=None if asked.limit is None else asked.limit * 1e6,
        hint=config.dataset.hint,
    )


def _unpinned(config: Config, kind: str) -> None:
    """Tell that archives are made of loose files; those have other bytes than the published ones."""
    source = config.dataset.source
    for split, archive in config.dataset.archives.items():
        if archive.md5 or archive.bytes:
            pin = "md5" if archive.md5 else "bytes"
            raise UserError(
                f"dataset.source={source} has {kind}; archives made of them cannot have "
                f"dataset.archives.{split}.{pin}: dataset=ilsvrc dataset.name=NAME takes them without"
            )
    print(f"dataset.source={source} has {kind}: archives are made of them", flush=True)


def _bring(
    files: list[ExpectedArchive], folder: Path, source: ArchiveSource, config: Config, progress: Progress
) -> int:
    sizes = [_size(folder, want, source) for want in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if source.copies:
        missing = [
            max(0, (size or 0) - allocated_bytes(folder / want.file))
            for want, size in zip(files, sizes, strict=True)
            if not (folder / want.file).exists()
        ]
        disk.require_free_space(folder, sum(missing), f"{len(missing)} archives", 2 * len(missing))
    done = downloaded = 0
    for want in files:
        tell = partial(_tell, progress, done, total, want.file)
        target = folder / want.file
        with disk.explain_disk_full(folder):
            if receipt.load_receipt(target) is not None:
                if not _is_settled(folder, want, config):
                    raise UserError(
                        f"{target}: came from elsewhere, and no MD5 says whether dataset.source="
                        f"{config.dataset.source} has the same; pin {want.setting}.md5, choose another "
                        "dataset.name, or remove it"
                    )
            elif target.exists():
                verify_in_place(target, want, config.dataset.source, tell)
            else:
                downloaded += source.fetch(want, target, tell)
        done += target.stat().st_size
    return downloaded


def _tell(progress: Progress, before: int, total: int | None, file: str, done: int) -> None:
    progress(before + done, total, "B", file)


def _size(folder: Path, want: ExpectedArchive, source: ArchiveSource) -> int | None:
    settled = receipt.load_receipt(folder / want.file)
    return settled.bytes if settled else want.bytes or source.size(want)


def _is_settled(folder: Path, want: ExpectedArchive, config: Config) -> bool:
    """Whether the archive is in place, verified, and known to be what the config asks for.

    Raises:
        UserError: it is in place and verified, but another one.
    """
    settled = receipt.load_receipt(folder / want.file)
    if settled is None:
        return False
    for word, has, asked in (("MD5", settled.md5, want.md5), ("size", settled.bytes, want.bytes)):
        if asked is not None and has != asked:
            raise UserError(
                f"{folder / want.file}: another archive is there, its {word} is {has} instead of {asked}; "
                "choose another dataset.name, or remove it"
            )
    return want.md5 is not None or settled.source == config.dataset.source


def _make(function: str, folder: Path) -> None:
    module, _, name = function.partition(":")
    try:
        write = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"dataset.make={function}: {error}; it names a function as package.module:name"
        ) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(folder)
