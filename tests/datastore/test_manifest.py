import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.datastore.manifest import (
    FILE,
    ClassNames,
    File,
    Manifest,
    Split,
    load_manifest,
    parse_manifest,
)
from hpc_imagenet.errors import UserError

paths = st.text(min_size=1).filter(lambda path: "\0" not in path)
hashes = st.from_regex(r"[a-z0-9]+:[0-9a-f]*", fullmatch=True)
files = st.builds(File, path=paths, bytes=st.integers(0, 2**50), hash=hashes)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
manifests = st.builds(
    Manifest,
    name=st.text(),
    content=st.text(),
    created=st.text(),
    classes=st.lists(st.builds(ClassNames, st.text(), st.lists(st.text()).map(tuple)), max_size=3).map(tuple),
    shards=st.lists(files, max_size=3).map(tuple),
    splits=st.dictionaries(st.text(), st.builds(Split, files, st.integers(0, 2**32)), max_size=3),
    files=st.lists(files, max_size=3).map(tuple),
    provenance=st.dictionaries(st.text(), values, max_size=3),
).filter(lambda manifest: len({file.path for file in manifest.all_files()}) == len(manifest.all_files()))


@pytest.mark.slow
@given(manifest=manifests)
def test_save_and_load_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    folder = tmp_path_factory.mktemp("dataset")
    manifest.save(folder)
    assert load_manifest(folder) == manifest
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.slow
@given(manifest=manifests)
def test_totals_count_all_files(manifest: Manifest) -> None:
    assert len(manifest.all_files()) == len(manifest.shards) + len(manifest.splits) + len(manifest.files)
    assert manifest.bytes == sum(file.bytes for file in manifest.all_files())
    assert manifest.images == sum(split.images for split in manifest.splits.values())


def test_missing_manifest_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b"<html>", b"\xff\xfe\xfd", b'{"format": 1}', b"null"]
)
def test_invalid_manifest_is_a_one_line_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(UserError, match="not a manifest") as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="format 2, but this version reads format 1"):
        load_manifest(tmp_path)


def sound() -> dict[str, Any]:
    file = {"path": "train.npy", "bytes": 1, "hash": "sha256:00"}
    rest: dict[str, Any] = {"classes": [], "shards": [], "files": [], "provenance": {}}
    splits = {"train": {"index": file, "images": 1}}
    return {"format": 1, "name": "x", "content": "c", "created": "2020", "splits": splits, **rest}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 1},
        {"content": None},
        {"provenance": []},
        {"classes": [{"wnid": 1, "names": []}]},
        {"classes": [{"wnid": "x", "names": [1]}]},
        {"shards": [{"path": "a", "bytes": -1, "hash": "md5:00"}]},
        {"shards": [{"path": "a", "bytes": "1", "hash": "md5:00"}]},
        {"shards": [{"path": "a", "bytes": 1, "hash": "md5:../../x"}]},
        {"shards": [{"path": "", "bytes": 1, "hash": "md5:00"}]},
        {"shards": [{"path": "train.npy", "bytes": 1, "hash": "md5:00"}]},
        {"splits": {"train": {"index": {"path": "a", "bytes": 1, "hash": "md5:00"}, "images": -1}}},
    ],
)
def test_values_of_a_wrong_type_are_refused(changes: dict[str, Any]) -> None:
    parse_manifest(json.dumps(sound()).encode(), "x")
    with pytest.raises(UserError, match="not a manifest"):
        parse_manifest(json.dumps({**sound(), **changes}).encode(), "x")


def test_deeply_nested_manifest_is_refused() -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        parse_manifest(b"[" * 100_000, "x")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_only_a_dataset_may_have_files_outside_its_folder(tmp_path: Path, path: str) -> None:
    """`datastores fetch` would write a datastore's file there."""
    changed = {**sound(), "shards": [{"path": path, "bytes": 1, "hash": "md5:00"}]}
    with pytest.raises(UserError, match="would be outside its folder"):
        parse_manifest(json.dumps(changed).encode(), "x")
    (tmp_path / FILE).write_text(json.dumps(changed))
    assert load_manifest(tmp_path).shards[0].path == path
