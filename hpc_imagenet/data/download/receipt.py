"""The receipt beside an archive: what was verified, so that 155 GB are hashed once and not at every step.

`<file>.receipt.json` holds as long as the archive's size and time of change are those of the receipt. Only
the standard library is imported here: the login node asks for receipts before it submits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_imagenet.io.atomic_files import read_json, write_json

SUFFIX = ".receipt.json"


@dataclass(frozen=True)
class Receipt:
    """What an archive was when it was verified."""

    bytes: int
    md5: str
    mtime_ns: int  # of the archive
    source: str  # the folder or URL prefix that it came from
    verified: str  # what vouched for the MD5: a setting's name, `md5sums`, or "" for nothing


def load_receipt(path: Path) -> Receipt | None:
    """Return the receipt of the archive at `path`, or None where there is none that still holds."""
    try:
        receipt = Receipt(**(read_json(_beside(path)) or {}))
        now = path.stat()
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    return receipt if (now.st_size, now.st_mtime_ns) == (receipt.bytes, receipt.mtime_ns) else None


def write_receipt(path: Path, md5: str, source: str, verified: str, stat: os.stat_result) -> Receipt:
    """Write the receipt of the archive at `path`.

    Args:
        path: the archive's final place; it may get there after its receipt.
        md5: of the bytes that were verified.
        source: where they came from.
        verified: what vouched for `md5`.
        stat: of the file, taken before its bytes were hashed, so that a later change voids the receipt.
    """
    receipt = Receipt(stat.st_size, md5, stat.st_mtime_ns, source, verified)
    write_json(_beside(path), asdict(receipt))
    return receipt


def missing_receipts(folder: Path, files: Iterable[str]) -> list[str]:
    """Return those of `files` that do not lie in `folder` with a receipt that holds."""
    return [file for file in files if load_receipt(folder / file) is None]


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)
