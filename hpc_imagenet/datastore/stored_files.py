"""Stored files of a version that another upload of the same images has overwritten."""

from __future__ import annotations

from hpc_imagenet.datastore.backends.storage_backend import StorageBackend
from hpc_imagenet.datastore.manifest import Manifest
from hpc_imagenet.errors import UserError


def require_not_overwritten(backend: StorageBackend, path: str, manifest: Manifest) -> None:
    """Check by their hashes that the files beside the shards are those of the manifest.

    Indexes and certificate may differ between two uploads of the same images, which over ssh and in a bucket
    can run at the same time. A folder has locks.

    Args:
        backend: where the version is stored.
        path: of the version within the backend.
        manifest: about to be written.

    Raises:
        UserError: one has other bytes.
    """
    if backend.folder is not None:
        return
    for file in manifest.all_files()[len(manifest.shards) :]:
        if backend.hash(f"{path}/{file.path}", file, lambda done: None) != file.hash:
            raise UserError(
                f"{backend.url}/{path}/{file.path} was overwritten by another upload of the same images: "
                "run it again"
            )
