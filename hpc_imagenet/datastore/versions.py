"""Versions of a datastore: list them, open one, and claim the number of the next.

    <url>/<name>/v<N>/
        manifest.json      written last: the version is complete and never changes again
        upload.json        until then: content and run of the upload
        deleted.json       all that remains of a deleted version: its number is not used again

A number is claimed by creating its upload.json: of several uploads at once, one succeeds. An interrupted
upload is found by the content in that file and resumed under its number.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_imagenet.datastore.backends.storage_backend import StorageBackend, StoredFile, SupportsRangeReads
from hpc_imagenet.datastore.manifest import FILE, File, Manifest, parse_manifest
from hpc_imagenet.datastore.stored_files import parse_json_object, require_not_overwritten
from hpc_imagenet.datastore.unreadable import newest_unreadable, unreadable_link, warn_once
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.access import expand_home

if TYPE_CHECKING:  # imports packages that a transfer does not need
    from hpc_imagenet.config.schema import Datastore

CLAIM, LOCK, DELETED = "upload.json", "upload.lock", "deleted.json"
# States of a version; one whose manifest only its owner may read is unreadable.
COMPLETE, PARTIAL, GONE, UNREADABLE = "complete", "partial", "deleted", "unreadable"
CONNECTIONS = 8  # parallel requests to S3

_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:@v([1-9][0-9]{0,8}))?")
_SCHEME = re.compile(r"[a-z0-9]+://.*", re.DOTALL | re.IGNORECASE)
_HOST = re.compile(r"[^/]+:.*", re.DOTALL)  # user@host:…, as in rsync and scp


@dataclass(frozen=True)
class Version:
    """A complete, readable version."""

    name: str  # of the datastore
    number: int
    backend: StorageBackend
    manifest: Manifest

    @property
    def path(self) -> str:
        """Path within the backend."""
        return f"{self.name}/v{self.number}"

    @property
    def folder(self) -> Path | None:
        """The folder with its files; None if the backend has no files that can be opened."""
        return self.backend.folder and self.backend.folder / self.path


@dataclass(frozen=True)
class VersionClaim:
    """A version number claimed for one content."""

    name: str
    number: int
    backend: StorageBackend

    @property
    def path(self) -> str:
        """Path within the backend."""
        return f"{self.name}/v{self.number}"

    @property
    def complete(self) -> bool:
        """Whether the version has its manifest."""
        return bool(self.backend.read([f"{self.path}/{FILE}"]))

    def manifest(self) -> Manifest:
        """Return the manifest of a complete version."""
        return parse_manifest(*_read_file(self.backend, f"{self.path}/{FILE}"))

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the version complete.

        Raises:
            UserError: a file of the manifest is missing, or the number is no longer claimed for this content.
        """
        claim = parse_json_object(self.backend.read([f"{self.path}/{CLAIM}"]).get(f"{self.path}/{CLAIM}"))
        stored = self.backend.files(self.path)
        for file in manifest.all_files():
            if stored.get(file.path, StoredFile(-1, 0)).bytes != file.bytes:
                raise UserError(f"{self.backend.url}/{self.path}/{file.path} is incomplete: run it again")
        if not self.complete:
            if claim.get("content") != manifest.content or DELETED in stored:
                raise UserError(
                    f"{self.backend.url}/{self.path} was deleted, or claimed by another upload, during this "
                    "upload: run it again"
                )
            require_not_overwritten(self.backend, self.path, manifest, "run it again")
            self.backend.create(f"{self.path}/{FILE}", manifest.encode())
        written = self.manifest()
        if written.content != manifest.content:
            raise UserError(
                f"{self.backend.url}/{self.path} was completed by an upload of other images: run it again"
            )
        if written != manifest:  # of an upload at the same time, whose files this one may have replaced
            fix = f"delete it with datastores delete {self.name}@v{self.number} and upload it again"
            require_not_overwritten(self.backend, self.path, written, fix)

    def remove_upload_files(self) -> None:
        """Remove the files that only an upload needs, once the manifest is written.

        Those are `upload*`, and other shards of the same images, which an interrupted one has stored. Hidden
        files beside the shards are those that rsync writes for another upload.
        """
        with contextlib.suppress(OSError, UserError):  # such as no permission: another user's version
            stored = self.backend.files(self.path)
            shards = {file.path for file in self.manifest().shards}
            pattern = r"upload[^/]*" + (r"|shards/[^./][^/]*" if CLAIM in stored else "")
            leftovers = [name for name in stored if re.fullmatch(pattern, name) and name not in shards]
            leftovers.sort(key=lambda name: name == CLAIM)  # last, so that an interrupted removal is repeated
            self.backend.remove([f"{self.path}/{name}" for name in leftovers])
            self.backend.remove_partial(self.path)


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Split `imagenet` or `imagenet@v3` into name and version number (None: not pinned).

    Raises:
        UserError: the reference has another form.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"datastore.name={reference} is not NAME or NAME@vN: NAME may have letters, digits and . _ -"
        )
    return match[1], int(match[2]) if match[2] else None


def open_backend(url: str, connections: int = CONNECTIONS) -> StorageBackend:
    """Return the storage backend for a `datastore.url`. All backends are created here.

    Args:
        url: a folder, file:/path, user@host:/path or s3://bucket/prefix.
        connections: parallel requests to S3.

    Raises:
        UserError: unknown kind of URL, or the backend cannot be initialized.
    """
    if url.startswith("s3://"):
        from hpc_imagenet.datastore.backends.s3_backend import S3Backend

        return S3Backend(url, connections)
    if url.startswith("file:"):
        path = url.removeprefix("file:")
        url = "/" + path.lstrip("/") if path.startswith("/") else path
    elif _SCHEME.fullmatch(url):
        scheme = url.partition("://")[0]  # the rest may hold a password by mistake
        raise UserError(
            f"datastore.url={scheme}:// has an unknown scheme: type a folder, user@host:/path or "
            "s3://bucket/prefix"
        )
    elif _HOST.fullmatch(url):
        from hpc_imagenet.datastore.backends.ssh_backend import SshBackend

        return SshBackend(url)
    if not url:
        raise UserError("datastore.url is empty: type a folder that the jobs can read")
    from hpc_imagenet.datastore.backends.folder_backend import FolderBackend

    return FolderBackend(expand_home(url))


def is_remote(url: str) -> bool:
    """Whether `url` is a backend without local files, decided by its form alone."""
    return not url.startswith("file:") and bool(_SCHEME.fullmatch(url) or _HOST.fullmatch(url))


def needs_copies(backend: StorageBackend) -> bool:
    """Whether images of a backend can be read from local copies alone, as over ssh."""
    return backend.folder is None and not isinstance(backend, SupportsRangeReads)


def check_readable(backend: StorageBackend, scratch: str | None, name: str) -> None:
    """Check that training can read from a backend: over ssh it needs a local copy.

    Args:
        backend: where the datastore is stored.
        scratch: `cluster.scratch`, the folder on the nodes for local copies.
        name: datastore name for the error message.

    Raises:
        UserError: the backend has no local files and no range reads, and `scratch` is not set.
    """
    if needs_copies(backend) and not scratch:
        raise UserError(
            f"training cannot read directly from datastore.url={backend.url}: set cluster.scratch, a folder "
            f"on the nodes for local copies, or run python -m hpc_imagenet datastores fetch {name} DIR "
            f"datastore.url={backend.url}, then set datastore.url=DIR"
        )


def complete_versions(url: str, name: str) -> list[int]:
    """Return the numbers of all versions of `name` that have a manifest, ascending."""
    return sorted(_manifests(open_backend(url), name))


def pinned(datastore: Datastore) -> tuple[str, int | None]:
    """Return the datastore's name and the pinned version number, None if not pinned.

    Raises:
        UserError: datastore.name has another form, or pins another version than datastore.version.
    """
    name, number = parse_reference(datastore.name)
    if None not in (number, datastore.version) and number != datastore.version:
        raise UserError(
            f"datastore.name={datastore.name} and datastore.version={datastore.version} differ: drop one"
        )
    if datastore.version is not None and datastore.version < 1:
        raise UserError(f"datastore.version={datastore.version} is not a version number: they start at 1")
    return name, number or datastore.version


def open_version(datastore: Datastore, backend: StorageBackend | None = None) -> Version:
    """Return the version that `datastore` selects: the pinned one, or the newest (with `content`, if set).

    A newer version of another user that cannot be read is left out with a warning.

    Args:
        datastore: name, maybe a pinned version or a content.
        backend: where it is stored; None: a new one for `datastore.url`.

    Raises:
        UserError: the datastore or version does not exist or cannot be read, or the pinned version has other
            content.
    """
    name, number = pinned(datastore)
    backend = backend or open_backend(datastore.url)
    manifests = _manifests(backend, name)
    listed = _format_numbers(sorted(manifests))
    if number not in manifests:
        newest = max(manifests, default=0)
        hidden = newest_unreadable(backend, name, number, newest)
        if hidden and (number is not None or not manifests):
            raise UserError(hidden)
        if hidden and datastore.content is None:  # else the version with this content is as good
            warn_once(f"{hidden}; until then v{newest} is the newest")
    if not manifests:
        raise UserError(_no_version_message(backend, name))
    if number is not None and number not in manifests:
        raise UserError(f"datastore {name}@v{number} does not exist; complete: {listed}")
    closed = ""
    for candidate in sorted(manifests, reverse=True) if number is None else [number]:
        manifest = parse_manifest(manifests[candidate], f"{backend.url}/{name}/v{candidate}/{FILE}")
        if datastore.content in (None, manifest.content):
            version = Version(name, candidate, backend, manifest)
            if line := unreadable_link(version.folder, manifest):
                closed = closed or line
                continue
            if closed:
                warn_once(f"{closed}; until then v{candidate} is the newest")
            return version
    if closed:
        raise UserError(closed)
    if number is not None:
        raise UserError(
            f"datastore {name}@v{number} has other images than datastore.content={datastore.content}: "
            f"drop @v{number}, or set the dataset that it was made from"
        )
    raise UserError(
        f"no version of datastore {name} ({listed}) has datastore.content={datastore.content}: "
        "run +stage=upload to create one"
    )


def claim_version(
    backend: StorageBackend,
    datastore: Datastore,
    content: str,
    owner: Mapping[str, str],
    fix: str | None = None,
) -> VersionClaim:
    """Claim the version number for uploading `content`.

    In this order: a complete version with the content; an interrupted upload of it; the next free number. A
    pinned number is claimed, or an error. Concurrent uploads of different content get different numbers;
    those of the same content get the same one.

    Args:
        backend: where the datastore is stored.
        datastore: its name and maybe a pinned version.
        content: short hash of the images; see `Manifest`.
        owner: run, host and time of the upload, written to upload.json.
        fix: what to type if a pinned number is taken, for the error; None: drop it.

    Raises:
        UserError: the pinned version has other content.
    """
    name, number = pinned(datastore)
    while True:
        existing = _contents(backend, name)
        same = [n for n, (other, _) in existing.items() if other == content and number in (None, n)]
        if same:
            return VersionClaim(name, max(same, key=lambda n: (existing[n][1] == COMPLETE, n)), backend)
        if number in existing:
            states = {COMPLETE: "exists", PARTIAL: "is claimed by another upload", GONE: "was deleted"}
            state = states[existing[number][1]]
            fix = fix or f"drop @v{number} to create the next one"
            raise UserError(f"datastore {name}@v{number} {state}; versions never change: {fix}")
        # One above the highest number ever claimed, so that no number is used twice.
        free = number if number is not None else max(existing, default=0) + 1
        data = json.dumps({"content": content, **owner}, indent=2).encode() + b"\n"
        if backend.claim(f"{name}/v{free}", CLAIM, data):
            return VersionClaim(name, free, backend)


def existing_files(backend: StorageBackend, name: str) -> dict[File, list[str]]:
    """Return the paths of all files of complete versions, by size and hash (with an empty path)."""
    paths: dict[File, list[str]] = {}
    for number, data in _manifests(backend, name).items():
        for file in parse_manifest(data, f"{backend.url}/{name}/v{number}/{FILE}").all_files():
            same = File("", file.bytes, file.hash)
            paths.setdefault(same, []).append(f"{name}/v{number}/{file.path}")
    return paths


def _contents(backend: StorageBackend, name: str) -> dict[int, tuple[str | None, str]]:
    """Return the content and state of each version, by number; partial ones included."""
    paths = backend.versions(name)
    files = backend.read([f"{path}/{file}" for path in paths for file in (FILE, CLAIM, DELETED)])
    contents: dict[int, tuple[str | None, str]] = {}
    for path in paths:
        if manifest := files.get(f"{path}/{FILE}"):
            content = parse_manifest(manifest, f"{backend.url}/{path}/{FILE}").content
            contents[_number(path)] = content, COMPLETE
        elif f"{path}/{DELETED}" in files:
            contents[_number(path)] = None, GONE
        else:
            contents[_number(path)] = parse_json_object(files.get(f"{path}/{CLAIM}")).get("content"), PARTIAL
    return contents


def _manifests(backend: StorageBackend, name: str) -> dict[int, bytes]:
    """Return the manifest files of all complete versions, by number."""
    files = backend.read([f"{path}/{FILE}" for path in backend.versions(name)])
    return {_number(path.rpartition("/")[0]): data for path, data in files.items()}


def datastore_names(backend: StorageBackend) -> list[str]:
    """Return the sorted names of all datastores that have a complete version."""
    files = backend.read([f"{path}/{FILE}" for path in backend.versions()])
    return sorted({path.partition("/")[0] for path in files})


def _read_file(backend: StorageBackend, path: str) -> tuple[bytes, str]:
    """Return the contents and the full URL of a file."""
    try:
        return backend.read([path])[path], f"{backend.url}/{path}"
    except KeyError:
        raise UserError(f"{backend.url}/{path} is missing") from None


def _number(path: str) -> int:
    return int(path.rpartition("/v")[2])


def _no_version_message(backend: StorageBackend, name: str) -> str:
    partial = [number for number, (content, _) in _contents(backend, name).items() if content]
    if partial:
        return (
            f"datastore {name} has no complete version yet: +stage=upload finishes {_format_numbers(partial)}"
        )
    names = datastore_names(backend)
    fix = "+stage=pipeline makes it from the archives"
    return f"no datastore {name} in {backend.url}: {fix}{did_you_mean(name, names) if names else ''}"


def _format_numbers(numbers: list[int]) -> str:
    return ", ".join(f"v{number}" for number in sorted(numbers))
