from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import killing
import pytest
from asking import ask, config_of, refused, run_of
from faulty_server import Faults, faulty, serving

from hpc_imagenet.archives import digits, receipt
from hpc_imagenet.runs import Run
from hpc_imagenet.stages import download
from hpc_imagenet.world import World

FILES = {
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "digits"
    digits.write(folder)
    return folder


def assert_whole(workspace: Path, source: Path) -> None:
    folder = workspace / "archives" / "numbers"
    for file in FILES.values():
        assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert not receipt.missing(folder, FILES.values())
    assert len(list(folder.iterdir())) == 6, list(folder.iterdir())


def test_over_http(tmp_path: Path, source: Path) -> None:
    size = sum((source / file).stat().st_size for file in FILES.values())
    faults = Faults()
    with serving(source, faulty(faults)) as url:
        config = config_of(tmp_path, url)
        assert ask(download, config) == {"bytes": size, "files": 3, "downloaded": size}
        assert_whole(tmp_path, source)
        got = receipt.load(tmp_path / "archives/numbers" / FILES["train"])
        assert got
        assert (got.verified, got.source) == ("md5sums", url)
        progress = json.loads((tmp_path / "runs/abc-stage/progress.json").read_text())
        assert (progress["done"], progress["total"], progress["unit"]) == (size, size, "B")
        asked = len(faults.seen)
        assert ask(download, config) == {"bytes": size, "files": 3, "downloaded": 0}
        assert len(faults.seen) == asked, "nothing was left to ask for"


def test_pinned_archives_need_no_md5sums(tmp_path: Path, source: Path) -> None:
    sums = dict(reversed(line.split()) for line in (source / "md5sums").read_text().splitlines())
    faults = Faults()
    with serving(source, faulty(faults)) as url:
        ask(
            download,
            config_of(tmp_path, url, **{split: {"md5": sums[file]} for split, file in FILES.items()}),
        )
    assert not [seen for seen in faults.seen if "md5sums" in seen[1]]
    got = receipt.load(tmp_path / "archives/numbers" / FILES["val"])
    assert got
    assert got.verified == "dataset.archives.val.md5"


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_from_a_folder_by_link(tmp_path: Path, source: Path, form: str) -> None:
    result = ask(download, config_of(tmp_path, form.format(source)))
    assert result["downloaded"] == 0
    assert_whole(tmp_path, source)
    archive = tmp_path / "archives/numbers" / FILES["train"]
    assert archive.samefile(source / FILES["train"])


def test_from_another_file_system_by_symbolic_link(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    ask(download, config_of(tmp_path, source))
    assert (tmp_path / "archives/numbers" / FILES["val"]).is_symlink()
    assert_whole(tmp_path, source)


def test_a_folder_that_lacks_a_file(tmp_path: Path, source: Path) -> None:
    told = refused(download, config_of(tmp_path, source, val={"file": "validation.tar"}))
    assert "validation.tar: no such file" in told
    assert f"there are {FILES['devkit']}, {FILES['train']}" in told
    assert "dataset.archives.val.file" in told
    told = refused(download, config_of(tmp_path / "b", tmp_path / "nowhere"))
    assert f"there is no folder {tmp_path / 'nowhere'}" in told


def test_wrong_md5_in_a_folder_is_left_there(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    with (copy / FILES["val"]).open("r+b") as file:
        file.seek(600)
        file.write(b"!")
    told = refused(download, config_of(tmp_path, copy))
    assert str(copy / FILES["val"]) in told
    assert "but md5sums says" in told
    assert (copy / FILES["val"]).exists()
    assert receipt.missing(tmp_path / "archives/numbers", [FILES["val"]])


def test_archives_put_in_place_by_hand_are_adopted(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "archives" / "numbers"
    folder.mkdir(parents=True)
    for file in FILES.values():
        shutil.copy(source / file, folder)
    with serving(source) as url:
        assert ask(download, config_of(tmp_path, url))["downloaded"] == 0
        assert_whole(tmp_path, source)
        # Written to since: the receipt is void, and the archive is looked at again.
        (folder / FILES["val"]).write_bytes(b"something else")
        told = refused(download, config_of(tmp_path, url))
        assert f"{FILES['val']}.bad" in told
        assert ask(download, config_of(tmp_path, url))["downloaded"] == (source / FILES["val"]).stat().st_size


def test_another_archive_of_the_same_name(tmp_path: Path, source: Path) -> None:
    ask(download, config_of(tmp_path, source))
    other = tmp_path / "other"
    digits.write(other, copies=2)
    told = refused(download, config_of(tmp_path, other))
    assert "another archive is there" in told
    assert "dataset.name" in told
    assert_whole(tmp_path, source)
    # The same bytes from elsewhere are the same archive, where an MD5 says so.
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    ask(download, config_of(tmp_path, moved))
    (moved / "md5sums").unlink()
    assert "no MD5 says whether" in refused(download, config_of(tmp_path, moved))


@pytest.mark.parametrize("split", ["val", "devkit"])
def test_truncated_archives_that_nothing_vouches_for(tmp_path: Path, source: Path, split: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "md5sums").unlink()
    ask(download, config_of(tmp_path / "well", copy))
    path = copy / FILES[split]
    path.write_bytes(path.read_bytes()[: -12_000 if split == "val" else -4])
    assert "truncated" in refused(download, config_of(tmp_path / "cut", copy))
    assert receipt.missing(tmp_path / "cut/archives/numbers", [FILES[split]])


def test_makes_the_source(tmp_path: Path) -> None:
    source = tmp_path / "sources" / "digits"
    config = config_of(tmp_path, source, make="hpc_imagenet.archives.digits:write")
    ask(download, config)
    assert_whole(tmp_path, source)
    for function in ("hpc_imagenet.archives.digits:wrong", "nowhere:x", "nothing"):
        told = refused(download, config_of(tmp_path / "b", tmp_path / "c", make=function))
        assert f"dataset.make={function}" in told


def test_settings_that_make_no_sense(tmp_path: Path, source: Path) -> None:
    assert "s3://x" in refused(download, config_of(tmp_path, "s3://x/y"))
    assert "dataset.archives.val.md5=xyz" in refused(
        download, config_of(tmp_path, source, val={"md5": "xyz"})
    )
    assert "dataset.archives.val.file=../x" in refused(
        download, config_of(tmp_path, source, val={"file": "../x"})
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "archives").write_text("a file where a folder should be")
    assert f"workspace={tmp_path / 'b'} cannot be written" in refused(
        download, config_of(tmp_path / "b", source)
    )


def test_only_one_process_of_a_job_works(tmp_path: Path) -> None:
    assert download.run(config_of(tmp_path, "/nowhere"), Run(tmp_path), World(rank=1, size=2)) == {}
    assert not list(tmp_path.iterdir())


def kill_and_ask_again(tmp_path: Path, source: Path, kills: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    # 3.6 MB in pieces of 64 kB, 3 ms each: about 0.25 s for all.
    faults = Faults(pause=0.003, only="")
    with serving(source, faulty(faults)) as url:
        config = config_of(tmp_path, url)
        run = run_of(config)
        killed = resumed = 0
        deadline = time.monotonic() + 10 * kills
        while killed < kills and time.monotonic() < deadline:
            child = killing.start("download", config, run)
            hit = killing.kill_after(child, moments.uniform(0, 0.3))
            killed += hit
            folder = tmp_path / "archives" / "numbers"
            for file in FILES.values():
                if (folder / file).exists():
                    assert (folder / file).read_bytes() == (source / file).read_bytes(), (
                        "half, and looks whole"
                    )
            if not hit:  # it came to its end: begin with nothing
                shutil.rmtree(folder)
            resumed = sum(seen[2] is not None for seen in faults.seen)
        last = killing.start("download", config, run)
        last.join(60)
        assert last.exitcode == 0
    assert killed == kills
    assert resumed, "no try ever went on from another's bytes: this tested nothing"
    assert_whole(tmp_path, source)


def test_what_a_killed_try_left_is_swept_up(tmp_path: Path, source: Path) -> None:
    config = config_of(tmp_path, str(source))
    ask(download, config)
    folder = tmp_path / "archives" / "numbers"
    (folder / f".{FILES['val']}.receipt.json.x1y2.tmp").write_text("{")
    (folder / f"{FILES['val']}.part.json").write_text("{}")
    ask(download, config)
    assert_whole(tmp_path, source)


@pytest.mark.slow
def test_killed_and_asked_again(tmp_path: Path, source: Path) -> None:
    kill_and_ask_again(tmp_path, source, kills=8)


@pytest.mark.slow
def test_killed_fifty_times_and_asked_again(tmp_path: Path, source: Path) -> None:
    kill_and_ask_again(tmp_path, source, kills=50)
