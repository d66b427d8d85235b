"""What stands at a place, and what can be done with it: look, verify, fetch, delete, sweep.

A version is deleted in an order that can be cut off anywhere: a note that it goes, the manifest, and then
the rest. Without its manifest it is no version any more, and the note keeps its number from being used again.
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
    ProgressCounter,
    StorageBackend,
    Tell,
    explain_os_errors,
    fetch_files,
    require_room,
)
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, parse_manifest
from hpc_imagenet.datastore.versions import COMPLETE, DELETED, GONE, PARTIAL
from hpc_imagenet.errors import UserError


@dataclass(frozen=True)
class CatalogEntry:
    """A version as it stands: complete, partial, or deleted with something left of it."""

    name: str
    number: int
    state: str
    manifest: Manifest | None = None
    begun: str = ""  # of a partial one: when; ISO 8601, UTC
    by: str = ""  # of a partial one: which run, on which host

    @property
    def reference(self) -> str:
        """Return `name@vN`."""
        return f"{self.name}@v{self.number}"

    @property
    def path(self) -> str:
        """Where it lies within its place."""
        return f"{self.name}/v{self.number}"


def list_versions(place: StorageBackend, name: str | None = None) -> list[CatalogEntry]:
    """Return all versions, of one datastore or of all, by name and number; deleted ones left out."""
    begun = place.versions(name)
    notes = place.read(
        [f"{path}/{file}" for path in begun for file in (FILE, versions.CLAIM, versions.DELETED)]
    )
    found = []
    for path in begun:
        of, _, number = path.partition("/v")
        if data := notes.get(f"{path}/{FILE}"):
            manifest = parse_manifest(data, f"{place.url}/{path}/{FILE}")
            found.append(CatalogEntry(of, int(number), COMPLETE, manifest, manifest.created))
        elif f"{path}/{DELETED}" in notes:
            if set(place.files(path)) != {DELETED}:
                found.append(CatalogEntry(of, int(number), GONE))
        else:
            claim = versions.read_note(notes.get(f"{path}/{versions.CLAIM}"))
            by = " on ".join(claim[key] for key in ("run", "host") if key in claim)
            found.append(CatalogEntry(of, int(number), PARTIAL, None, claim.get("time", ""), by))
    return sorted(found, key=lambda entry: (entry.name, entry.number))


def find_version(place: StorageBackend, reference: str) -> CatalogEntry:
    """Return the complete version that `NAME[@vN]` means, the newest without a number.

    Raises:
        UserError: there is none.
    """
    version = versions.open_version(Datastore(reference, place.url))
    return CatalogEntry(version.name, version.number, COMPLETE, version.manifest, version.manifest.created)


def verify_version(place: StorageBackend, entry: CatalogEntry, threads: int, tell: Tell) -> list[str]:
    """Read every file of a complete version, several at a time; return what is wrong, a line each."""
    assert entry.manifest is not None
    tally, wrong = ProgressCounter(tell), []
    files = entry.manifest.all_files()
    with tally.threads(threads) as pool:
        hashes = pool.map(
            lambda file: place.hash(f"{entry.path}/{file.path}", file, tally.of(file.path)), files
        )
        for file, found in zip(files, hashes, strict=True):
            if found is None:
                wrong.append(f"{place.url}/{entry.path}/{file.path} is missing")
            elif found != file.hash:
                wrong.append(
                    f"{place.url}/{entry.path}/{file.path} has other bytes than when it was made: {found}"
                )
    return wrong


def fetch_version(place: StorageBackend, entry: CatalogEntry, target: Path, threads: int, tell: Tell) -> Path:
    """Bring a version to `target/<name>/v<N>/`, so that `target` is a datastore.url that training can read.

    Asked again it goes on; what is there already is proved by its hash. The manifest comes last.

    Raises:
        UserError: another version of that number is there, no room, or bytes that are not what they were.
    """
    assert entry.manifest is not None
    here = versions.open_backend(str(target))
    folder = target / entry.path
    manifest = entry.manifest
    with explain_os_errors(f"fetch {entry.reference}", target):
        note = {"run": "fetch", "from": place.url, "time": _now()}
        claim = versions.claim_version(here, Datastore(entry.reference, str(target)), manifest.content, note)
        if claim.complete:
            return folder
        with here.lock(f"{claim.path}/{versions.LOCK}", lambda: tell(0, "another fetch of it is at work")):
            there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            require_room(f"fetch {entry.reference}", manifest.bytes - there, target)
            tally = ProgressCounter(tell)

            def missing(file: File) -> bool:
                path = f"{entry.path}/{file.path}"
                there = (target / path).exists()
                return not there or here.hash(path, file, tally.of(file.path)) != file.hash

            files = manifest.all_files()
            with tally.threads(threads) as pool:
                looked = list(pool.map(missing, files))
            wanted = [file for file, gone in zip(files, looked, strict=True) if gone]
            fetch_files(place, entry.path, wanted, folder, threads, tally)
            for file in files:
                (folder / file.path).chmod((folder / file.path).stat().st_mode & ~0o222)
            upload = {**(manifest.provenance.get("upload") or {})}
            upload.pop(hardlink_check.STAMPS, None)  # of other files
            claim.commit(replace(manifest, provenance={**manifest.provenance, "upload": upload}))
        claim.settle()
    return folder


def delete_version(place: StorageBackend, entry: CatalogEntry) -> None:
    """Remove a version, manifest first; asked again it goes on."""
    note = {"time": _now(), "content": entry.manifest.content if entry.manifest else None}
    with explain_os_errors("datastore.url", place.url):
        place.create(f"{entry.path}/{DELETED}", json.dumps(note).encode())
        place.remove([f"{entry.path}/{FILE}"])
        place.delete_all(entry.path, DELETED)


def is_stale(place: StorageBackend, entry: CatalogEntry, seconds: float) -> bool:
    """Whether nothing of a partial version was written for so long; deleted ones are always idle."""
    if entry.state == GONE:
        return True
    newest = max((stored.modified for stored in place.files(entry.path).values()), default=0.0)
    return time.time() - newest > seconds


@contextlib.contextmanager
def exclusive(place: StorageBackend, entry: CatalogEntry) -> Iterator[None]:
    """Hold the turn of a partial version, where the place has turns.

    Raises:
        UserError: an upload is at work on it.
    """

    def refuse() -> None:
        raise UserError(f"{entry.reference}: an upload is at work on it")

    with place.lock(f"{entry.path}/{versions.LOCK}", refuse):
        yield


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
