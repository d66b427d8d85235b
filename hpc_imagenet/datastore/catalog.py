"""List, verify, fetch and delete the versions in a storage backend.

A version is deleted in an order that can be interrupted at any point: write deleted.json, remove the
manifest, then remove the rest. Without its manifest a version no longer exists, and deleted.json keeps its
number from being used again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import hardlink_check, versions
from hpc_imagenet.datastore.backends.storage_backend import (
    ProgressCallback,
    ProgressCounter,
    StorageBackend,
    explain_os_errors,
    fetch_files,
)
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, parse_manifest
from hpc_imagenet.datastore.versions import COMPLETE, DELETED, GONE, PARTIAL
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.disk import require_free_space


@dataclass(frozen=True)
class CatalogEntry:
    """A version and its state: complete, partial, or deleted with files remaining."""

    name: str
    number: int
    state: str
    manifest: Manifest | None = None  # of a complete version
    begun: str = ""  # when a complete version was created or a partial upload began; ISO 8601, UTC
    by: str = ""  # of a partial version: run and host of the upload

    @property
    def reference(self) -> str:
        """The reference `name@vN`."""
        return f"{self.name}@v{self.number}"

    @property
    def path(self) -> str:
        """Path of the version within its backend."""
        return f"{self.name}/v{self.number}"


def list_versions(backend: StorageBackend, name: str | None = None) -> list[CatalogEntry]:
    """Return all versions of one datastore or of all, sorted by name and number.

    Deleted versions are included only while files of them remain.
    """
    paths = backend.versions(name)
    contents = backend.read(
        [f"{path}/{file}" for path in paths for file in (FILE, versions.CLAIM, versions.DELETED)]
    )
    entries = []
    for path in paths:
        datastore, _, number = path.partition("/v")
        if data := contents.get(f"{path}/{FILE}"):
            manifest = parse_manifest(data, f"{backend.url}/{path}/{FILE}")
            entries.append(CatalogEntry(datastore, int(number), COMPLETE, manifest, manifest.created))
        elif f"{path}/{DELETED}" in contents:
            if set(backend.files(path)) != {DELETED}:
                entries.append(CatalogEntry(datastore, int(number), GONE))
        else:
            claim = versions.parse_json_object(contents.get(f"{path}/{versions.CLAIM}"))
            by = " on ".join(claim[key] for key in ("run", "host") if key in claim)
            entries.append(CatalogEntry(datastore, int(number), PARTIAL, None, claim.get("time", ""), by))
    return sorted(entries, key=lambda entry: (entry.name, entry.number))


def find_version(backend: StorageBackend, reference: str) -> CatalogEntry:
    """Return the complete version for `NAME[@vN]`; without a number the newest.

    Raises:
        UserError: no such version exists.
    """
    version = versions.open_version(Datastore(reference, backend.url))
    return CatalogEntry(version.name, version.number, COMPLETE, version.manifest, version.manifest.created)


def verify_version(
    backend: StorageBackend, entry: CatalogEntry, threads: int, progress: ProgressCallback
) -> list[str]:
    """Hash every file of a complete version, `threads` at a time; return one line per wrong file."""
    errors = []
    for file, found in _hash_files(backend, entry, threads, ProgressCounter(progress)):
        if damage := file.damage(f"{backend.url}/{entry.path}/{file.path}", found):
            errors.append(damage)
    return errors


def fetch_version(
    backend: StorageBackend, entry: CatalogEntry, target: Path, threads: int, progress: ProgressCallback
) -> Path:
    """Download a version to `target/<name>/v<N>/`, so that training can read it with datastore.url=target.

    An interrupted fetch resumes: files that exist are verified by their hash and kept. The manifest is
    written last.

    Raises:
        UserError: `target` has another version of that number, the disk has too little free space, or a
            file does not match its hash.
    """
    assert entry.manifest is not None
    local = versions.open_backend(str(target))
    folder = target / entry.path
    manifest = entry.manifest
    with explain_os_errors(f"fetch {entry.reference}", target):
        note = {"run": "fetch", "from": backend.url, "time": _now()}
        claim = versions.claim_version(local, Datastore(entry.reference, str(target)), manifest.content, note)
        if claim.complete:
            return folder
        lock = f"{claim.path}/{versions.LOCK}"
        with local.lock(lock, lambda: progress(0, f"waiting for another fetch of {entry.reference}")):
            present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            require_free_space(target, manifest.bytes - present, entry.reference)
            counter = ProgressCounter(progress)
            hashes = _hash_files(local, entry, threads, counter)
            missing = [file for file, found in hashes if found != file.hash]
            fetch_files(backend, entry.path, missing, folder, threads, counter)
            for file in manifest.all_files():
                (folder / file.path).chmod((folder / file.path).stat().st_mode & ~0o222)
            upload = {**(manifest.provenance.get("upload") or {})}
            upload.pop(hardlink_check.STAMPS, None)  # modification times of the original files
            claim.commit(replace(manifest, provenance={**manifest.provenance, "upload": upload}))
        claim.remove_upload_files()
    return folder


def delete_version(backend: StorageBackend, entry: CatalogEntry) -> None:
    """Delete a version, manifest first. Calling it again completes an interrupted deletion."""
    note = {"time": _now(), "content": entry.manifest.content if entry.manifest else None}
    with explain_os_errors("datastore.url", backend.url):
        backend.create(f"{entry.path}/{DELETED}", json.dumps(note).encode())
        backend.remove([f"{entry.path}/{FILE}"])
        backend.delete_all(entry.path, DELETED)


def is_stale(backend: StorageBackend, entry: CatalogEntry, seconds: float) -> bool:
    """Whether no file of a partial version was written for `seconds`; always true of a deleted version."""
    if entry.state == GONE:
        return True
    newest = max((stored.modified for stored in backend.files(entry.path).values()), default=0.0)
    return time.time() - newest > seconds


@contextlib.contextmanager
def exclusive(backend: StorageBackend, entry: CatalogEntry) -> Iterator[None]:
    """Hold the upload lock of a partial version, if the backend has locks.

    Raises:
        UserError: an upload to the version is running.
    """

    def refuse() -> None:
        raise UserError(
            f"{entry.reference}: an upload to it is running; wait for it or cancel it, then run prune again"
        )

    with backend.lock(f"{entry.path}/{versions.LOCK}", refuse):
        yield


def _hash_files(
    backend: StorageBackend, entry: CatalogEntry, threads: int, counter: ProgressCounter
) -> list[tuple[File, str | None]]:
    """Return all files of a complete version with their hashes in `backend`; None if a file is missing."""
    assert entry.manifest is not None
    files = entry.manifest.all_files()
    with counter.threads(threads) as pool:
        hashes = pool.map(
            lambda file: backend.hash(f"{entry.path}/{file.path}", file, counter.for_file(file.path)), files
        )
        return list(zip(files, hashes, strict=True))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
