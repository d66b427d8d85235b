"""Receipts: the verified size and MD5 of an archive, so that 155 GB are hashed only once.

`<file>.receipt.json` is valid as long as the archive's size and mtime equal the recorded ones. This module
and what it imports need no NumPy, because the login node reads receipts before it submits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_imagenet.io.atomic_files import read_json, write_json

SUFFIX = ".receipt.json"


@dataclass(frozen=True)
class Receipt:
    """Size, MD5 and origin of an archive when it was verified."""

    bytes: int
    md5: str
    mtime_ns: int  # of the archive
    source: str  # the folder or URL prefix of its origin
    verified: str  # where the expected MD5 came from: a setting, `md5sums`, or "" if there was none
    state: str = ""  # ETag of the server, or hash of the files that it was made of; "" if neither is known


def load_receipt(path: Path) -> Receipt | None:
    """Return the receipt of the archive at `path`; None if there is no valid one."""
    try:
        receipt = Receipt(**(read_json(_receipt_path(path)) or {}))
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None
    texts = (receipt.md5, receipt.source, receipt.verified, receipt.state)
    if not all(isinstance(value, str) for value in texts):
        return None
    return receipt if (stat.st_size, stat.st_mtime_ns) == (receipt.bytes, receipt.mtime_ns) else None


def write_receipt(
    path: Path, md5: str, source: str, verified: str, stat: os.stat_result, state: str = ""
) -> Receipt:
    """Write the receipt of the archive at `path`.

    Args:
        path: final path of the archive, which may be moved there after its receipt is written.
        md5: MD5 of the verified bytes, in hex.
        source: folder or URL prefix of their origin.
        verified: where the expected MD5 came from.
        stat: stat of the file, taken before hashing, so that a later change makes the receipt invalid.
        state: ETag, or hash of the files that the archive was made of, if known.
    """
    receipt = Receipt(stat.st_size, md5, stat.st_mtime_ns, source, verified, state)
    write_json(_receipt_path(path), asdict(receipt))
    return receipt


def is_outdated(path: Path, source: str, state: str) -> bool:
    """Whether an archive was made of files which have changed since.

    Args:
        path: final path of the archive.
        source: its origin; an archive of another origin is not compared.
        state: hash of the files that it would be made of now.
    """
    made = load_receipt(path)
    return made is not None and made.source == source and made.state not in ("", state)


def remove_outdated(path: Path, source: str, state: str) -> None:
    """Remove an archive, and its receipt, that was made of files which have changed; see `is_outdated`."""
    if is_outdated(path, source, state):
        print(f"{path}: the files that it was made of have changed; making it again", flush=True)
        path.unlink()
        remove_receipt(path)


def remove_receipt(path: Path) -> None:
    """Remove the receipt of the archive at `path`, if there is one; the archive is then hashed again."""
    _receipt_path(path).unlink(missing_ok=True)


def missing_receipts(folder: Path, files: Iterable[str]) -> list[str]:
    """Return those of `files` that are missing from `folder` or have no valid receipt."""
    return [file for file in files if load_receipt(folder / file) is None]


def _receipt_path(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)
