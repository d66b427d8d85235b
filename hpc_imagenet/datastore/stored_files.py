"""Files that uploads have stored in a version: which are verified, and which were overwritten by another."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from hpc_imagenet.datastore.backends.storage_backend import StorageBackend
from hpc_imagenet.datastore.manifest import File, Manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import decode_json


def parse_json_object(data: bytes | None) -> dict[str, Any]:
    """Parse a small JSON file of an upload; an empty dict if it is missing, damaged or not an object."""
    with contextlib.suppress(ValueError):
        value = decode_json(data or b"{}")
        if isinstance(value, dict):
            return value
    return {}


def record_verified(backend: StorageBackend, path: str, part: str, files: Mapping[str, File]) -> None:
    """Record in `upload-<part>.json` that files are stored and verified.

    Args:
        backend: where the version is stored.
        path: of the version within the backend.
        part: part of the upload, such as `0-of-4`.
        files: the files, by path within the version.
    """
    stored = backend.files(path)
    verified = {
        name: [file.hash, stored[name].bytes, stored[name].modified]
        for name, file in files.items()
        if name in stored
    }
    record = f"{path}/upload-{part}.json"
    backend.remove([record])
    backend.create(record, json.dumps(verified).encode())


def verified_hashes(backend: StorageBackend, path: str) -> dict[str, str]:
    """Return the hashes that `record_verified` recorded, by path, of files not modified since."""
    stored = backend.files(path)
    records = [name for name in stored if re.fullmatch(r"upload-[^/]*\.json", name)]
    return {
        name: entry[0]
        for data in backend.read([f"{path}/{record}" for record in records]).values()
        for name, entry in parse_json_object(data).items()
        if name in stored and [stored[name].bytes, stored[name].modified] == entry[1:]
    }


def require_not_overwritten(backend: StorageBackend, path: str, manifest: Manifest, fix: str) -> None:
    """Check by their hashes that the files beside the shards are those of the manifest.

    Indexes and certificate may differ between two uploads of the same images, which over ssh and in a bucket
    can run at the same time. A folder has locks.

    Args:
        backend: where the version is stored.
        path: of the version within the backend.
        manifest: about to be written, or written by the other upload.
        fix: what to do if one has other bytes.

    Raises:
        UserError: one has other bytes.
    """
    if backend.folder is not None:
        return
    for file in manifest.all_files()[len(manifest.shards) :]:
        if backend.hash(f"{path}/{file.path}", file, lambda done: None) != file.hash:
            raise UserError(
                f"{backend.url}/{path}/{file.path} was overwritten by another upload of the same images: "
                f"{fix}"
            )
