"""Say what a file looks like from its first bytes, so that an error can name what came instead."""

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
    """Whether these first bytes of a file begin a web page."""
    return first[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML)


def describe_content(first: bytes) -> str:
    """Return words for what begins with these bytes (512 are enough), such as `an HTML page`."""
    if not first:
        return "an empty file"
    if is_html(first):
        return "an HTML page"
    if first[257:262] == b"ustar":
        return "a tar"
    for magic, words in _MAGIC:
        if first.startswith(magic):
            return words
    if not first.strip(b"\0"):
        return "a file of zeros"
    start = first[:64].lstrip()
    if start.startswith(b"<"):
        return "an XML document"
    if start.startswith(b"{"):
        return "a JSON document"
    return "a file of no known format"
