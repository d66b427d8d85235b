"""The `datastores` command: list, show, verify, fetch, delete and prune dataset versions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpc_imagenet.cli.command import Command
from hpc_imagenet.config.input.stored_settings import stored_value
from hpc_imagenet.config.schema import Datastore
from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.backends.storage_backend import StorageBackend
from hpc_imagenet.datastore.catalog import CatalogEntry
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.io.ownership import is_own, owner_name
from hpc_imagenet.launch.states import states
from hpc_imagenet.runs.store import Run, RunStore

IDLE_DAYS = 7.0  # days without a change after which prune removes a partial upload

_READERS = ("train", "evaluate", "price", "search", "session")  # stages that read images from a datastore
ANY = ""  # key of the jobs that may read any version
_PROGRESS_INTERVAL = 1.0  # s between progress lines


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        metavar="ACTION",
        nargs="*",
        help="list · show NAME · verify NAME[@vN] · fetch NAME[@vN] DIR · delete NAME@vN · prune",
    )
    parser.add_argument("--yes", action="store_true", help="delete and prune without confirmation")
    parser.add_argument("--json", action="store_true", help="print JSON objects instead of a table or lines")
    parser.add_argument(
        "--days",
        type=float,
        default=IDLE_DAYS,
        help=f"prune: days since the last change of a partial upload ({IDLE_DAYS:.0f})",
    )
    parser.add_argument(
        "--connections", type=int, default=versions.CONNECTIONS, help="concurrent S3 requests"
    )


def _datastores(store: RunStore, options: argparse.Namespace) -> int:
    action, *arguments = options.arguments or ["list"]
    actions: dict[str, tuple[int, Callable[..., int]]] = {
        "list": (0, _list),
        "show": (1, _show),
        "verify": (1, _verify),
        "fetch": (2, _fetch),
        "delete": (1, _delete),
        "prune": (0, _prune),
    }
    if action not in actions or len(arguments) != actions[action][0]:
        raise UserError(
            f"datastores {' '.join(options.arguments)}: expected list, show NAME, verify NAME[@vN], "
            "fetch NAME[@vN] DIR, delete NAME@vN or prune"
        )
    url = options.set.get("datastore.url") or stored_value("datastore.url")
    url = url or str(store.folder.parent / "datastores")
    backend = versions.open_backend(url, max(1, options.connections))
    return actions[action][1](backend, store, options, *arguments)


def used_by(store: RunStore, backend: StorageBackend) -> dict[str, list[str]]:
    """Return the ids of the workspace's jobs that have not ended and read images from a backend.

    Keys are `name@vN`, or `name` for jobs whose version is not uploaded yet; `ANY` for jobs that may read any
    version, since their config is damaged, or may not be read by this user.
    """
    found: dict[str, list[str]] = {}
    readers = [run for run in store.all() if run.info.get("stage") in _READERS]
    state_of = states(readers)
    for run in readers:
        if state_of[run.id].ended:
            continue
        try:
            key = _reads(run, backend)
        except (UserError, OSError, KeyError, TypeError, ValueError):
            key = ANY
        if key is not None:
            found.setdefault(key, []).append(run.id)
    return found


def _reads(run: Run, backend: StorageBackend) -> str | None:
    """Return what a job reads from a backend, as `name@vN` or `name`; None if nothing.

    Only the settings that decide this are read: another version of this package may have other settings.

    Raises:
        UserError, OSError, KeyError, TypeError, ValueError: the config is damaged, or cannot be read.
    """
    frozen = run.frozen()
    if run.info.get("stage") == "session" and not frozen["session"]["datastore"]:
        return None
    settings = frozen["datastore"]
    datastore = Datastore(str(settings["name"]), str(settings["url"]), settings["version"])
    if not _same_url(datastore.url, backend):
        return None
    name, number = versions.pinned(datastore)
    return f"{name}@v{number}" if number else name


def _name_unknown(store: RunStore, runs: Sequence[str]) -> None:
    """Print one line to stderr about jobs that may read any version; nothing without such jobs."""
    named = []
    for run in map(store.run, runs):
        with contextlib.suppress(OSError):  # removed meanwhile
            named.append(f"{run.id} of {run.owner}")
    if named:
        print(
            f"may read any version, since its config.yaml cannot be read: {', '.join(named)}", file=sys.stderr
        )


def _same_url(url: str, backend: StorageBackend) -> bool:
    if versions.is_remote(url):
        return url.rstrip("/") == backend.url
    folder = versions.open_backend(url).folder
    return backend.folder is not None and folder is not None and folder.resolve() == backend.folder.resolve()


def _rows(backend: StorageBackend, store: RunStore, name: str | None = None) -> list[dict[str, Any]]:
    used = used_by(store, backend)
    _name_unknown(store, used.get(ANY, []))
    rows = []
    for entry in catalog.list_versions(backend, name):
        manifest = entry.manifest
        rows.append(
            {
                "name": entry.name,
                "version": entry.number,
                "state": entry.state,
                "images": manifest.images if manifest else None,
                "bytes": manifest.bytes if manifest else None,
                "content": manifest.content if manifest else None,
                "created": entry.begun or None,
                "used_by": used.get(entry.reference, []) + used.get(entry.name, []),
                "by": entry.by or None,
            }
        )
    return rows


def _list(backend: StorageBackend, store: RunStore, options: argparse.Namespace) -> int:
    rows = _rows(backend, store)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"no datastores in {backend.url}")
    else:
        _print_table(rows)
    return 0


def _show(backend: StorageBackend, store: RunStore, options: argparse.Namespace, name: str) -> int:
    datastore, number = versions.parse_reference(name)
    rows = [row for row in _rows(backend, store, datastore) if number in (None, row["version"])]
    if not rows:
        raise UserError(f"no datastore {name} in {backend.url}: list them with datastores list")
    for row in rows:
        if row["state"] == versions.COMPLETE:
            manifest = catalog.find_version(backend, f"{datastore}@v{row['version']}").manifest
            assert manifest is not None
            row |= {
                "classes": len(manifest.classes),
                "splits": {split: part.images for split, part in manifest.splits.items()},
                "shards": len(manifest.shards),
                "provenance": manifest.provenance,
            }
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{datastore}@v{row['version']}")
        for key, value in row.items():
            if key not in ("name", "version") and value not in (None, []):
                print(f"  {key:10}  {value if isinstance(value, (str, int)) else json.dumps(value)}")
    return 0


def _verify(backend: StorageBackend, store: RunStore, options: argparse.Namespace, name: str) -> int:
    entry = catalog.find_version(backend, name)
    wrong = catalog.verify_version(
        backend, entry, _threads(backend), _progress_printer(f"verify {entry.reference}", entry)
    )
    if options.json:
        print(json.dumps({"name": entry.name, "version": entry.number, "wrong": wrong}, indent=2))
    else:
        for line in wrong:
            print(f"wrong: {line}")
        assert entry.manifest is not None
        count = len(wrong)
        summary = f"has {count} problem{'s' if count > 1 else ''}" if count else "is intact"
        print(f"{entry.reference} {summary}: {entry.manifest.bytes / 1e9:.3f} GB read")
    return 1 if wrong else 0


def _fetch(
    backend: StorageBackend, store: RunStore, options: argparse.Namespace, name: str, folder: str
) -> int:
    entry, target = catalog.find_version(backend, name), expand_home(folder)
    fetched = catalog.fetch_version(
        backend, entry, target, _threads(backend), _progress_printer(f"fetch {entry.reference}", entry)
    )
    if options.json:
        print(json.dumps({"name": entry.name, "version": entry.number, "folder": str(fetched)}, indent=2))
    else:
        url = target.absolute() if versions.is_remote(str(target)) else target
        print(f"{fetched} is intact: train on it with datastore.url={url} datastore.name={entry.reference}")
    return 0


def _delete(backend: StorageBackend, store: RunStore, options: argparse.Namespace, name: str) -> int:
    datastore, number = versions.parse_reference(name)
    if number is None:
        raise UserError(f"delete needs one version, such as {datastore}@v1: list them with datastores list")
    entry = next((e for e in catalog.list_versions(backend, datastore) if e.number == number), None)
    if entry is None:
        raise UserError(f"no {name} in {backend.url}: list the versions with datastores list")
    if owner := _other_owner(backend, entry):
        raise UserError(f"{name} belongs to {owner}, and only {owner} can delete it: have {owner} delete it")
    if entry.state == versions.PARTIAL:
        raise UserError(f"{name} is a partial upload: remove it with datastores prune")
    used = used_by(store, backend)
    if runs := used.get(entry.reference, []) + used.get(datastore, []):
        raise UserError(f"{name} is in use by {', '.join(runs)}: cancel them, or wait until they have ended")
    _name_unknown(store, used.get(ANY, []))
    size = (
        f"{entry.manifest.images:,} images, {entry.manifest.bytes / 1e9:.3f} GB"
        if entry.manifest
        else "the remaining files"
    )
    if not _confirm(f"delete {name} ({size}) from {backend.url}", options):
        return 1
    catalog.delete_version(backend, entry)
    _print_removed("deleted", [entry], options)
    return 0


def _prune(backend: StorageBackend, store: RunStore, options: argparse.Namespace) -> int:
    seconds = options.days * 86400
    stale = [
        entry
        for entry in catalog.list_versions(backend)
        if entry.state in (versions.PARTIAL, versions.GONE) and catalog.is_stale(backend, entry, seconds)
    ]
    others = [f"{entry.reference} of {owner}" for entry in stale if (owner := _other_owner(backend, entry))]
    if others:
        print(f"left out, since only their owners can prune them: {', '.join(others)}", file=sys.stderr)
    stale = [entry for entry in stale if not _other_owner(backend, entry)]
    if not stale and not options.json:
        print(f"nothing to prune in {backend.url}: no partial upload unchanged for {options.days:g} days")
        return 0
    names = ", ".join(entry.reference for entry in stale)
    if stale and not _confirm(f"remove {names} from {backend.url}", options):
        return 1
    for entry in stale:
        with catalog.exclusive(backend, entry):
            catalog.delete_version(backend, entry)
    _print_removed("removed", stale, options)
    return 0


def _other_owner(backend: StorageBackend, entry: CatalogEntry) -> str:
    """Return the name of another user who made a version in a folder; empty if this user did, or remote."""
    if backend.folder is None or is_own(backend.folder / entry.path):
        return ""
    return owner_name(backend.folder / entry.path)


def _print_removed(state: str, entries: Sequence[CatalogEntry], options: argparse.Namespace) -> None:
    if options.json:
        rows = [{"name": entry.name, "version": entry.number, "state": state} for entry in entries]
        print(json.dumps(rows, indent=2))
        return
    for entry in entries:
        print(f"{state}  {entry.reference}")


def _confirm(action: str, options: argparse.Namespace) -> bool:
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{action}: cannot confirm without a terminal, add --yes")
    try:
        return input(f"{action}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _threads(backend: StorageBackend) -> int:
    # On a disk hashing is limited by CPUs. Remote backends read each file in several ranges already.
    return len(os.sched_getaffinity(0)) if backend.folder else 4


def _progress_printer(action: str, entry: CatalogEntry) -> Callable[[int, str], None]:
    """Return a callback (bytes done, note) that prints a progress line per second to a terminal's stderr."""
    assert entry.manifest is not None
    total, last = entry.manifest.bytes or 1, time.monotonic()

    def progress(done: int, note: str) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last > _PROGRESS_INTERVAL:
            last = time.monotonic()
            print(f"{action}: {done / total:4.0%} of {total / 1e9:.3f} GB  {note}", file=sys.stderr)

    return progress


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from hpc_imagenet.report.jobs_table import terminal

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("datastore", "state", "images", "GB", "created", "in use by"):
        table.add_column(column, justify="right" if column in ("images", "GB") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(f"{row['name']}@v{row['version']}"),
            row["state"],
            "" if row["images"] is None else f"{row['images']:,}",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.3f}",
            (row["created"] or "")[:16].replace("T", " "),
            escape(" ".join(row["used_by"])),
        )
    terminal().print(table)


COMMANDS = {
    "datastores": Command(
        "List, verify, fetch and delete the datasets that jobs can train on.",
        _datastores,
        _add_arguments,
        settings=("datastore.url",),
        needs_runs=False,
        epilog="datastore.url=: a folder, user@host:/path or s3://bucket/prefix (WORKSPACE/datastores).",
    )
}
