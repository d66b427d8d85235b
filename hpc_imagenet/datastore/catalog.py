"""List, verify, fetch and delete the versions in a storage backend.

A version is deleted in an order that can be interrupted at any point: write deleted.json, remove the
manifest, then remove the rest. Without its manifest a version no longer exists, and deleted.json keeps its
number from being used again. On a full disk deleted.json is written last: until then the folder keeps it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import hardlink_check, versions
from hpc_imagenet.datastore.backends.folder_backend import FolderBackend
from hpc_imagenet.datastore.backends.storage_backend import (
    ProgressCallback,
    ProgressCounter,
    StorageBackend,
    explain_os_errors,
    fetch_files,
)
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, parse_manifest
from hpc_imagenet.datastore.stored_files import parse_json_object
from hpc_imagenet.datastore.unreadable import unreadable_versions
from hpc_imagenet.datastore.versions import COMPLETE, DELETED, GONE, PARTIAL, UNREADABLE
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import is_disk_full
from hpc_imagenet.io.disk import require_free_space


@dataclass(frozen=True)
class CatalogEntry:
    """A version and its state: complete, unreadable, partial, or deleted with files remaining."""

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
    entries, unreadable = [], set(unreadable_versions(backend, paths))
    for path in paths:
        datastore, _, number = path.partition("/v")
        if path in unreadable:
            entries.append(CatalogEntry(datastore, int(number), UNREADABLE))
        elif data := contents.get(f"{path}/{FILE}"):
            manifest = parse_manifest(data, f"{backend.url}/{path}/{FILE}")
            entries.append(CatalogEntry(datastore, int(number), COMPLETE, manifest, manifest.created))
        elif f"{path}/{DELETED}" in contents:
            if set(backend.files(path)) != {DELETED}:
                entries.append(CatalogEntry(datastore, int(number), GONE))
        else:
            claim = parse_json_object(contents.get(f"{path}/{versions.CLAIM}"))
            by = " on ".join(claim[key] for key in ("run", "host") if key in claim)
            entries.append(CatalogEntry(datastore, int(number), PARTIAL, None, claim.get("time", ""), by))
    return sorted(entries, key=lambda entry: (entry.name, entry.number))


def find_version(backend: StorageBackend, reference: str) -> CatalogEntry:
    """Return the complete version for `NAME[@vN]`; without a number the newest.

    Raises:
        UserError: no such version exists.
    """
    version = versions.open_version(Datastore(reference, backend.url), backend)
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
    backend: StorageBackend,
    entry: CatalogEntry,
    target: Path,
    threads: int,
    progress: ProgressCallback,
    check: bool = True,
) -> Path:
    """Download a version to `target/<name>/v<N>/`, so that training can read it with datastore.url=target.

    An interrupted fetch resumes: files that exist are verified by their hash and kept. The manifest is
    written last. Damaged files of a complete copy are fetched again.

    Args:
        backend: where the version is stored.
        entry: the version.
        target: a local folder.
        threads: number of files at a time.
        progress: called with the number of bytes done.
        check: whether to verify a copy that is complete; else it is used as it is.

    Raises:
        UserError: `target` has another version of that number, the disk has too little free space, or a
            file does not match its hash.
    """
    assert entry.manifest is not None
    local = FolderBackend(target)  # whatever its name: host:folder is a folder here
    folder = target / entry.path
    manifest = entry.manifest
    with explain_os_errors(f"fetch {entry.reference}", target):
        note = {"run": "fetch", "from": backend.url, "time": _now()}
        place, fix = Datastore(entry.reference, str(target)), f"fetch it to another folder than {target}"
        claim = versions.claim_version(local, place, manifest.content, note, fix)
        complete, counter, wrong = claim.complete, ProgressCounter(progress), None
        if complete:
            wrong = _wrong_files(local, entry, threads, counter) if check else []
            if not wrong:
                return folder
        lock = f"{claim.path}/{versions.LOCK}"
        with local.lock(lock, lambda: progress(0, f"waiting for another fetch of {entry.reference}")):
            if wrong:  # a damaged file takes its space until another one is there
                require_free_space(target, sum(file.bytes for file in wrong), entry.reference)
            else:
                require_free_space(target, manifest.bytes - _present(folder, manifest), entry.reference)
                wrong = _wrong_files(local, entry, threads, counter)
            fetch_files(backend, entry.path, wrong, folder, threads, counter)
            # Files of a complete version that are intact may be hard links, whose permissions are left alone.
            for file in wrong if complete else manifest.all_files():
                status = (folder / file.path).stat()
                if status.st_uid == os.geteuid():  # another user may have begun this fetch: only they may
                    (folder / file.path).chmod(status.st_mode & ~0o222)
            upload = {**(manifest.provenance.get("upload") or {})}
            upload.pop(hardlink_check.STAMPS, None)  # modification times of the original files
            claim.commit(replace(manifest, provenance={**manifest.provenance, "upload": upload}))
        claim.remove_upload_files()
    return folder


def delete_version(backend: StorageBackend, entry: CatalogEntry) -> None:
    """Delete a version, manifest first. Calling it again completes an interrupted deletion."""
    note = {"time": _now(), "content": entry.manifest.content if entry.manifest else None}
    path, data = f"{entry.path}/{DELETED}", json.dumps(note).encode()
    with explain_os_errors("datastore.url", backend.url):
        try:
            backend.create(path, data)
            full = False
        except OSError as error:
            full = is_disk_full(error)  # then only deleting makes space for the note
            if not full:
                raise
        backend.remove([f"{entry.path}/{FILE}"])
        backend.delete_all(entry.path, DELETED)
        if full:
            backend.create(path, data)


def is_stale(backend: StorageBackend, entry: CatalogEntry, seconds: float) -> bool:
    """Whether no file of a partial version was written for `seconds`; always true of a deleted version."""
    if entry.state == GONE:
        return True
    newest = max((stored.modified for stored in backend.files(entry.path).values()), default=0.0)
    return time.time() - newest > seconds


@contextlib.contextmanager
def exclusive(backend: StorageBackend, entry: CatalogEntry) -> Iterator[None]:
    """Hold the locks of all uploads to a partial version, those of its parts too, if the backend has locks.

    Raises:
        UserError: an upload to the version is running.
    """

    def refuse() -> None:
        raise UserError(
            f"{entry.reference}: an upload to it is running; wait for it or cancel it, then run prune again"
        )

    names = {versions.LOCK, *(name for name in backend.files(entry.path) if name.endswith(".lock"))}
    with contextlib.ExitStack() as locks:
        for name in sorted(names):
            locks.enter_context(backend.lock(f"{entry.path}/{name}", refuse))
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


def _present(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of a version that a folder has: of its files and of partly fetched ones."""
    names, present = {file.path for file in manifest.all_files()}, 0
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and (name.as_posix() in names or any(part[0] == "." for part in name.parts)):
            present += path.stat().st_size
    return present


def _wrong_files(
    local: StorageBackend, entry: CatalogEntry, threads: int, counter: ProgressCounter
) -> list[File]:
    """Return the files of a copy that are missing or damaged."""
    return [file for file, found in _hash_files(local, entry, threads, counter) if found != file.hash]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
