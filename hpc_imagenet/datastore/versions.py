"""Versions of a datastore: which there are, which one is meant, and who writes the next.

    <url>/<name>/v<N>/
        manifest.json      written last: the version is complete and never changes again
        upload.json        until then: which content is being uploaded, by which run
        deleted.json       all that is left of a version that was deleted: its number is not used again

A number is claimed by its upload.json: of several at once one succeeds. An upload that was cut off is found
by that content and taken up again under its number.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_imagenet.datastore.backends.storage_backend import StorageBackend, StoredFile, SupportsRangeReads
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, parse_manifest
from hpc_imagenet.errors import UserError, did_you_mean

if TYPE_CHECKING:  # it needs packages that a transfer does not
    from hpc_imagenet.config.schema import Datastore

CLAIM, LOCK, DELETED = "upload.json", "upload.lock", "deleted.json"
COMPLETE, PARTIAL, GONE = "complete", "partial", "deleted"  # states of a version
CONNECTIONS = 8  # requests at a time, of places that are asked by requests

_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:@v([1-9][0-9]{0,8}))?")
_SCHEME = re.compile(r"[a-z0-9]+://.*", re.DOTALL | re.IGNORECASE)
_HOST = re.compile(r"[^/]+:.*", re.DOTALL)  # user@host:…, as rsync and scp have it


@dataclass(frozen=True)
class Version:
    """A complete version, ready to be read."""

    name: str  # of the datastore
    number: int
    backend: StorageBackend
    manifest: Manifest

    @property
    def path(self) -> str:
        """Where it lies within its place."""
        return f"{self.name}/v{self.number}"

    @property
    def folder(self) -> Path | None:
        """The folder with its files; None where files cannot be opened."""
        return self.backend.folder and self.backend.folder / self.path


@dataclass(frozen=True)
class VersionClaim:
    """A version number held for one content."""

    name: str
    number: int
    backend: StorageBackend

    @property
    def path(self) -> str:
        """Where it lies within its place."""
        return f"{self.name}/v{self.number}"

    @property
    def complete(self) -> bool:
        """Whether an upload has finished it."""
        return bool(self.backend.read([f"{self.path}/{FILE}"]))

    def manifest(self) -> Manifest:
        """Return the manifest of a version that is complete."""
        return parse_manifest(*_only(self.backend, f"{self.path}/{FILE}"))

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, and with it make the version complete.

        Raises:
            UserError: not all is there that it names, or the number is not held for this content any more.
        """
        held = read_note(self.backend.read([f"{self.path}/{CLAIM}"]).get(f"{self.path}/{CLAIM}"))
        there = self.backend.files(self.path)
        for file in manifest.all_files():
            if there.get(file.path, StoredFile(-1, 0)).bytes != file.bytes:
                raise UserError(f"{self.backend.url}/{self.path}/{file.path} did not arrive whole: ask again")
        if not self.complete:
            if held.get("content") != manifest.content or DELETED in there:
                raise UserError(
                    f"{self.backend.url}/{self.path} was taken away from this upload meanwhile: ask again"
                )
            self.backend.create(f"{self.path}/{FILE}", manifest.encode())
        if self.manifest().content != manifest.content:
            raise UserError(f"{self.backend.url}/{self.path} was taken by other images meanwhile: ask again")

    def settle(self) -> None:
        """Take away what only an upload needs, once the manifest is written."""
        with contextlib.suppress(OSError, UserError):  # such as a colleague's version: theirs to tidy
            there = [name for name in self.backend.files(self.path) if re.fullmatch(r"upload[^/]*", name)]
            self.backend.remove([f"{self.path}/{name}" for name in there])
            self.backend.remove_partial(self.path)

    def vouch(self, name: str, files: Mapping[str, File]) -> None:
        """Note, in `upload-<name>.json`, that these files are there and were proved; by paths in here."""
        there = self.backend.files(self.path)
        proved = {
            path: [file.hash, there[path].bytes, there[path].modified]
            for path, file in files.items()
            if path in there
        }
        path = f"{self.path}/upload-{name}.json"
        self.backend.remove([path])
        self.backend.create(path, json.dumps(proved).encode())

    def vouched(self) -> dict[str, str]:
        """Return the hash of each file that such a note has and that was not touched since, by its path."""
        there = self.backend.files(self.path)
        notes = [name for name in there if re.fullmatch(r"upload-[^/]*\.json", name)]
        return {
            path: stamp[0]
            for data in self.backend.read([f"{self.path}/{name}" for name in notes]).values()
            for path, stamp in read_note(data).items()
            if path in there and [there[path].bytes, there[path].modified] == stamp[1:]
        }


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Split `imagenet` or `imagenet@v3` into name and version number (None: not pinned).

    Raises:
        UserError: it has another form.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"datastore.name={reference} is not NAME or NAME@vN: letters, digits and . _ - make a name"
        )
    return match[1], int(match[2]) if match[2] else None


def open_backend(url: str, connections: int = CONNECTIONS) -> StorageBackend:
    """Return the place that `datastore.url` stands for. Every transport's door is here.

    Raises:
        UserError: the url names a place of another kind, or its transport cannot begin.
    """
    if url.startswith("s3://"):
        from hpc_imagenet.datastore.backends.s3_backend import S3Backend

        return S3Backend(url, connections)
    if url.startswith("file:"):
        path = url.removeprefix("file:")
        url = "/" + path.lstrip("/") if path.startswith("/") else path
    elif _SCHEME.fullmatch(url):
        raise UserError(
            f"datastore.url={url} is of no known kind: a folder, user@host:/path or s3://bucket/prefix"
        )
    elif _HOST.fullmatch(url):
        from hpc_imagenet.datastore.backends.ssh_backend import SshBackend

        return SshBackend(url)
    if not url:
        raise UserError("datastore.url is empty: give a folder that the jobs can read")
    from hpc_imagenet.datastore.backends.folder_backend import FolderBackend

    return FolderBackend(Path(url).expanduser())


def is_remote(url: str) -> bool:
    """Whether no files can be opened at `url`; nobody is asked."""
    return not url.startswith("file:") and bool(_SCHEME.fullmatch(url) or _HOST.fullmatch(url))


def check_readable(place: StorageBackend, scratch: str | None, name: str) -> None:
    """Refuse a training that could not read: behind ssh no byte can be had but by fetching a file.

    Raises:
        UserError: there are no files at `place`, no ranges of them, and no folder to fetch them to.
    """
    if place.folder is None and not isinstance(place, SupportsRangeReads) and not scratch:
        raise UserError(
            f"training cannot read at datastore.url={place.url}: give cluster.scratch, a folder on the nodes "
            f"where it is copied to, or python -m hpc_imagenet datastores fetch {name} DIR "
            f"datastore.url={place.url}, then datastore.url=DIR"
        )


def complete_versions(url: str, name: str) -> list[int]:
    """Return the numbers of all versions of `name` that have a manifest, ascending."""
    return sorted(_manifests(open_backend(url), name))


def pinned(datastore: Datastore) -> tuple[str, int | None]:
    """Return the datastore's name and the version that is asked for, None where any will do.

    Raises:
        UserError: datastore.name has another form, or pins another version than datastore.version.
    """
    name, number = parse_reference(datastore.name)
    if None not in (number, datastore.version) and number != datastore.version:
        raise UserError(
            f"datastore.name={datastore.name} and datastore.version={datastore.version} differ: drop one"
        )
    if datastore.version is not None and datastore.version < 1:
        raise UserError(f"datastore.version={datastore.version} is no version: they count from 1")
    return name, number or datastore.version


def open_version(datastore: Datastore) -> Version:
    """Return the version that `datastore` means: the pinned one, or the newest (of `content`, if given).

    Raises:
        UserError: there is no such datastore or version, or the pinned version holds other content.
    """
    name, number = pinned(datastore)
    place = open_backend(datastore.url)
    there = _manifests(place, name)
    listed = _listed(sorted(there))
    if not there:
        raise UserError(_missing(place, name))
    if number is not None and number not in there:
        raise UserError(f"datastore {name}@v{number} does not exist; complete: {listed}")
    for candidate in sorted(there, reverse=True) if number is None else [number]:
        manifest = parse_manifest(there[candidate], f"{place.url}/{name}/v{candidate}/{FILE}")
        if datastore.content in (None, manifest.content):
            return Version(name, candidate, place, manifest)
    if number is not None:
        raise UserError(
            f"datastore {name}@v{number} holds other images than datastore.content={datastore.content}: "
            f"drop @v{number}, or give the dataset that it was made from"
        )
    raise UserError(
        f"no version of datastore {name} ({listed}) has datastore.content={datastore.content}: "
        "+stage=upload makes one"
    )


def claim_version(
    place: StorageBackend, datastore: Datastore, content: str, by: Mapping[str, str]
) -> VersionClaim:
    """Hold the version that `content` is uploaded to; `by` says who does.

    In this order: a complete version that has the content already; an upload of it that was cut off; the
    next free number. A pinned version is taken or refused. Uploads of different content at once get
    different numbers; uploads of the same content get the same one.

    Raises:
        UserError: the pinned version holds something else.
    """
    name, number = pinned(datastore)
    while True:
        taken = _contents(place, name)
        same = [n for n, (holds, _) in taken.items() if holds == content and number in (None, n)]
        if same:
            return VersionClaim(name, max(same, key=lambda n: (taken[n][1] == COMPLETE, n)), place)
        if number in taken:
            states = {COMPLETE: "exists", PARTIAL: "is taken by another upload", GONE: "was deleted"}
            state = states[taken[number][1]]
            raise UserError(
                f"datastore {name}@v{number} {state}; versions never change; drop @v{number} for the next one"
            )
        # Counted from the highest number ever begun, so that a number never means two things.
        free = number if number is not None else max(taken, default=0) + 1
        data = json.dumps({"content": content, **by}, indent=2).encode() + b"\n"
        if place.claim(f"{name}/v{free}", CLAIM, data):
            return VersionClaim(name, free, place)


def existing_files(place: StorageBackend, name: str) -> dict[File, list[str]]:
    """Return where files lie that complete versions have, by their bytes and hashes (and no path)."""
    found: dict[File, list[str]] = {}
    for number, data in _manifests(place, name).items():
        for file in parse_manifest(data, f"{place.url}/{name}/v{number}/{FILE}").all_files():
            same = File("", file.bytes, file.hash)
            found.setdefault(same, []).append(f"{name}/v{number}/{file.path}")
    return found


def _contents(place: StorageBackend, name: str) -> dict[int, tuple[str | None, str]]:
    """Return which content each version holds or is being given, and its state."""
    begun = place.versions(name)
    notes = place.read([f"{path}/{file}" for path in begun for file in (FILE, CLAIM, DELETED)])
    found: dict[int, tuple[str | None, str]] = {}
    for path in begun:
        if manifest := notes.get(f"{path}/{FILE}"):
            holds = parse_manifest(manifest, f"{place.url}/{path}/{FILE}").content
            found[_number(path)] = holds, COMPLETE
        elif f"{path}/{DELETED}" in notes:
            found[_number(path)] = None, GONE
        else:
            found[_number(path)] = read_note(notes.get(f"{path}/{CLAIM}")).get("content"), PARTIAL
    return found


def _manifests(place: StorageBackend, name: str) -> dict[int, bytes]:
    begun = place.versions(name)
    there = place.read([f"{path}/{FILE}" for path in begun])
    return {_number(path.rpartition("/")[0]): data for path, data in there.items()}


def datastore_names(place: StorageBackend) -> list[str]:
    """Return the datastores of a place that have a complete version, sorted."""
    there = place.read([f"{path}/{FILE}" for path in place.versions()])
    return sorted({path.partition("/")[0] for path in there})


def _only(place: StorageBackend, path: str) -> tuple[bytes, str]:
    try:
        return place.read([path])[path], f"{place.url}/{path}"
    except KeyError:
        raise UserError(f"{place.url}/{path} is missing") from None


def read_note(data: bytes | None) -> dict[str, Any]:
    """Return what stands in a small file of an upload; nothing where there is none, or a broken one."""
    with contextlib.suppress(ValueError):
        value = json.loads(data or b"{}")
        if isinstance(value, dict):
            return value
    return {}


def _number(path: str) -> int:
    return int(path.rpartition("/v")[2])


def _missing(place: StorageBackend, name: str) -> str:
    begun = [number for number, (holds, _) in _contents(place, name).items() if holds]
    if begun:
        return f"datastore {name} has no complete version yet: +stage=upload finishes {_listed(begun)}"
    there = datastore_names(place)
    makes = "+stage=pipeline makes it from the archives"
    return f"no datastore {name} in {place.url}: {makes}{did_you_mean(name, there) if there else ''}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"v{number}" for number in sorted(numbers))
