"""Hostile datastores: manifests that others wrote, fetched with `datastores fetch`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case
from remote_workspace import Workspace

from hpc_imagenet.datastore import catalog, versions

Change = Callable[[dict[str, Any]], object]


def run(change: Change | bytes, after: Callable[[Path], object] | None = None) -> Callable[[Path], str]:
    """Return the work of a case: fetch a version whose manifest is changed, or whose files are (`after`)."""

    def work(folder: Path) -> str:
        workspace = Workspace.__new__(Workspace)
        workspace.root, workspace.dataset = folder / "workspace", folder / "workspace/datasets/digits"
        from sample_dataset import make_dataset

        workspace.manifest = make_dataset(workspace.root, images=2, image_bytes=100)
        store, target = folder / "stores", folder / "deep" / "target"
        workspace.upload(str(store))
        place = store / "digits" / "v1"
        path = place / "manifest.json"
        if isinstance(change, bytes):
            content = change
        else:
            raw = json.loads(path.read_bytes())
            change(raw)
            content = json.dumps(raw).encode()
        path.chmod(0o644)
        path.write_bytes(content)
        if after:
            after(place)
        before = {each for each in folder.rglob("*") if target not in each.parents}
        try:
            backend = versions.open_backend(str(store))
            entry = catalog.find_version(backend, "digits")
            catalog.fetch_version(backend, entry, target, 2, lambda *_: None)
        finally:
            new = {each for each in folder.rglob("*") if target not in each.parents} - before
            assert new <= {target.parent, target}, f"written outside the target: {new}"
            if not list(target.glob("*/v*/manifest.json")):
                assert not versions.complete_versions(str(target), "digits")
        return "fetched"

    return work


def shard(**values: Any) -> Change:
    """Return a change of the first shard."""
    return lambda raw: raw["shards"][0].update(values)


def truncate(place: Path) -> None:
    path = sorted((place / "shards").iterdir())[0]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-10])


def link(place: Path) -> None:
    path = sorted((place / "shards").iterdir())[0]
    path.unlink()
    path.symlink_to("/etc/passwd")


_INPUTS: list[tuple[str, Callable[[Path], str], str]] = [
    ("all is well", run(lambda raw: None), "ok: fetched"),
    (
        "a path upward",
        run(shard(path="../../../escaped")),
        "would be outside its folder; do not use this datastore",
    ),
    ("an absolute path", run(shard(path="/tmp/escaped-of-a-test")), "would be outside its folder"),
    (
        "a path upward of an index",
        run(lambda raw: raw["splits"]["val"]["index"].update(path="../x")),
        "outside its",
    ),
    (
        "a path upward of a further file",
        run(lambda raw: raw["files"][0].update(path="a/../../x")),
        "outside its",
    ),
    ("a path with a zero byte", run(shard(path="a\0b")), "not a manifest"),
    ("an empty path", run(shard(path="")), "not a manifest"),
    ("a path that is a number", run(shard(path=5)), "not a manifest"),
    ("the path of the manifest itself", run(shard(path="manifest.json")), "manifest.json is damaged"),
    ("a file twice", run(lambda raw: raw["shards"].append(raw["shards"][0])), "a file occurs twice"),
    ("a hash of another file", run(shard(hash="md5:" + "0" * 32)), "is damaged: its hash is md5:"),
    ("a hash of an unknown algorithm", run(shard(hash="crc7:00")), "crc7"),
    ("a hash without an algorithm", run(shard(hash="0" * 32)), "not a manifest"),
    ("a hash that is a path", run(shard(hash="md5:../../x")), "not a manifest"),
    ("a hash that is empty", run(shard(hash="md5:")), "is damaged"),
    ("a size of -1", run(shard(bytes=-1)), "not a manifest"),
    ("a size of 10^17", run(shard(bytes=10**17)), "not enough free space"),
    ("a size of 10^400", run(shard(bytes=10**400)), "not a manifest"),
    ("a size that is too small", run(shard(bytes=1)), ""),
    ("an unknown key", run(shard(mode="777")), "not a manifest"),
    ("no shards", run(lambda raw: raw.update(shards=[])), "ok: fetched"),
    ("no splits", run(lambda raw: raw.update(splits={})), "ok: fetched"),
    ("another format", run(lambda raw: raw.update(format=99)), "format 99, but this version reads format 1"),
    (
        "a format of escape sequences",
        run(lambda raw: raw.update(format="\x1b[2J")),
        "this version reads format 1",
    ),
    ("a name of escape sequences", run(lambda raw: raw.update(name="\x1b[2J")), "ok: fetched"),
    ("a class that is a number", run(lambda raw: raw["classes"][0].update(wnid=7)), "not a manifest"),
    ("an empty file", run(b""), ""),
    ("not UTF-8", run(b"\xff\xfe"), "not a manifest"),
    ("nested 100,000 deep", run(b"[" * 100_000), "nested too deeply"),
    ("an HTML page", run(b"<!DOCTYPE html>"), "not a manifest"),
    ("a shard that is cut", run(lambda raw: None, truncate), "is damaged: its hash is"),
    ("a shard that is a link out of the folder", run(lambda raw: None, link), "is damaged: its hash is"),
]

CASES = [Case("manifest", name, work, expected) for name, work, expected in _INPUTS]
