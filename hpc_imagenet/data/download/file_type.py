"""Detect the type of a file from its first bytes, for error messages about an unexpected file."""

from __future__ import annotations

_MAGIC = (
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a zip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"Rar!", "a RAR file"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"PAR1", "a parquet file"),
    (b"version https://git-lfs", "a git LFS pointer"),
)
_HTML = (b"<!doctype html", b"<html", b"<head", b"<script")


def is_html(first: bytes) -> bool:
    """Whether `first`, the first bytes of a file, start an HTML page."""
    return first[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML)


def describe_content(first: bytes) -> str:
    """Return the type of a file as a phrase such as `a gzip file`.

    Args:
        first: its first bytes; 512 are enough.
    """
    if not first:
        return "an empty file"
    if is_html(first):
        return "an HTML page"
    if first[257:262] == b"ustar":
        return "a tar"
    for magic, description in _MAGIC:
        if first.startswith(magic):
            return description
    if not first.strip(b"\0"):
        return "a file of zeros"
    start = first[:64].lstrip()
    if start.startswith(b"<"):
        return "an XML document"
    if start.startswith(b"{"):
        return "a JSON document"
    return "a file of unknown format"
