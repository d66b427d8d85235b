"""The expected size, MD5 and format of an archive, and checks of a file against them."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.download.file_type import describe_content, is_html
from hpc_imagenet.data.ilsvrc.devkit import MAX_UNPACKED
from hpc_imagenet.data.ilsvrc.labels_file import parse_labels
from hpc_imagenet.data.tar import tar_reader
from hpc_imagenet.datastore.file_hash import hash_file
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.tar_header import BLOCK

MD5SUMS_FILE = "md5sums"  # beside the archives, in the output format of the command md5sum
CHUNK = 1 << 20  # bytes
TEXT_LIMIT = 1 << 20  # bytes that are read of a small text file

# `<32 hex digits>  <name>`; ` *` instead of the two spaces for a file that was read in binary mode.
_MD5SUM_LINE = re.compile(r"([0-9a-fA-F]{32}) [ *](.+)")


@dataclass(frozen=True)
class ExpectedArchive:
    """Name, format, and size and MD5 (None if unknown) of an archive."""

    setting: str  # the setting of the archive, such as dataset.archives.train
    file: str
    gzip: bool  # True: .tar.gz; False: uncompressed tar, or labels
    bytes: int | None = None
    md5: str | None = None
    md5_source: str = ""  # where the MD5 comes from: a setting or `md5sums`
    labels: bool = False  # True: labels.json, which takes the place of the kit for labelled images


def archive_folder(workspace: Path, dataset: Dataset) -> Path:
    """Return the folder of a dataset's archives in the workspace."""
    return workspace / "archives" / dataset.name


def expected_archives(dataset: Dataset, sums: dict[str, str]) -> list[ExpectedArchive]:
    """Return the expected archives of a dataset.

    Args:
        dataset: the config group; its MD5s take precedence.
        sums: contents of the md5sums file: file name → MD5 in hex.

    Raises:
        UserError: a file name or an MD5 in the config is invalid.
    """
    result = []
    for split, archive in dataset.archives.items():
        setting = f"dataset.archives.{split}"
        if "/" in archive.file or archive.file in ("", ".", "..", MD5SUMS_FILE):
            raise UserError(
                f"{setting}.file={archive.file}: not a valid file name; set the archive's name in "
                "dataset.source, without a folder"
            )
        md5, md5_source = archive.md5, f"{setting}.md5" if archive.md5 else ""
        if md5 is None and archive.file in sums:
            md5, md5_source = sums[archive.file], MD5SUMS_FILE
        if md5 is not None and not re.fullmatch(r"[0-9a-fA-F]{32}", md5):
            raise UserError(f"{setting}.md5={md5}: not an MD5; set 32 hex digits")
        result.append(
            ExpectedArchive(
                setting,
                archive.file,
                split == "devkit" and dataset.format != "images",
                archive.bytes,
                md5.lower() if md5 else None,
                md5_source,
                split == "devkit" and dataset.format == "images",
            )
        )
    return result


def parse_sums(text: str, source: str) -> dict[str, str]:
    """Parse the output of `md5sum` into file name → MD5 in hex; empty lines and comments (#) are ignored.

    Args:
        text: contents of the file md5sums.
        source: dataset.source, for errors.

    Raises:
        UserError: a line is not of this format, or gives a file a second MD5: archives that the file is
            meant to pin would pass unchecked.
    """
    if len(text) >= TEXT_LIMIT:
        raise UserError(
            f"dataset.source={source}: its {MD5SUMS_FILE} has more than {TEXT_LIMIT} characters; keep the "
            "lines of its archives only"
        )
    sums: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _MD5SUM_LINE.fullmatch(line)
        name = match[2].rsplit("/", 1)[-1] if match else ""
        if not match or sums.get(name, match[1].lower()) != match[1].lower():
            problem = f"has another MD5 of {name} than before" if match else "is not a line of md5sum"
            where = f"dataset.source={source}: line {number} of its {MD5SUMS_FILE}"
            raise UserError(
                f"{where}, {_start_of(line)}, {problem}; "
                f"write the file anew with md5sum *.tar *.tar.gz > {MD5SUMS_FILE}, or set the MD5 of every "
                "archive, such as dataset.archives.train.md5"
            )
        sums[name] = match[1].lower()
    return sums


def _start_of(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:40] + "…")


def new_md5() -> hashlib._Hash:
    """Return an MD5 hash that also works in FIPS mode, as it is used as a checksum only."""
    return hashlib.md5(usedforsecurity=False)


def md5_of_file(path: Path, progress: Callable[[int], None]) -> str:
    """Return the MD5 of a file in hex; `progress` is called with the number of bytes read."""
    return hash_file(path, File(path.name, 0, "md5:"), progress).removeprefix("md5:")


def check_first_bytes(first: bytes, expected: ExpectedArchive, name: str, hint: str = "") -> None:
    """Check the format of an archive by its first 512 bytes, before the other 148 GB are downloaded.

    Args:
        first: first bytes of the file.
        expected: the expected archive.
        name: path or URL of the file for errors.
        hint: text appended to errors.

    Raises:
        UserError: an HTML page or another wrong format.
    """
    tail = f"; {hint}" if hint else ""
    if is_html(first):
        raise UserError(f"{name} is an HTML page, not an archive: a login or an error page?{tail}")
    if expected.labels:
        if not first.startswith(b"{"):
            raise UserError(f"{name}: not a labels.json but {describe_content(first)}{tail}")
    elif expected.gzip:
        if not first.startswith(b"\x1f\x8b"):
            raise UserError(f"{name}: not a gzip file but {describe_content(first)}{tail}")
    else:
        tar_reader.check_first_block(first, name)


def check_complete(path: Path, expected: ExpectedArchive, md5: str, name: str) -> None:
    """Check size, MD5 and format of a complete archive.

    Without an expected MD5, truncation is detected by the format: a tar's end mark, gzip's checksum.

    Args:
        path: the file.
        expected: the expected archive.
        md5: MD5 of the file in hex.
        name: path or URL of the file for errors.

    Raises:
        UserError: wrong MD5, size or format, or truncated.
    """
    size = path.stat().st_size
    if expected.bytes is not None and size != expected.bytes:
        raise UserError(f"{name}: {size} bytes, but {expected.setting}.bytes is {expected.bytes}")
    if expected.md5 is not None and md5 != expected.md5:
        raise UserError(f"{name}: its MD5 is {md5}, but {expected.md5_source} has {expected.md5}")
    with path.open("rb") as file:
        check_first_bytes(file.read(BLOCK), expected, name)
        if expected.labels:
            parse_labels(path.read_bytes(), path)
        elif expected.md5 is None and expected.gzip:
            try:
                with gzip.open(file.name) as plain:
                    unpacked = 0
                    while data := plain.read(CHUNK):
                        unpacked += len(data)
                        if unpacked > MAX_UNPACKED:
                            raise OSError(f"more than {MAX_UNPACKED >> 20} MiB when it is unpacked")
            except (EOFError, zlib.error, OSError) as error:
                raise UserError(f"{name}: damaged or truncated ({error})") from None
        elif expected.md5 is None:
            for _ in tar_reader.members(file.fileno(), 0, os.fstat(file.fileno()).st_size, name):
                pass


def quarantine(path: Path, target: Path, error: UserError) -> UserError:
    """Rename a wrong file to `<target>.bad`; return the error extended by the new name."""
    bad = set_aside(path, target)
    return UserError(f"{error}; the file is kept as {bad}; run the same command again to retry")


def set_aside(path: Path, target: Path) -> Path:
    """Rename a file that is not the archive `target` to `<target>.bad`; return that name."""
    bad = target.with_name(target.name + ".bad")
    path.replace(bad)
    return bad
