"""A datastore version that an earlier release wrote, with SHA-256 in its manifest: everything reads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import eventually
from sample_dataset import file_of, make_dataset

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Cluster, Config, Datastore
from hpc_imagenet.data.prepare.verify import verify_dataset
from hpc_imagenet.datastore import catalog, open_dataset, versions
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import upload


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with the dataset digits, and with digits@v1 of the same content in the old form."""
    make_dataset(tmp_path)
    source, version = tmp_path / "datasets" / "digits", tmp_path / "datastores" / "digits" / "v1"
    (version / "shards").mkdir(parents=True)
    listed = json.loads((source / "manifest.json").read_text())

    def stored(file: dict[str, object], path: str) -> dict[str, object]:
        data = (source / str(file["path"])).read_bytes()
        (version / path).write_bytes(data)
        (version / path).chmod(0o444)
        return {"path": path, "bytes": len(data), "hash": f"sha256:{hashlib.sha256(data).hexdigest()}"}

    manifest = {
        "format": 1,
        "name": "digits",
        "content": listed["content"],
        "created": "2026-01-01T00:00:00.000+00:00",
        "classes": listed["classes"],
        "shards": [stored(file, f"shards/{Path(file['path']).name}") for file in listed["shards"]],
        "splits": {
            name: {"index": stored(split["index"], f"{name}.npy"), "images": split["images"]}
            for name, split in listed["splits"].items()
        },
        "files": [stored(file, file["path"]) for file in listed["files"]],
        "provenance": {"process": {}, "upload": {"version": 1, "run": "abc", "dataset": "digits"}},
    }
    (version / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return tmp_path


def upload_digits(workspace: Path, url: Path) -> dict[str, object]:
    run = Run(workspace / "upload")
    run.folder.mkdir(exist_ok=True)
    config = Config(
        workspace=str(workspace), dataset=Dataset("digits"), datastore=Datastore("digits", str(url))
    )
    return upload.run(config, run, DistEnv())


def images(reader: DatasetReader) -> list[tuple[bytes, int]]:
    return [
        reader.open_split(name).read(i)
        for name in ("train", "val")
        for i in range(len(reader.open_split(name)))
    ]


def test_it_is_verified(workspace: Path) -> None:
    backend = versions.open_backend(str(workspace / "datastores"))
    entry = catalog.find_version(backend, "digits@v1")
    assert catalog.verify_version(backend, entry, 2, lambda done, step: None) == []
    shard = workspace / "datastores" / "digits" / "v1" / "shards" / "train-1.tar"
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    (problem,) = catalog.verify_version(backend, entry, 2, lambda done, step: None)
    assert problem.startswith(f"{shard} is damaged: its hash is sha256:")
    report = verify_dataset(shard.parents[1], quick=False, workers=2, log=lambda line: None)
    assert any(problem.startswith(f"{shard} is damaged") for problem in report.problems)


@pytest.mark.slow
def test_it_is_fetched_and_staged(workspace: Path) -> None:
    backend = versions.open_backend(str(workspace / "datastores"))
    entry = catalog.find_version(backend, "digits@v1")
    folder = catalog.fetch_version(backend, entry, workspace / "copy", 2, lambda done, step: None)
    expected = images(DatasetReader(workspace / "datasets" / "digits"))
    assert images(DatasetReader(folder)) == expected
    version = versions.open_version(Datastore("digits", str(workspace / "datastores")))
    cluster = Cluster(scratch=str(workspace / "scratch"))
    with open_dataset.open_dataset(version, cluster, stages=True) as reader:
        shards: Any = reader.shards
        numbers = range(len(version.manifest.shards))
        eventually(shards.is_complete, 300, lambda: [shards.poll(number) for number in numbers])
        assert images(reader) == expected
    (cache,) = (workspace / "scratch").iterdir()
    assert sorted(path.name for path in cache.glob("sha256-*")) == sorted(
        name
        for shard in entry.manifest.shards
        for name in _cached(shard.hash)  # type: ignore[union-attr]
    )


def _cached(value: str) -> tuple[str, str]:
    return value.replace(":", "-"), value.replace(":", "-") + ".json"


def test_upload_of_the_same_content_takes_it(workspace: Path) -> None:
    _rewrite_with_blake3(workspace / "datasets" / "digits")
    result = upload_digits(workspace, workspace / "datastores")
    assert (result["version"], result["copied"], result["linked"]) == (1, 0, 0)
    assert result["kept"] == result["bytes"]


def test_interrupted_upload_is_continued_with_the_new_hashes(workspace: Path) -> None:
    """The files that an earlier release had stored are kept: they are compared by their bytes."""
    version = workspace / "datastores" / "digits" / "v1"
    (version / "upload.json").write_text(json.dumps({"content": load_manifest(version).content}))
    (version / "manifest.json").unlink()
    (version / "shards" / "val-0.tar").unlink()
    _rewrite_with_blake3(workspace / "datasets" / "digits")
    result = upload_digits(workspace, workspace / "datastores")
    linked = (version / "shards" / "val-0.tar").stat().st_size
    assert (result["version"], result["linked"], result["copied"]) == (1, linked, 0)
    assert {file.hash.partition(":")[0] for file in load_manifest(version).all_files()} == {"blake3"}


def _rewrite_with_blake3(folder: Path) -> None:
    """Give the files of a processed dataset the hashes that processing them now would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    splits = [split["index"] for split in manifest["splits"].values()]
    for file in (*manifest["shards"], *splits, *manifest["files"]):
        file["hash"] = file_of(folder / file["path"], file["path"], "blake3").hash
    path.write_text(json.dumps(manifest))
