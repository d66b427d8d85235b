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

from hpc_imagenet.config.schema import Config, Dataset, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends import folder_backend, storage_backend
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import read_json
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages import upload

fork = multiprocessing.get_context("fork")


class House:
    """A workspace with the processed dataset `digits`."""

    def __init__(self, tmp_path: Path) -> None:
        self.workspace = tmp_path / "workspace"
        self.url = tmp_path / "datastores"
        self.dataset = self.workspace / "datasets" / "digits"
        self.manifest = make_dataset(self.workspace)
        self.run = Run(self.workspace / "runs" / "abc-upload")
        self.run.folder.mkdir(parents=True)

    def upload(self, name: str = "digits", dataset: str = "digits", **settings: Any) -> dict[str, Any]:
        config = Config(
            workspace=str(self.workspace),
            dataset=Dataset(name=dataset),
            datastore=Datastore(name, str(self.url), **settings),
        )
        return upload.run(config, self.run, DistEnv())

    def version(self, number: int) -> Path:
        return self.url / "digits" / f"v{number}"

    def images(self, at: Path) -> list[tuple[bytes, int, str]]:
        store = DatasetReader(at)
        splits = [store.open_split(name) for name in store.manifest.splits]
        return [(*split.read(i), split.name(i)) for split in splits for i in range(len(split))]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def assert_whole(version: Path) -> None:
    """Nothing but what the manifest names, and that by its hash."""
    manifest = load_manifest(version)
    for file in manifest.all_files():
        assert file_of(version / file.path, file.path, file.hash.partition(":")[0]) == file
    there = {str(path.relative_to(version)) for path in version.rglob("*") if path.is_file()}
    assert there == {"manifest.json", *(file.path for file in manifest.all_files())}
    linked = {shard.path for shard in manifest.shards}  # they have the mode of their archive
    assert not [path for path in there - linked if (version / path).stat().st_mode & 0o222]


def snapshot(at: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in at.rglob("*")
    }


def test_a_dataset_becomes_a_version(house: House) -> None:
    shards = sum(shard.bytes for shard in house.manifest.shards)
    assert house.upload() == {
        "version": 1,
        "datastore": "digits@v1",
        "images": 36,
        "bytes": house.manifest.bytes,
        "copied": house.manifest.bytes - shards,
        "linked": shards,
        "reused": 0,
        "kept": 0,
    }
    assert_whole(house.version(1))
    assert house.images(house.version(1)) == house.images(house.dataset)
    opened = versions.open_version(Datastore("digits", str(house.url)))
    assert opened.manifest.content == house.manifest.content
    assert opened.manifest.classes == house.manifest.classes
    assert opened.manifest.provenance["process"] == house.manifest.provenance["process"]
    assert opened.manifest.provenance["upload"]["version"] == 1
    progress = house.run.progress
    assert (progress["done"], progress["total"]) == (house.manifest.bytes, house.manifest.bytes)


def test_the_archives_may_go_once_they_are_linked(house: House) -> None:
    images = house.images(house.dataset)
    house.upload()
    shutil.rmtree(house.workspace)
    assert house.images(house.version(1)) == images


def test_only_the_first_process_uploads(house: House) -> None:
    assert upload.run(Config(), house.run, DistEnv(rank=1, size=2)) == {}


def test_the_same_content_is_uploaded_once(house: House) -> None:
    house.upload()
    before = snapshot(house.url)
    again = house.upload()
    assert again["datastore"] == "digits@v1"
    assert (again["copied"], again["linked"], again["kept"]) == (0, 0, house.manifest.bytes)
    assert house.upload("digits@v1")["version"] == 1
    assert snapshot(house.url) == before


def test_other_content_gets_the_next_version_and_changes_none(house: House) -> None:
    house.upload()
    images, before = house.images(house.version(1)), snapshot(house.version(1))
    make_dataset(house.workspace, content="2nd")
    assert house.upload(content="2nd")["datastore"] == "digits@v2"
    assert_whole(house.version(2))
    assert snapshot(house.version(1)) == before
    assert house.images(house.version(1)) == images
    assert house.images(house.version(2)) == house.images(house.dataset) != images


def test_a_version_that_exists_is_refused(house: House) -> None:
    house.upload("digits@v2")
    make_dataset(house.workspace, content="2nd")
    before = snapshot(house.url)
    with pytest.raises(
        UserError,
        match=r"^datastore digits@v2 exists; versions never change; drop @v2 for the next one$",
    ):
        house.upload("digits@v2")
    assert snapshot(house.url) == before
    assert house.upload()["version"] == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataset": "birds"}, r"datasets/birds holds no processed dataset: \+stage=process makes it"),
        ({"content": "other"}, r"holds content c0ffee, but datastore\.content=other .*\+stage=process"),
        ({"name": "a/b"}, r"datastore\.name=a/b"),
    ],
)
def test_wrong_input_is_told_and_claims_nothing(house: House, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        house.upload(**settings)
    assert not house.url.exists()


def test_a_url_that_is_no_folder_is_told(house: House) -> None:
    house.url.write_text("a file")
    with pytest.raises(UserError, match=r"^datastore\.url: cannot fill"):
        house.upload()


def test_a_changed_archive_leaves_nothing_visible(house: House) -> None:
    archive = house.dataset / house.manifest.shards[1].path
    with archive.open("r+b") as file:
        file.seek(600)
        file.write(b"other")
    future = archive.stat().st_mtime + 10
    os.utime(archive, (future, future))
    with pytest.raises(UserError, match=r"train-1\.tar is not what \+stage=process saw"):
        house.upload()
    assert versions.complete_versions(str(house.url), "digits") == []
    make_dataset(house.workspace)  # as it was
    assert house.upload()["version"] == 1
    assert_whole(house.version(1))


def test_shards_of_the_same_name_keep_apart(house: House) -> None:
    same = [house.dataset / shard.path for shard in house.manifest.shards]
    shards = []
    for number, path in enumerate(same):
        home = path.parent / str(number)
        home.mkdir()
        path.rename(home / "0.tar")
        shards.append(
            dataclasses.replace(house.manifest.shards[number], path=f"../../archives/digits/{number}/0.tar")
        )
    dataclasses.replace(house.manifest, shards=tuple(shards)).save(house.dataset)
    house.upload()
    assert_whole(house.version(1))
    assert house.images(house.version(1)) == house.images(house.dataset)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar on the PATH")
def test_gnu_tar_reads_the_shards(house: House) -> None:
    house.upload()
    listed = []
    for shard in DatasetReader(house.version(1)).shards.paths:
        done = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
        listed += done.stdout.split()
    assert sorted(listed) == sorted(name for _, _, name in house.images(house.version(1)))


def test_uploads_at_once_of_one_content_make_one_version(house: House) -> None:
    results = together([lambda: house.upload()] * 4)
    assert {result["version"] for result in results} == {1}
    assert sum(result["linked"] + result["copied"] for result in results) == house.manifest.bytes
    assert_whole(house.version(1))


def test_uploads_at_once_of_different_content_make_a_version_each(house: House) -> None:
    for name in ("a", "b", "c"):
        make_dataset(house.workspace, name, content=f"of {name}")
    results = together([lambda name=name: house.upload(dataset=name) for name in ("a", "b", "c")])
    assert sorted(result["version"] for result in results) == [1, 2, 3]
    for name, result in zip(("a", "b", "c"), results, strict=True):
        assert_whole(house.version(result["version"]))
        assert load_manifest(house.version(result["version"])).content == f"of {name}"


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run each task in a process of its own, all from the same moment on."""
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
def test_killed_at_any_call_and_asked_again_it_is_whole(house: House, links: bool) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    calls = upload_and_die(house, links, at=None)
    assert_whole(house.version(1))
    cut = 0
    for moment in random.Random(seed).sample(range(calls), 12):
        shutil.rmtree(house.url)
        upload_and_die(house, links, at=moment)
        cut += not versions.complete_versions(str(house.url), "digits")
        assert house.upload()["version"] == 1
        assert_whole(house.version(1))
        assert versions.complete_versions(str(house.url), "digits") == [1]
        assert house.images(house.version(1)) == house.images(house.dataset)
    assert cut > 6  # else the kills came too late and this test tests nothing


def upload_and_die(house: House, links: bool, at: int | None) -> int:
    """Upload in a process that kills itself at its `at`th call of a function; return how many it made."""
    made = fork.Value("q", 0)

    def work() -> None:
        storage_backend.BLOCK = 1_000
        if not links:
            os.link = refuse

        def count(frame: object, event: str, argument: object) -> None:
            if event in ("call", "c_call"):
                if made.value == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                made.value += 1

        sys.setprofile(count)
        house.upload()
        sys.setprofile(None)

    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return made.value


def refuse(source: object, destination: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_cut_off_upload_sends_only_what_is_missing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse)
    real, copied = folder_backend._copy, []

    def cut(piece: storage_backend.UploadFile, *rest: Any) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(piece.file.bytes)
        real(piece, *rest)

    monkeypatch.setattr(folder_backend, "_copy", cut)
    with pytest.raises(KeyboardInterrupt):
        house.upload()
    assert versions.complete_versions(str(house.url), "digits") == []
    assert read_json(house.version(1) / "upload.json")["run"] == "abc-upload"
    monkeypatch.setattr(folder_backend, "_copy", real)
    result = house.upload()
    assert result["kept"] == sum(copied)
    assert result["copied"] == house.manifest.bytes - sum(copied)
    assert_whole(house.version(1))


def test_a_linked_archive_keeps_its_mode_and_is_watched(house: House) -> None:
    archive = house.dataset / house.manifest.shards[0].path
    archive.chmod(0o664)
    house.upload()
    assert archive.stat().st_mode & 0o777 == 0o664
    DatasetReader(house.version(1))
    before = archive.stat()
    with archive.open("r+b") as file:
        file.seek(600)
        file.write(b"other")
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    with pytest.raises(UserError, match=r"train-0\.tar was written to after its upload: .*verify digits@v1"):
        DatasetReader(house.version(1))
    copy = house.url / "digits" / "v2"
    make_dataset(house.workspace)  # the archive of this name is another file now
    shutil.copytree(house.version(1), copy)  # with other times, and not a link of anything
    DatasetReader(copy)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_file_is_of_one_part(house: House, parts: int) -> None:
    pieces = [storage_backend.UploadFile(Path(file.path), file) for file in house.manifest.all_files()]
    shares = [upload.part_of(pieces, part, parts) for part in range(parts)]
    assert sorted(piece.file.path for share in shares for piece in share) == sorted(
        piece.file.path for piece in pieces
    )
    loads = [sum(piece.file.bytes for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(piece.file.bytes for piece in pieces)


def test_what_an_older_version_has_is_linked(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def only_within(source: Any, destination: Any) -> None:
        if not str(source).startswith(str(house.url)):
            refuse(source, destination)
        link(source, destination)

    monkeypatch.setattr(os, "link", only_within)
    house.upload()
    dataclasses.replace(house.manifest, content="2nd").save(house.dataset)
    result = house.upload()
    assert (result["version"], result["copied"], result["reused"]) == (2, 0, house.manifest.bytes)
    assert_whole(house.version(2))
    shutil.rmtree(house.version(1))
    assert house.images(house.version(2)) == house.images(house.dataset)
