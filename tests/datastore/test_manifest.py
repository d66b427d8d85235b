import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.datastore.manifest import FILE, ClassNames, File, Manifest, Split, load_manifest
from hpc_imagenet.errors import UserError

files = st.builds(File, path=st.text(), bytes=st.integers(0, 2**50), hash=st.text())
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
)


@given(manifest=manifests)
def test_save_and_load_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    folder = tmp_path_factory.mktemp("dataset")
    manifest.save(folder)
    assert load_manifest(folder) == manifest
    assert [path.name for path in folder.iterdir()] == [FILE]


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
