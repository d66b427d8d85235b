"""The verb `datastores`: what stands where, is it whole, bring it here, take it away."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.backends.storage_backend import StorageBackend
from hpc_imagenet.datastore.catalog import CatalogEntry
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.states import states
from hpc_imagenet.runs.store import RunStore

IDLE_DAYS = 7.0  # that a partial upload has to lie still before prune removes it

_SAY_EVERY = 1.0  # s between lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its words."""
    parser.epilog = (
        "datastore.url= a folder, user@host:/path or s3://bucket/prefix; else the workspace's own."
    )
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="list · show NAME · verify NAME[@vN] · fetch NAME[@vN] DIR · delete NAME@vN · prune",
    )
    parser.add_argument("--yes", action="store_true", help="delete and prune without asking")
    parser.add_argument("--json", action="store_true", help="objects instead of a table or lines")
    parser.add_argument(
        "--days",
        type=float,
        default=IDLE_DAYS,
        help=f"that a partial upload lay still: prune ({IDLE_DAYS:.0f})",
    )
    parser.add_argument(
        "--connections", type=int, default=versions.CONNECTIONS, help="requests at a time, to S3"
    )


def run_datastores(store: RunStore, url: str | None, options: argparse.Namespace) -> int:
    """Carry it out and return the exit code: 1 where verify finds something wrong.

    Raises:
        UserError: there is no such version, it is in use, or the place cannot be reached.
    """
    verb, *words = options.words or ["list"]
    acts: dict[str, tuple[int, Callable[..., int]]] = {
        "list": (0, _list),
        "show": (1, _show),
        "verify": (1, _verify),
        "fetch": (2, _fetch),
        "delete": (1, _delete),
        "prune": (0, _prune),
    }
    if verb not in acts or len(words) != acts[verb][0]:
        raise UserError(
            f"datastores {' '.join(options.words)}: list, show NAME, verify NAME[@vN], fetch NAME[@vN] DIR, "
            "delete NAME@vN or prune"
        )
    place = versions.open_backend(url or str(store.folder.parent / "datastores"), max(1, options.connections))
    return acts[verb][1](place, store, options, *words)


def used_by(store: RunStore, place: StorageBackend) -> dict[str, list[str]]:
    """Return the queued and running trainings of the workspace that read from a place.

    By `name@vN`; trainings that wait for an upload, and so have no number yet, by `name`.
    """
    found: dict[str, list[str]] = {}
    trainings = [run for run in store.all() if run.info.get("stage") == "train"]
    told = states(trainings)
    for run in trainings:
        if not told[run.id].active:
            continue
        datastore = run.config().datastore
        if _same_url(datastore.url, place):
            name, number = versions.pinned(datastore)
            found.setdefault(f"{name}@v{number}" if number else name, []).append(run.id)
    return found


def _same_url(url: str, place: StorageBackend) -> bool:
    if versions.is_remote(url):
        return url.rstrip("/") == place.url
    there = versions.open_backend(url).folder
    return place.folder is not None and there is not None and there.resolve() == place.folder.resolve()


def _rows(place: StorageBackend, store: RunStore, name: str | None = None) -> list[dict[str, Any]]:
    used = used_by(store, place)
    rows = []
    for entry in catalog.list_versions(place, name):
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


def _list(place: StorageBackend, store: RunStore, options: argparse.Namespace) -> int:
    rows = _rows(place, store)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"no datastores in {place.url}")
    else:
        _print(rows)
    return 0


def _show(place: StorageBackend, store: RunStore, options: argparse.Namespace, name: str) -> int:
    of, number = versions.parse_reference(name)
    rows = [row for row in _rows(place, store, of) if number in (None, row["version"])]
    if not rows:
        raise UserError(f"no datastore {name} in {place.url}: datastores list shows what there is")
    for row in rows:
        if row["state"] == versions.COMPLETE:
            manifest = catalog.find_version(place, f"{of}@v{row['version']}").manifest
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
        print(f"{of}@v{row['version']}")
        for key, value in row.items():
            if key not in ("name", "version") and value not in (None, []):
                print(f"  {key:10}  {value if isinstance(value, (str, int)) else json.dumps(value)}")
    return 0


def _verify(place: StorageBackend, store: RunStore, options: argparse.Namespace, name: str) -> int:
    entry = catalog.find_version(place, name)
    wrong = catalog.verify_version(place, entry, _threads(place), _say(f"verify {entry.reference}", entry))
    if options.json:
        print(json.dumps({"name": entry.name, "version": entry.number, "wrong": wrong}, indent=2))
    else:
        for line in wrong:
            print(f"wrong: {line}")
        assert entry.manifest is not None
        state = f"wrong in {len(wrong)} places" if wrong else "whole"
        print(f"{entry.reference} is {state}: {entry.manifest.bytes / 1e9:.3f} GB read")
    return 1 if wrong else 0


def _fetch(
    place: StorageBackend, store: RunStore, options: argparse.Namespace, name: str, folder: str
) -> int:
    entry, target = catalog.find_version(place, name), Path(folder).expanduser()
    there = catalog.fetch_version(
        place, entry, target, _threads(place), _say(f"fetch {entry.reference}", entry)
    )
    if options.json:
        print(json.dumps({"name": entry.name, "version": entry.number, "folder": str(there)}, indent=2))
    else:
        print(
            f"{there} is whole: training reads it by datastore.url={target} datastore.name={entry.reference}"
        )
    return 0


def _delete(place: StorageBackend, store: RunStore, options: argparse.Namespace, name: str) -> int:
    of, number = versions.parse_reference(name)
    if number is None:
        raise UserError(f"delete takes one version, such as {of}@v1: datastores list shows them")
    entry = next((entry for entry in catalog.list_versions(place, of) if entry.number == number), None)
    if entry is None:
        raise UserError(f"no {name} in {place.url}: datastores list shows what there is")
    if entry.state == versions.PARTIAL:
        raise UserError(f"{name} is a partial upload: datastores prune takes those away that lie still")
    used = used_by(store, place)
    if runs := used.get(entry.reference, []) + used.get(of, []):
        raise UserError(f"{name} is in use by {', '.join(runs)}: cancel them, or wait until they have ended")
    size = (
        f"{entry.manifest.images:,} images, {entry.manifest.bytes / 1e9:.3f} GB"
        if entry.manifest
        else "the rest"
    )
    if not _agreed(f"delete {name} ({size}) from {place.url}", options):
        return 1
    catalog.delete_version(place, entry)
    _gone("deleted", [entry], options)
    return 0


def _prune(place: StorageBackend, store: RunStore, options: argparse.Namespace) -> int:
    seconds = options.days * 86400
    old = [
        entry
        for entry in catalog.list_versions(place)
        if entry.state != versions.COMPLETE and catalog.is_stale(place, entry, seconds)
    ]
    if not old and not options.json:
        print(f"nothing to prune in {place.url}: no partial upload has lain still for {options.days:g} days")
        return 0
    if old and not _agreed(f"remove {', '.join(entry.reference for entry in old)} from {place.url}", options):
        return 1
    for entry in old:
        with catalog.exclusive(place, entry):
            catalog.delete_version(place, entry)
    _gone("removed", old, options)
    return 0


def _gone(what: str, entries: Sequence[CatalogEntry], options: argparse.Namespace) -> None:
    if options.json:
        rows = [{"name": entry.name, "version": entry.number, "state": what} for entry in entries]
        print(json.dumps(rows, indent=2))
        return
    for entry in entries:
        print(f"{what}  {entry.reference}")


def _agreed(what: str, options: argparse.Namespace) -> bool:
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{what}: nobody is there to be asked; --yes means it")
    return input(f"{what}? [y/N] ").strip().lower() in ("y", "yes")


def _threads(place: StorageBackend) -> int:
    # On disks as many as CPUs can hash; elsewhere a few files at a time, each in several ranges.
    return len(os.sched_getaffinity(0)) if place.folder else 4


def _say(what: str, entry: CatalogEntry) -> Callable[[int, str], None]:
    """Return what prints a line of progress a second on stderr, where somebody looks."""
    assert entry.manifest is not None
    total, last = entry.manifest.bytes or 1, time.monotonic()

    def say(done: int, note: str) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last > _SAY_EVERY:
            last = time.monotonic()
            print(f"{what}: {done / total:4.0%} of {total / 1e9:.3f} GB  {note}", file=sys.stderr)

    return say


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from hpc_imagenet.report.jobs_table import terminal

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("datastore", "state", "images", "GB", "created", "in use by"):
        drawn.add_column(column, justify="right" if column in ("images", "GB") else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(
            escape(f"{row['name']}@v{row['version']}"),
            row["state"],
            "" if row["images"] is None else f"{row['images']:,}",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.3f}",
            (row["created"] or "")[:16].replace("T", " "),
            escape(" ".join(row["used_by"])),
        )
    terminal().print(drawn)
