"""Versions in a folder that their users let no other read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from hpc_imagenet.datastore.backends.storage_backend import StorageBackend
from hpc_imagenet.datastore.manifest import FILE
from hpc_imagenet.io.ownership import owner_name


def unreadable_versions(backend: StorageBackend, paths: Sequence[str]) -> list[str]:
    """Return those of some versions that this user may not read; none of a backend that is no folder.

    Args:
        backend: where they are stored.
        paths: their paths within the backend.
    """
    found = []
    if backend.folder is not None:
        for path in paths:
            try:
                (backend.folder / path / FILE).open().close()
            except FileNotFoundError:  # a partial upload
                pass
            except PermissionError:
                found.append(path)
    return found


def newest_unreadable(backend: StorageBackend, name: str, number: int | None, above: int) -> str:
    """Return which version cannot be read, and what its owner must type; empty if all can be read.

    Args:
        backend: where the versions are stored.
        name: of the datastore.
        number: the one version to look at; None: all.
        above: of all, only those with a higher number than this one.
    """
    if backend.folder is None:
        return ""
    numbers = {int(path.rpartition("/v")[2]): path for path in backend.versions(name)}
    chosen = [each for each in numbers if (each > above if number is None else each == number)]
    for each in sorted(chosen, reverse=True):
        if unreadable_versions(backend, [numbers[each]]):
            folder = backend.folder / numbers[each]
            return (
                f"datastore {name}@v{each} cannot be read: have its owner, {owner_name(folder)}, run "
                f"chmod -R g+rX {folder}"
            )
    return ""


@functools.cache  # one command opens a version several times
def warn_once(line: str) -> None:
    """Print a warning, unless this process has printed it already."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
