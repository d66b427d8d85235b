from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import killing
import pytest
from asking import ask, config_of, refused, run_of
from door import Door
from faulty_server import Faults, faulty, serving
from rich.console import Console

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.sources import archive_folder
from hpc_imagenet.demo import digits
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.report import jobs_table
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages import download

FILES = {
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "digits"
    digits.write_digits(folder)
    return folder


def assert_whole(workspace: Path, source: Path) -> None:
    folder = workspace / "archives" / "numbers"
    for file in FILES.values():
        assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert not receipt.missing_receipts(folder, FILES.values())
    assert len(list(folder.iterdir())) == 6, list(folder.iterdir())


def test_over_http(tmp_path: Path, source: Path) -> None:
    size = sum((source / file).stat().st_size for file in FILES.values())
    faults = Faults()
    with serving(source, faulty(faults)) as url:
        config = config_of(tmp_path, url)
        assert ask(download, config) == {"bytes": size, "files": 3, "downloaded": size}
        assert_whole(tmp_path, source)
        made = [tmp_path / "archives/numbers" / file for file in FILES.values()]
        assert not [path for path in made if path.stat().st_mode & 0o222]
        got = receipt.load_receipt(tmp_path / "archives/numbers" / FILES["train"])
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
    got = receipt.load_receipt(tmp_path / "archives/numbers" / FILES["val"])
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
    assert receipt.missing_receipts(tmp_path / "archives/numbers", [FILES["val"]])


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
    digits.write_digits(other, copies=2)
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
    assert receipt.missing_receipts(tmp_path / "cut/archives/numbers", [FILES[split]])


def test_makes_the_source(tmp_path: Path) -> None:
    source = tmp_path / "sources" / "digits"
    config = config_of(tmp_path, source, make="hpc_imagenet.demo.digits:write")
    ask(download, config)
    assert_whole(tmp_path, source)
    for function in ("hpc_imagenet.demo.digits:wrong", "nowhere:x", "nothing"):
        told = refused(download, config_of(tmp_path / "b", tmp_path / "c", make=function))
        assert f"dataset.make={function}" in told


def test_settings_that_make_no_sense(tmp_path: Path, source: Path) -> None:
    assert "not ftp://" in refused(download, config_of(tmp_path, "ftp://x/y"))
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
    assert download.run(config_of(tmp_path, "/nowhere"), Run(tmp_path), DistEnv(rank=1, size=2)) == {}
    assert not list(tmp_path.iterdir())


def test_jobs_shows_bytes_rate_and_the_time_that_is_left(tmp_path: Path) -> None:
    run = Run(tmp_path / "abc-download")
    run.folder.mkdir()
    progress = {"done": 38.7e9, "total": 154.6e9, "unit": "B", "rate": 115.9e6, "note": FILES["train"]}
    (run.folder / "progress.json").write_text(json.dumps(progress))
    (row,) = jobs_table.job_rows([run])
    console = Console(width=200, store=True, file=io.StringIO())
    console.print(jobs_table.render_jobs([{**row, "state": "running", "reason": ""}]))
    shown = console.export_text()
    assert f"25% {FILES['train']} · 38.7 GB of 154.6 GB · 115.9 MB/s · 16:40 left" in shown


def kill_and_ask_again(tmp_path: Path, source: Path, kills: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    # 3.6 MB in pieces of 16 kB over 4 connections; killed when so many more bytes are sent.
    faults = Faults(pause=0.005, piece=1 << 14, only="")
    with serving(source, faulty(faults)) as url:
        config = config_of(tmp_path, url)
        config.download.connections = 4
        run = run_of(config)
        killed = resumed = 0
        deadline = time.monotonic() + 60 * kills
        while killed < kills and time.monotonic() < deadline:
            asked, limit = len(faults.seen), faults.sent + moments.uniform(0, 4e6)
            child = killing.start("download", config, run)
            hit = killing.kill_when(child, lambda limit=limit: faults.sent >= limit)
            killed += hit
            folder = tmp_path / "archives" / "numbers"
            for file in FILES.values():
                if (folder / file).exists():
                    assert (folder / file).read_bytes() == (source / file).read_bytes(), (
                        "half, and looks whole"
                    )
            # Whoever begins anew asks for the first bytes of each archive; who goes on does not.
            begins = [path for _, path, said in faults.seen[asked:] if said and said.startswith("bytes=0-")]
            others = {path for _, path, said in faults.seen[asked:] if said} - set(begins)
            resumed += bool(others)
            if not hit:  # it came to its end: begin with nothing
                shutil.rmtree(folder)
        last = killing.start("download", config, run)
        last.join(180)
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
    kill_and_ask_again(tmp_path, source, kills=int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "6")))


@pytest.mark.slow
def test_killed_while_archives_are_made_of_folders(tmp_path: Path, source: Path) -> None:
    folders = tmp_path / "folders"
    with tarfile.open(source / FILES["val"]) as archive:
        for number, member in enumerate(archive.getmembers()[:60]):
            data = archive.extractfile(member)
            assert data
            for split in ("train", "val"):
                path = folders / split / f"n{number % 3:08d}" / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data.read() if split == "train" else path.name.encode())
    whole = config_of(tmp_path / "whole", folders)
    ask(download, whole)
    config = config_of(tmp_path / "killed", folders)
    config.download.connections = 3
    below = tmp_path / "killed" / "archives"
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    steps = [moments.randrange(1, 40) for _ in range(4)]
    killed = [killing.run_to_step("download", config, run_of(config), below, step) == step for step in steps]
    assert killed[0], "fewer than 40 steps of file work: this tested little"
    killing.run_to_step("download", config, run_of(config), below)
    but = tuple(f"{file}.receipt.json" for file in FILES.values())  # they hold times
    assert killing.snapshot(below, but=but) == killing.snapshot(tmp_path / "whole/archives", but=but)
    assert not receipt.missing_receipts(below / "numbers", FILES.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("kind", ["tmpfs"])
def test_a_disk_that_fills_up(tmp_path: Path, source: Path, kind: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", kind, "-o", "size=2600k", "none", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this root may not mount: {mounted.stderr.decode().strip()}")
    try:
        with serving(source) as url:
            size = sum((source / file).stat().st_size for file in FILES.values())
            told = refused(download, config_of(small, url))
            assert f"no room for 3 archives: it needs {size:,} bytes" in told
            assert not list((small / "archives/numbers").iterdir())
            # A server that does not say how much there is: the disk is full in the middle.
            with serving(source, faulty(Faults(length=False, ranges=False, only=""))) as silent:
                told = refused(download, config_of(small, silent))
                assert "No space left on device (bytes or inodes)" in told
                assert not list((small / "archives/numbers").glob("*.tar"))
            subprocess.run(["mount", "-o", "remount,size=9M", str(small)], check=True)
            ask(download, config_of(small, url))
            assert_whole(small, source)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_archive_that_changes_while_it_is_read(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    real = archive_folder.md5_of_file

    def hash_and_write(path: Path, progress: Callable[[int], None]) -> str:
        found = real(path, progress)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(archive_folder, "hash_file", hash_and_write)
    told = refused(download, config_of(tmp_path, copy))
    assert "changed while it was read" in told
    assert receipt.missing_receipts(tmp_path / "archives/numbers", FILES.values()) == list(FILES.values())


@pytest.mark.slow
def test_a_login_is_nowhere_but_in_the_requests(tmp_path: Path, source: Path, door: Door) -> None:
    """All that is written anywhere, printed, and listed among the processes is searched for the secret."""
    login = tmp_path / "login"
    login.write_text("X-Token: s3cr3t-t0ken\nCookie: session=s3cr3t-t0ken\n")
    faults = Faults(pause=0.01, only="", statuses=[(200, {}), (500, {})])
    with serving(source, faulty(faults)) as url:
        words = ["+stage=download", "dataset=ilsvrc", "dataset.name=numbers", f"dataset.source={url}"]
        words += ["cluster=local", f"download.login={login}", "wait=true"]
        login.chmod(0o644)
        told = [door.process(*words, code=2), door("jobs"), door("jobs", "--json")]
        assert "others may read it (mode 644)" in told[0].stderr
        assert not list(door.workspace.rglob("config.yaml")), "it was submitted"
        login.chmod(0o600)
        listed: set[str] = set()
        done = threading.Event()

        def list_processes() -> None:
            while not done.wait(0.02):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):
                        listed.add(path.read_text(errors="replace"))

        watcher = threading.Thread(target=list_processes)
        watcher.start()
        told += [door.process(*words), door("jobs"), door("jobs", "--json")]
        done.set()
        watcher.join()
    assert {headers.get("X-Token") for headers in faults.headers} == {"s3cr3t-t0ken"}
    assert any("hpc_imagenet" in line for line in listed), "nothing was watched"
    assert not [line for line in listed if "s3cr3t-t0ken" in line]
    assert not [one for one in told if "s3cr3t-t0ken" in one.stdout + one.stderr]
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != login:
            assert b"s3cr3t-t0ken" not in path.read_bytes(), path
    assert list(tmp_path.rglob("config.yaml")), "there is no frozen config to search"


def test_a_login_in_the_source_is_refused_and_not_shown(door: Door) -> None:
    for source in ("https://ada:s3cr3t@x.example/y", "https://x.example/y?token=s3cr3t"):
        told = door.refused(
            "+stage=download", "dataset=ilsvrc", "dataset.name=x", f"dataset.source='{source}'"
        )
        assert "a login is given by download.login" in told
        assert "s3cr3t" not in told
    assert not list(door.workspace.rglob("*.yaml"))
