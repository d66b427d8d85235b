"""Versions of a datastore: which there are, which one is meant, and who writes the next.

    <url>/<name>/v<N>/
        manifest.json      written last: the version is complete and never changes again
        upload.json        until then: which content is being uploaded, by which run

A number is claimed by renaming a folder that holds its upload.json to `v<N>`: of several at once one
succeeds, on every file system that has an atomic rename, and no claim is ever seen without its content. An
upload that was cut off is found by that content and taken up again under its number.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_imagenet.config import Datastore, near
from hpc_imagenet.datastore.manifest import FILE, Manifest, load_manifest
from hpc_imagenet.durable import read_json, sync_folder, write_json
from hpc_imagenet.errors import UserError

CLAIM, LOCK = "upload.json", "upload.lock"

_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:@v([1-9][0-9]{0,8}))?")
_NUMBER = re.compile(r"v([1-9][0-9]{0,8})")
_REMOTE = re.compile(r"[a-z0-9]+://.*|[^/]+:.*", re.DOTALL | re.IGNORECASE)  # s3://… and user@host:…


@dataclass(frozen=True)
class Version:
    """A complete version, ready to be read."""

    name: str  # of the datastore
    number: int
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Claim:
    """A version number held for one content; `complete` where an earlier upload finished it."""

    name: str
    number: int
    folder: Path

    @property
    def complete(self) -> bool:
        """Whether its manifest is written."""
        return (self.folder / FILE).exists()

    @property
    def lock(self) -> Path:
        """The file by which uploads of the same content take turns."""
        return self.folder / LOCK

    def settle(self) -> None:
        """Take away what only an upload needs, once the manifest is written."""
        with contextlib.suppress(OSError):  # such as a colleague's version: theirs to tidy
            (self.folder / CLAIM).unlink(missing_ok=True)
            self.lock.unlink(missing_ok=True)


def parse(reference: str) -> tuple[str, int | None]:
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


def locate(url: str) -> Path:
    """Return the folder that `datastore.url` stands for. Every transport's door is here.

    Raises:
        UserError: the url names a place that is not a folder.
    """
    if url.startswith("file:"):
        path = url.removeprefix("file:")
        url = "/" + path.lstrip("/") if path.startswith("/") else path
    elif _REMOTE.fullmatch(url):
        raise UserError(f"datastore.url={url} is not supported yet: give a folder that the jobs can read")
    if not url:
        raise UserError("datastore.url is empty: give a folder that the jobs can read")
    return Path(url).expanduser()


def complete(url: str, name: str) -> list[int]:
    """Return the numbers of all versions of `name` that have a manifest, ascending."""
    home = locate(url) / name
    return [number for number in _numbers(home) if (home / f"v{number}" / FILE).exists()]


def names(url: str) -> list[str]:
    """Return the datastores at `url` that have a complete version, sorted."""
    root = locate(url)
    if not root.is_dir():
        return []
    found = (folder.name for folder in root.iterdir() if _REFERENCE.fullmatch(folder.name))
    return sorted(name for name in found if complete(url, name))


def pinned(datastore: Datastore) -> tuple[str, int | None]:
    """Return the datastore's name and the version that is asked for, None where any will do.

    Raises:
        UserError: datastore.name has another form, or pins another version than datastore.version.
    """
    name, number = parse(datastore.name)
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
    there = complete(datastore.url, name)
    if not there:
        raise UserError(_missing(datastore.url, name))
    if number is not None and number not in there:
        raise UserError(f"datastore {name}@v{number} does not exist; complete: {_listed(there)}")
    for candidate in reversed(there) if number is None else [number]:
        folder = locate(datastore.url) / name / f"v{candidate}"
        manifest = load_manifest(folder)
        if datastore.content in (None, manifest.content):
            return Version(name, candidate, folder, manifest)
    if number is not None:
        raise UserError(
            f"datastore {name}@v{number} holds other images than datastore.content={datastore.content}: "
            f"drop @v{number}, or give the dataset that it was made from"
        )
    raise UserError(
        f"no version of datastore {name} ({_listed(there)}) has datastore.content={datastore.content}: "
        "+stage=upload makes one"
    )


def claim(datastore: Datastore, content: str, note: Mapping[str, str]) -> Claim:
    """Hold the version that `content` is uploaded to; `note` says who does.

    In this order: a complete version that has the content already; an upload of it that was cut off; the
    next free number. A pinned version is taken or refused. Uploads of different content at once get
    different numbers; uploads of the same content get the same one, and take turns by `folder.turn`.

    Raises:
        UserError: the pinned version holds something else.
    """
    name, number = pinned(datastore)
    home = locate(datastore.url) / name
    home.mkdir(parents=True, exist_ok=True)
    while True:
        taken = _numbers(home)
        meant = [Claim(name, n, home / f"v{n}") for n in taken if number in (None, n)]
        same = [version for version in meant if _content(version.folder) == content]
        if same:
            return max(same, key=lambda version: (version.complete, version.number))
        if number in taken:
            state = "exists" if number in complete(datastore.url, name) else "is taken by another upload"
            raise UserError(
                f"datastore {name}@v{number} {state}; versions never change; drop @v{number} for the next one"
            )
        # Counted from the highest number ever begun, so that a number never means two things.
        free = number if number is not None else max(taken, default=0) + 1
        if _take(home / f"v{free}", {"content": content, **note}):
            return Claim(name, free, home / f"v{free}")


def _take(folder: Path, claim: Mapping[str, str]) -> bool:
    """Make `folder` with its upload.json in it; False where another was faster."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    draft.mkdir()
    try:
        write_json(draft / CLAIM, claim)
        draft.rename(folder)  # refused where the folder is there and not empty, and ours never is
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if folder.exists():
            return False
        raise
    sync_folder(folder.parent)
    return True


def _content(folder: Path) -> str | None:
    """Return which content a version holds or is being given; None where nothing says so."""
    try:
        return load_manifest(folder).content
    except FileNotFoundError:
        return (read_json(folder / CLAIM) or {}).get("content")


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (_NUMBER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _missing(url: str, name: str) -> str:
    begun = _numbers(locate(url) / name)
    if begun:
        return f"datastore {name} has no complete version yet: +stage=upload finishes {_listed(begun)}"
    there = names(url)
    return f"no datastore {name} in {url}: +stage=upload makes it{near(name, there) if there else ''}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"v{number}" for number in numbers)
