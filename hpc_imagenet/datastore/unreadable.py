"""Versions in a folder that their users let no other read."""

from __future__ import annotations

import functools
import grp
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.datastore.backends.storage_backend import StorageBackend
from hpc_imagenet.datastore.hardlink_check import linked_shards
from hpc_imagenet.datastore.manifest import FILE, Manifest, parse_manifest
from hpc_imagenet.io.ownership import is_own, owner_name


def unreadable_versions(backend: StorageBackend, paths: Sequence[str]) -> list[str]:
    """Return those of some versions that this user may not read; none of a backend that is no folder.

    Args:
        backend: where they are stored.
        paths: their paths within the backend.
    """
    found = []
    if backend.folder is not None:
        for path in paths:
            folder = backend.folder / path
            try:
                manifest = parse_manifest((folder / FILE).read_bytes(), f"{folder / FILE}")
            except FileNotFoundError:  # a partial upload
                pass
            except PermissionError:
                found.append(path)
            else:
                if unreadable_link(folder, manifest):
                    found.append(path)
    return found


def unreadable_link(folder: Path | None, manifest: Manifest) -> str:
    """Return that a hard-linked shard, which has the mode of its archive, cannot be read; else empty.

    An upload links only files of its user, so those of an own version are not checked.

    Args:
        folder: of the version; None: it is not in a folder.
        manifest: of the version.
    """
    shards = linked_shards(manifest)
    if folder is None or not shards or is_own(folder / FILE):
        return ""
    if not any(_is_closed(folder / path) for path in shards):
        return ""
    return _unreadable_line(folder, manifest)


def hidden_links(folder: Path, manifest: Manifest) -> str:
    """Return a warning if the group may read the folder of a version, but not all its hard-linked shards."""
    shared = folder.stat()
    for path in linked_shards(manifest) if shared.st_mode & 0o040 else ():
        status = (folder / path).stat()
        if not status.st_mode & 0o004 and not (status.st_mode & 0o040 and status.st_gid == shared.st_gid):
            return (
                f"{folder} cannot be read by its group: {folder / path} is a hard link to an archive that "
                f"only you may read: run {_sharing_command(folder, manifest)}"
            )
    return ""


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
            return _unreadable_line(backend.folder / numbers[each])
    return ""


@functools.cache  # one command opens a version several times
def warn_once(line: str) -> None:
    """Print a warning, unless this process has printed it already."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _unreadable_line(folder: Path, manifest: Manifest | None = None) -> str:
    """Return that a version cannot be read, and what its owner must type; `manifest` is None if hidden."""
    return (
        f"datastore {folder.parent.name}@{folder.name} cannot be read: have its owner, {owner_name(folder)}, "
        f"run {_sharing_command(folder, manifest)}"
    )


def _is_closed(path: Path) -> bool:
    try:
        return not (path.stat().st_mode & 0o004 or os.access(path, os.R_OK, effective_ids=True))
    except FileNotFoundError:  # damaged, which `verify` says
        return False
    except PermissionError:
        return True


def _sharing_command(folder: Path, manifest: Manifest | None) -> str:
    """Return the command by which the owner of a version lets the group of its folder read it."""
    quoted = shlex.quote(str(folder))
    command = f"chmod -R g+rX {quoted}"
    links = [folder / path for path in linked_shards(manifest)] if manifest else []
    try:
        group = folder.stat().st_gid
        if all(path.stat().st_gid == group for path in links):
            return command
    except OSError:  # a shard is missing, or a folder is closed
        return command
    return f"chgrp -R {_group_name(group)} {quoted} && {command}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:  # of another host or container
        return str(gid)
