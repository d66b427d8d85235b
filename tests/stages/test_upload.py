import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_dataset import file_of, make_dataset

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Config, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import folder_backend, storage_backend
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import upload

fork = multiprocessing.get_context("fork")


class Workspace:
    """A workspace with the processed dataset `digits`, and a datastore URL beside it."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "workspace"
        self.url = tmp_path / "datastores"
        self.dataset = self.root / "datasets" / "digits"
        self.manifest = make_dataset(self.root)
        self.run = Run(self.root / "runs" / "abc-upload")
        self.run.folder.mkdir(parents=True)

    def upload(self, name: str = "digits", dataset: str = "digits", **settings: Any) -> dict[str, Any]:
        config = Config(
            workspace=str(self.root),
            dataset=Dataset(name=dataset),
            datastore=Datastore(name, str(self.url), **settings),
        )
        return upload.run(config, self.run, DistEnv())

    def version(self, number: int) -> Path:
        return self.url / "digits" / f"v{number}"

    def images(self, folder: Path) -> list[tuple[bytes, int, str]]:
        reader = DatasetReader(folder)
        splits = [reader.open_split(name) for name in reader.manifest.splits]
        return [(*split.read(i), split.name(i)) for split in splits for i in range(len(split))]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def assert_complete(version: Path) -> None:
    """Check that the folder has exactly the files of its manifest, with the right hashes."""
    manifest = load_manifest(version)
    for file in manifest.all_files():
        assert file_of(version / file.path, file.path, file.hash.partition(":")[0]) == file
    stored = {str(path.relative_to(version)) for path in version.rglob("*") if path.is_file()}
    assert stored == {"manifest.json", *(file.path for file in manifest.all_files())}
    linked = {shard.path for shard in manifest.shards}  # hard links have the mode of their archive
    assert not [path for path in stored - linked if (version / path).stat().st_mode & 0o222]


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
    }


def test_upload_creates_a_version(workspace: Workspace) -> None:
    shards = sum(shard.bytes for shard in workspace.manifest.shards)
    assert workspace.upload() == {
        "version": 1,
        "datastore": "digits@v1",
        "images": 36,
        "bytes": workspace.manifest.bytes,
        "copied": workspace.manifest.bytes - shards,
        "linked": shards,
        "reused": 0,
        "kept": 0,
    }
    assert_complete(workspace.version(1))
    assert workspace.images(workspace.version(1)) == workspace.images(workspace.dataset)
    opened = versions.open_version(Datastore("digits", str(workspace.url)))
    assert opened.manifest.content == workspace.manifest.content
    assert opened.manifest.classes == workspace.manifest.classes
    assert opened.manifest.provenance["process"] == workspace.manifest.provenance["process"]
    assert opened.manifest.provenance["upload"]["version"] == 1
    progress = workspace.run.progress
    assert (progress["done"], progress["total"]) == (workspace.manifest.bytes, workspace.manifest.bytes)


def test_archives_can_be_deleted_after_the_upload(workspace: Workspace) -> None:
    images = workspace.images(workspace.dataset)
    workspace.upload()
    shutil.rmtree(workspace.root)
    assert workspace.images(workspace.version(1)) == images


def test_only_rank_zero_uploads(workspace: Workspace) -> None:
    assert upload.run(Config(), workspace.run, DistEnv(rank=1, size=2)) == {}


def test_same_content_is_uploaded_once(workspace: Workspace) -> None:
    workspace.upload()
    before = snapshot(workspace.url)
    second = workspace.upload()
    assert second["datastore"] == "digits@v1"
    assert (second["copied"], second["linked"], second["kept"]) == (0, 0, workspace.manifest.bytes)
    assert workspace.upload("digits@v1")["version"] == 1
    assert snapshot(workspace.url) == before


def test_other_content_gets_the_next_version(workspace: Workspace) -> None:
    workspace.upload()
    images, before = workspace.images(workspace.version(1)), snapshot(workspace.version(1))
    make_dataset(workspace.root, content="2nd")
    assert workspace.upload(content="2nd")["datastore"] == "digits@v2"
    assert_complete(workspace.version(2))
    assert snapshot(workspace.version(1)) == before
    assert workspace.images(workspace.version(1)) == images
    assert workspace.images(workspace.version(2)) == workspace.images(workspace.dataset) != images


def test_upload_to_an_existing_version_is_refused(workspace: Workspace) -> None:
    workspace.upload("digits@v2")
    make_dataset(workspace.root, content="2nd")
    before = snapshot(workspace.url)
    with pytest.raises(
        UserError,
        match=r"^datastore digits@v2 exists; versions never change: drop @v2 to create the next one$",
    ):
        workspace.upload("digits@v2")
    assert snapshot(workspace.url) == before
    assert workspace.upload()["version"] == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataset": "birds"}, r"datasets/birds has no processed dataset: run \+stage=process to create it"),
        ({"content": "other"}, r"has content c0ffee, but datastore\.content=other: run \+stage=process"),
        ({"name": "a/b"}, r"datastore\.name=a/b"),
    ],
)
def test_invalid_input_is_reported_and_claims_no_version(
    workspace: Workspace, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        workspace.upload(**settings)
    assert not workspace.url.exists()


def test_url_that_is_a_file_is_reported(workspace: Workspace) -> None:
    workspace.url.write_text("a file")
    with pytest.raises(UserError, match=r"^datastore\.url: cannot read or write"):
        workspace.upload()


def test_changed_archive_is_refused_and_creates_no_version(workspace: Workspace) -> None:
    archive = workspace.dataset / workspace.manifest.shards[1].path
    with archive.open("r+b") as file:
        file.seek(600)
        file.write(b"other")
    future = archive.stat().st_mtime + 10
    os.utime(archive, (future, future))
    with pytest.raises(UserError, match=r"train-1\.tar changed after \+stage=process"):
        workspace.upload()
    assert versions.complete_versions(str(workspace.url), "digits") == []
    make_dataset(workspace.root)  # restores the archive
    assert workspace.upload()["version"] == 1
    assert_complete(workspace.version(1))


def test_shards_of_the_same_name_are_numbered(workspace: Workspace) -> None:
    same = [workspace.dataset / shard.path for shard in workspace.manifest.shards]
    shards = []
    for number, path in enumerate(same):
        home = path.parent / str(number)
        home.mkdir()
        path.rename(home / "0.tar")
        shards.append(
            dataclasses.replace(
                workspace.manifest.shards[number], path=f"../../archives/digits/{number}/0.tar"
            )
        )
    dataclasses.replace(workspace.manifest, shards=tuple(shards)).save(workspace.dataset)
    workspace.upload()
    assert_complete(workspace.version(1))
    assert workspace.images(workspace.version(1)) == workspace.images(workspace.dataset)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar on the PATH")
def test_gnu_tar_reads_the_shards(workspace: Workspace) -> None:
    workspace.upload()
    listed = []
    for shard in DatasetReader(workspace.version(1)).shards.paths:
        done = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
        listed += done.stdout.split()
    assert sorted(listed) == sorted(name for _, _, name in workspace.images(workspace.version(1)))


@pytest.mark.slow
def test_concurrent_uploads_of_the_same_content_create_one_version(workspace: Workspace) -> None:
    results = run_concurrently([lambda: workspace.upload()] * 4)
    assert {result["version"] for result in results} == {1}
    assert sum(result["linked"] + result["copied"] for result in results) == workspace.manifest.bytes
    assert_complete(workspace.version(1))


@pytest.mark.slow
def test_concurrent_uploads_of_different_content_create_a_version_each(workspace: Workspace) -> None:
    for name in ("a", "b", "c"):
        make_dataset(workspace.root, name, content=f"of {name}")
    results = run_concurrently([lambda name=name: workspace.upload(dataset=name) for name in ("a", "b", "c")])
    assert sorted(result["version"] for result in results) == [1, 2, 3]
    for name, result in zip(("a", "b", "c"), results, strict=True):
        assert_complete(workspace.version(result["version"]))
        assert load_manifest(workspace.version(result["version"])).content == f"of {name}"


def run_concurrently(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run each task in its own process, started at the same moment; return the results in order."""
    barrier, queue = fork.Barrier(len(tasks)), fork.Queue()

    def work(number: int) -> None:
        barrier.wait()
        queue.put((number, tasks[number]()))

    processes = [fork.Process(target=work, args=(number,)) for number in range(len(tasks))]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in tasks)
    for process in processes:
        process.join()
    return [results[number] for number in range(len(tasks))]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.slow
def test_upload_resumes_after_a_kill_at_any_function_call(workspace: Workspace, links: bool) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    workspace.upload()  # imports what an upload needs: the calls of imports would be counted only once
    shutil.rmtree(workspace.url)
    calls = upload_and_kill(workspace, links, kill_at=None)
    assert_complete(workspace.version(1))
    interrupted, generator = 0, random.Random(seed)
    for twelfth in range(12):
        moment = int((twelfth + generator.random()) * calls / 12)
        shutil.rmtree(workspace.url)
        upload_and_kill(workspace, links, kill_at=moment)
        interrupted += not versions.complete_versions(str(workspace.url), "digits")
        assert workspace.upload()["version"] == 1
        assert_complete(workspace.version(1))
        assert versions.complete_versions(str(workspace.url), "digits") == [1]
        assert workspace.images(workspace.version(1)) == workspace.images(workspace.dataset)
    assert interrupted > 6  # else the kills came too late to test anything


def upload_and_kill(workspace: Workspace, links: bool, kill_at: int | None) -> int:
    """Upload in a process that kills itself at its `kill_at`th function call; return the number of calls."""
    calls = fork.Value("q", 0)

    def work() -> None:
        storage_backend.BLOCK = 1_000
        if not links:
            os.link = refuse

        def count(frame: object, event: str, argument: object) -> None:
            if event in ("call", "c_call"):
                if calls.value == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.value += 1

        sys.setprofile(count)
        workspace.upload()
        sys.setprofile(None)

    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return calls.value


def refuse(source: object, destination: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_interrupted_upload_copies_only_missing_files(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    real, copied = folder_backend._copy, []

    def interrupt(item: storage_backend.UploadFile, *rest: Any) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(item.file.bytes)
        real(item, *rest)

    monkeypatch.setattr(folder_backend, "_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        workspace.upload()
    assert versions.complete_versions(str(workspace.url), "digits") == []
    assert read_json(workspace.version(1) / "upload.json")["run"] == "abc-upload"
    monkeypatch.setattr(folder_backend, "_copy", real)
    result = workspace.upload()
    assert result["kept"] == sum(copied)
    assert result["copied"] == workspace.manifest.bytes - sum(copied)
    assert_complete(workspace.version(1))


def test_linked_archive_keeps_its_mode_and_changes_are_detected(workspace: Workspace) -> None:
    archive = workspace.dataset / workspace.manifest.shards[0].path
    archive.chmod(0o664)
    workspace.upload()
    assert archive.stat().st_mode & 0o777 == 0o664
    DatasetReader(workspace.version(1))
    before = archive.stat()
    with archive.open("r+b") as file:
        file.seek(600)
        file.write(b"other")
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    with pytest.raises(UserError, match=r"train-0\.tar was modified after its upload: .*verify digits@v1"):
        DatasetReader(workspace.version(1))
    copy = workspace.url / "digits" / "v2"
    make_dataset(workspace.root)  # replaces the archive by another file
    shutil.copytree(workspace.version(1), copy)  # copies with other modification times and no hard links
    DatasetReader(copy)


def test_a_version_whose_archive_was_only_touched_opens_after_the_advice(workspace: Workspace) -> None:
    workspace.upload()
    os.utime(workspace.dataset / workspace.manifest.shards[0].path, ns=(1, 1))
    with pytest.raises(UserError, match="if they are the same, give it a copy of its own: ") as refused:
        DatasetReader(workspace.version(1))
    subprocess.run(str(refused.value).rpartition("own: ")[2], shell=True, check=True)
    DatasetReader(workspace.version(1))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_file_is_in_exactly_one_part(workspace: Workspace, parts: int) -> None:
    items = [storage_backend.UploadFile(Path(file.path), file) for file in workspace.manifest.all_files()]
    shares = [upload.select_part(items, part, parts) for part in range(parts)]
    assert sorted(item.file.path for share in shares for item in share) == sorted(
        item.file.path for item in items
    )
    sizes = [sum(item.file.bytes for item in share) for share in shares]
    assert max(sizes) - min(sizes) <= max(item.file.bytes for item in items)


def test_files_of_an_older_version_are_hard_linked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def only_within(source: Any, destination: Any) -> None:
        if not str(source).startswith(str(workspace.url)):
            refuse(source, destination)
        link(source, destination)

    monkeypatch.setattr(os, "link", only_within)
    workspace.upload()
    dataclasses.replace(workspace.manifest, content="2nd").save(workspace.dataset)
    result = workspace.upload()
    assert (result["version"], result["copied"], result["reused"]) == (2, 0, workspace.manifest.bytes)
    assert_complete(workspace.version(2))
    shutil.rmtree(workspace.version(1))
    assert workspace.images(workspace.version(2)) == workspace.images(workspace.dataset)
