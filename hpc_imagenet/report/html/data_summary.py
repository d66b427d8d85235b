"""The datastores that trainings used: certificate, class names, and thumbnails of the worst classes."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore.stored_files import parse_json_object
from hpc_imagenet.datastore.versions import Version, open_version
from hpc_imagenet.errors import UserError, first_line

_CERTIFICATE = "certificate.json"
_MAX_SKIPPED = 20  # corrupt images that are named
# Of a datastore that cannot be read, and of damaged settings or a damaged certificate.
_UNREADABLE = (UserError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class DatastoreKey(NamedTuple):
    """What distinguishes the datastores of runs; None where a run does not know it.

    Attributes:
        name: without a version.
        url: where it is stored; None if the content is known, since copies of one content are one datastore.
        version: number.
        content: hash of its images.
    """

    name: str
    url: str | None
    version: str | None
    content: str | None


def datastore_key(frozen: dict[str, Any]) -> DatastoreKey:
    """Return the datastore of a run, by its frozen config; a damaged one has an unknown datastore."""
    chosen = frozen.get("datastore")
    if not isinstance(chosen, dict) or "name" not in chosen:
        return DatastoreKey("unknown", None, None, None)
    url, version, content = (
        str(chosen[key]) if chosen.get(key) else None for key in ("url", "version", "content")
    )
    name = str(chosen["name"]).partition("@")[0]
    return DatastoreKey(name, None if content else url, version, content)


def datastore_names(versions: Mapping[DatastoreKey, Any]) -> dict[DatastoreKey, str]:
    """Return a name for each datastore: name@vN, and with content, else URL, where two would have one name.

    Args:
        versions: version of each datastore; empty where it is unknown: then the name has the content.
    """
    names = {}
    for key, version in versions.items():
        pinned = f"@v{version}" if version else f" ({key.content})" if key.content else ""
        names[key] = f"{key.name}{pinned}"
    several = Counter(names.values())
    for key, name in names.items():
        if several[name] > 1 and (key.content or key.url):
            names[key] = f"{name} of content {key.content}" if key.content else f"{name} at {key.url}"
    return names


def summarise_datastore(chosen: dict[str, Any], labels: Sequence[int] | None) -> dict[str, Any]:
    """Return what the page shows of a datastore.

    Args:
        chosen: the group `datastore` of a frozen config.
        labels: classes to show images of; None: no images.

    Returns:
        url, and of a datastore that can be read: version, created, images, classes (number), certificate
        and thumbnails (data URIs by label); `note` where something is missing, and why.
    """
    summary: dict[str, Any] = {"url": chosen.get("url", ""), "note": "", "thumbnails": {}}
    key = _Key(*(chosen.get(name) for name in ("name", "url", "version", "content")))
    try:
        summary |= _describe(key)
        if labels:
            summary["thumbnails"] = _thumbnails(key, tuple(labels))
    except _UNREADABLE as error:
        summary["note"] = first_line(error)
    return summary


def bad_images(chosen: dict[str, Any], images: Sequence[tuple[str, int]]) -> tuple[list[str], str]:
    """Return data URIs of train images by name and position, and a note why there are none.

    Args:
        chosen: the group `datastore` of a frozen config.
        images: names and positions.
    """
    key = _Key(*(chosen.get(name) for name in ("name", "url", "version", "content")))
    try:
        return _bad_images(key, tuple(images)), ""
    except _UNREADABLE as error:
        return [], first_line(error)


class _Key(NamedTuple):
    """What selects a version. It never changes, so what was read of it is kept for the next live page."""

    name: Any
    url: Any
    version: Any
    content: Any

    def open(self) -> Version:
        return open_version(Datastore(**self._asdict()))


@functools.lru_cache(maxsize=8)
def _thumbnails(key: _Key, labels: tuple[int, ...]) -> dict[int, list[str]]:
    from hpc_imagenet.report.html.sample_images import thumbnails  # numpy and Pillow

    return thumbnails(key.open(), labels)


@functools.lru_cache(maxsize=16)
def _bad_images(key: _Key, images: tuple[tuple[str, int], ...]) -> list[str]:
    from hpc_imagenet.report.html.sample_images import named_thumbnails

    return named_thumbnails(key.open(), images)


@functools.lru_cache(maxsize=8)
def _describe(key: _Key) -> dict[str, Any]:
    version = key.open()
    manifest, path = version.manifest, f"{version.path}/{_CERTIFICATE}"
    certificate = parse_json_object(version.backend.read([path]).get(path))
    return {
        "version": version.number,
        "created": manifest.created,
        "images": {split: info.images for split, info in manifest.splits.items()},
        "classes": len(manifest.classes),
        "certificate": _shorten(certificate) if certificate else None,
    }


def _shorten(certificate: dict[str, Any]) -> dict[str, Any]:
    """Return a certificate without its long lists: of files, classes and images."""
    short = {key: value for key, value in certificate.items() if key not in ("files", "counts", "oddities")}
    short["files"] = len(certificate.get("files", ()))
    short["skipped_images"] = len(certificate.get("skipped", ()))
    short["skipped"] = list(certificate.get("skipped", ()))[:_MAX_SKIPPED]
    short["oddities"] = {
        split: {flag: found.get("images", 0) for flag, found in flags.items()}
        for split, flags in certificate.get("oddities", {}).items()
    }
    per_class: dict[str, list[int]] = {}
    for splits in certificate.get("counts", {}).values():
        for split, images in splits.items():
            per_class.setdefault(split, []).append(images)
    short["per_class"] = {
        split: [min(images), round(statistics.median(images)), max(images)]
        for split, images in per_class.items()
    }
    return short
