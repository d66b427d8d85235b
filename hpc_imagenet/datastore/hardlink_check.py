"""Detect hard-linked shards that were modified after the upload.

A version must not change, but a hard-linked shard changes when the original file, such as an archive, is
written to. The file may have other hard links, so its permissions are left alone. Instead the upload records
its modification time in the manifest, and opening the version compares it as long as the file has more than
one link. A file with one link belongs to the version alone. Copies of a version have other modification times
and are not checked.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.datastore.manifest import File, Manifest
from hpc_imagenet.errors import UserError

STAMPS = "changed_ns"  # key in provenance["upload"]


def link_times(folder: Path, shards: Sequence[File]) -> dict[str, int]:
    """Return the modification times (ns since 1970) of the shards with more than one hard link, by path."""
    found = {shard.path: (folder / shard.path).stat() for shard in shards}
    return {path: status.st_mtime_ns for path, status in found.items() if status.st_nlink > 1}


def linked_shards(manifest: Manifest) -> dict[str, int]:
    """Return what `link_times` returned at the upload; empty for a copy of a version."""
    return dict((manifest.provenance.get("upload") or {}).get(STAMPS) or {})


def check_links(folder: Path, manifest: Manifest) -> None:
    """Compare the modification time of each shard that was hard-linked at the upload and still is.

    Raises:
        UserError: a shard was modified after the upload.
    """
    upload = manifest.provenance.get("upload") or {}
    for path, uploaded_ns in linked_shards(manifest).items():
        status = (folder / path).stat()
        if status.st_nlink > 1 and status.st_mtime_ns != uploaded_ns:
            number, quoted = upload.get("version"), shlex.quote(f"{folder / path}")
            raise UserError(
                f"{folder / path} was modified after its upload: it is a hard link to an archive. Check its "
                f"bytes with python -m hpc_imagenet datastores verify {manifest.name}@v{number}; if they "
                "differ, delete this version and upload a new one with +stage=upload; if they are the same, "
                f"give it a copy of its own: cp -p {quoted} {quoted}.own && mv {quoted}.own {quoted}"
            )
