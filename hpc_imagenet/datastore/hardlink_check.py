"""Shards that are one file with something else, such as an archive: noticed when that was written to.

A version never changes, but a hard link does with the file that it is a name of. Whoever owns that file may
have further names for it, so its mode is left alone; its time of change at the upload stands in the manifest,
and is compared when the version is opened, as long as the file has a second name. What has only one is this
version's own, and copies of a version, which have other times, are not held to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.datastore.manifest import File, Manifest
from hpc_imagenet.errors import UserError

STAMPS = "changed_ns"  # in provenance["upload"]


def link_times(folder: Path, shards: Sequence[File]) -> dict[str, int]:
    """Return the times of change of those shards that have a second name, ns since 1970."""
    found = {shard.path: (folder / shard.path).stat() for shard in shards}
    return {path: status.st_mtime_ns for path, status in found.items() if status.st_nlink > 1}


def check_links(folder: Path, manifest: Manifest) -> None:
    """Look at the time of change of each shard that was linked and still is.

    Raises:
        UserError: one was written to after the upload.
    """
    upload = manifest.provenance.get("upload") or {}
    for path, then in (upload.get(STAMPS) or {}).items():
        status = (folder / path).stat()
        if status.st_nlink > 1 and status.st_mtime_ns != then:
            number = upload.get("version")
            raise UserError(
                f"{folder / path} was written to after its upload: it is one file with an archive. "
                f"python -m hpc_imagenet datastores verify {manifest.name}@v{number} says whether its bytes "
                "are the same; +stage=upload makes a new version once this one is deleted"
            )
