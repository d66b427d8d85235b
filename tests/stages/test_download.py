from __future__ import annotations

import contextlib
import hashlib
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
from typing import Any

import killing
import pytest
from command_line import Cli
from faulty_server import Faults, faulty, serving
from rich.console import Console
from run_stage import FILES, assert_complete, config_of, run_of, run_stage, stage_error

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.sources import archive_folder
from hpc_imagenet.demo import digits
from hpc_imagenet.errors import UserError
from hpc_imagenet.report import jobs_table
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.download_stage import DOWNLOAD
from hpc_imagenet.stages.work import download


@pytest.mark.slow
def test_download_over_http(tmp_path: Path, source: Path) -> None:
    size = sum((source / file).stat().st_size for file in FILES.values())
    faults = Faults()
    with serving(source, faulty(faults)) as url:
        config = config_of(tmp_path, url)
        result = run_stage(download, config)
        sums = {file: hashlib.md5((source / file).read_bytes()).hexdigest() for file in FILES.values()}
        assert result == {"bytes": size, "files": 3, "downloaded": size, "md5": sums}
        assert_complete(tmp_path, source)
        made = [tmp_path / "archives/numbers" / file for file in FILES.values()]
        assert not [path for path in made if path.stat().st_mode & 0o222]
        loaded = receipt.load_receipt(tmp_path / "archives/numbers" / FILES["train"])
        assert loaded
        assert (loaded.verified, loaded.source) == ("md5sums", url)
        progress = json.loads((tmp_path / "runs/abc-stage/progress.json").read_text())
        assert (progress["done"], progress["total"], progress["unit"]) == (size, size, "B")
        count = len(faults.requests)
        assert run_stage(download, config) == {**result, "downloaded": 0}
        assert len(faults.requests) == count, "the second run sent requests"


@pytest.mark.slow
def test_credentials_are_read_before_submission_for_a_server_only(tmp_path: Path) -> None:
    login = tmp_path / "netrc"
    login.write_text("machine other.example login a password b")
    login.chmod(0o600)
    for source in (str(tmp_path), "s3://bucket/x", "HTTPS://images.example/x"):
        config = config_of(tmp_path, source)
        config.download.login = str(login)
        expected: Any = contextlib.nullcontext()
        if source.startswith("HTTPS"):
            expected = pytest.raises(UserError, match="without an entry for images")
        with expected:
            DOWNLOAD.check_input(config, config.cluster, planned=False)


@pytest.mark.slow
def test_md5_settings_make_md5sums_unnecessary(tmp_path: Path, source: Path) -> None:
    sums = dict(reversed(line.split()) for line in (source / "md5sums").read_text().splitlines())
    faults = Faults()
    with serving(source, faulty(faults)) as url:
        run_stage(
            download,
            config_of(tmp_path, url, **{split: {"md5": sums[file]} for split, file in FILES.items()}),
        )
    assert not [request for request in faults.requests if "md5sums" in request[1]]
    loaded = receipt.load_receipt(tmp_path / "archives/numbers" / FILES["val"])
    assert loaded
    assert loaded.verified == "dataset.archives.val.md5"


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_archives_in_a_folder_are_hard_linked(tmp_path: Path, source: Path, form: str) -> None:
    result = run_stage(download, config_of(tmp_path, form.format(source)))
    assert result["downloaded"] == 0
    assert_complete(tmp_path, source)
    archive = tmp_path / "archives/numbers" / FILES["train"]
    assert archive.samefile(source / FILES["train"])


def test_archives_on_another_file_system_are_symbolic_links(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run_stage(download, config_of(tmp_path, source))
    assert (tmp_path / "archives/numbers" / FILES["val"]).is_symlink()
    assert_complete(tmp_path, source)


def test_missing_file_in_the_source_folder(tmp_path: Path, source: Path) -> None:
    error = stage_error(download, config_of(tmp_path, source, val={"file": "validation.tar"}))
    assert "validation.tar: no such file" in error
    assert f"the folder contains {FILES['devkit']}, {FILES['train']}" in error
    assert "dataset.archives.val.file" in error
    error = stage_error(download, config_of(tmp_path / "b", tmp_path / "nowhere"))
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in error


def test_source_file_with_wrong_md5_is_not_moved(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    with (copy / FILES["val"]).open("r+b") as file:
        file.seek(600)
        file.write(b"!")
    error = stage_error(download, config_of(tmp_path, copy))
    assert str(copy / FILES["val"]) in error
    assert "but md5sums has" in error
    assert (copy / FILES["val"]).exists()
    assert receipt.missing_receipts(tmp_path / "archives/numbers", [FILES["val"]])


def test_archives_copied_by_hand_are_verified_in_place(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "archives" / "numbers"
    folder.mkdir(parents=True)
    for file in FILES.values():
        shutil.copy(source / file, folder)
    with serving(source) as url:
        assert run_stage(download, config_of(tmp_path, url))["downloaded"] == 0
        assert_complete(tmp_path, source)
        # A change makes the receipt invalid, so the archive is verified again.
        (folder / FILES["val"]).write_bytes(b"something else")
        error = stage_error(download, config_of(tmp_path, url))
        assert f"{FILES['val']}.bad" in error
        assert (
            run_stage(download, config_of(tmp_path, url))["downloaded"]
            == (source / FILES["val"]).stat().st_size
        )


@pytest.mark.slow
def test_different_archive_of_the_same_name_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(download, config_of(tmp_path, source))
    other = tmp_path / "other"
    monkeypatch.setattr(digits, "QUALITY", 90)
    digits.write_digits(other)
    error = stage_error(download, config_of(tmp_path, other))
    assert "is another archive" in error
    assert "dataset.name" in error
    assert_complete(tmp_path, source)
    # From another source, the archive is accepted if its MD5 is known to be equal.
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    run_stage(download, config_of(tmp_path, moved))
    (moved / "md5sums").unlink()
    assert "without an MD5 it cannot be compared" in stage_error(download, config_of(tmp_path, moved))


@pytest.mark.parametrize("split", ["val", "devkit"])
def test_truncated_archive_without_md5_is_refused(tmp_path: Path, source: Path, split: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "md5sums").unlink()
    run_stage(download, config_of(tmp_path / "intact", copy))
    path = copy / FILES[split]
    path.write_bytes(path.read_bytes()[: -12_000 if split == "val" else -4])
    assert "truncated" in stage_error(download, config_of(tmp_path / "cut", copy))
    assert receipt.missing_receipts(tmp_path / "cut/archives/numbers", [FILES[split]])


def test_invalid_settings_are_refused(tmp_path: Path, source: Path) -> None:
    assert "ftp:// is not supported" in stage_error(download, config_of(tmp_path, "ftp://x/y"))
    assert "dataset.archives.val.md5=xyz" in stage_error(
        download, config_of(tmp_path, source, val={"md5": "xyz"})
    )
    assert "dataset.archives.val.file=../x" in stage_error(
        download, config_of(tmp_path, source, val={"file": "../x"})
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "archives").write_text("a file where a folder should be")
    assert f"workspace={tmp_path / 'b'} cannot be written" in stage_error(
        download, config_of(tmp_path / "b", source)
    )


def test_only_rank_zero_downloads(tmp_path: Path) -> None:
    assert download.run(config_of(tmp_path, "/nowhere"), Run(tmp_path), DistEnv(rank=1, size=2)) == {}
    assert not list(tmp_path.iterdir())


def test_jobs_table_shows_bytes_rate_and_remaining_time(tmp_path: Path) -> None:
    run = Run(tmp_path / "abc-download")
    run.folder.mkdir()
    progress = {"done": 38.7e9, "total": 154.6e9, "unit": "B", "rate": 115.9e6, "note": FILES["train"]}
    (run.folder / "progress.json").write_text(json.dumps(progress))
    (row,) = jobs_table.job_rows([run])
    row |= {"state": "running", "reason": "", "seconds_left": 1000.0}
    console = Console(file=io.StringIO())
    jobs_table.print_jobs([row], console)
    assert f"25% 16m left 115.9 MB/s · {FILES['train']} · 38.7 GB of 154.6 GB" in console.file.getvalue()


def kill_and_restart(tmp_path: Path, source: Path, kills: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    # 3.6 MB in chunks of 16 kB over 4 connections; killed after a random number of bytes.
    faults = Faults(pause=0.005, chunk_size=1 << 14, only="")
    with serving(source, faulty(faults)) as url:
        config = config_of(tmp_path, url)
        config.download.connections = 4
        run = run_of(config)
        killed = resumed = 0
        deadline = time.monotonic() + 60 * kills
        while killed < kills and time.monotonic() < deadline:
            first_request, limit = len(faults.requests), faults.sent + rng.uniform(0, 4e6)
            process = killing.start("download", config, run)
            hit = killing.kill_when(process, lambda limit=limit: faults.sent >= limit)
            assert hit or process.exitcode == 0
            killed += hit
            folder = tmp_path / "archives" / "numbers"
            for file in FILES.values():
                if (folder / file).exists():
                    assert (folder / file).read_bytes() == (source / file).read_bytes(), (
                        "an incomplete archive has its final name"
                    )
            # A process that resumes an archive does not request its first bytes.
            begins = [
                path
                for _, path, header in faults.requests[first_request:]
                if header and header.startswith("bytes=0-")
            ]
            others = {path for _, path, header in faults.requests[first_request:] if header} - set(begins)
            resumed += bool(others)
            if not hit:  # the process finished: start from scratch
                shutil.rmtree(folder)
        last = killing.start("download", config, run)
        last.join(180)
        assert last.exitcode == 0
    assert killed == kills
    assert resumed, "no process resumed a partial file, so nothing was tested"
    assert_complete(tmp_path, source)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, source: Path) -> None:
    config = config_of(tmp_path, str(source))
    run_stage(download, config)
    folder = tmp_path / "archives" / "numbers"
    (folder / f".{FILES['val']}.receipt.json.x1y2.tmp").write_text("{")
    (folder / f"{FILES['val']}.part.json").write_text("{}")
    run_stage(download, config)
    assert_complete(tmp_path, source)


@pytest.mark.slow
def test_killed_download_is_resumed(tmp_path: Path, source: Path) -> None:
    kill_and_restart(tmp_path, source, kills=int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "6")))


@pytest.mark.slow
def test_killed_while_making_archives_of_class_folders(tmp_path: Path, source: Path) -> None:
    folders = tmp_path / "folders"
    with tarfile.open(source / FILES["val"]) as archive:
        for number, member in enumerate(archive.getmembers()[:60]):
            data = archive.extractfile(member)
            assert data
            for split in ("train", "val"):
                path = folders / split / f"n{number % 3:08d}" / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data.read() if split == "train" else path.name.encode())
    complete = config_of(tmp_path / "complete", folders)
    run_stage(download, complete)
    config = config_of(tmp_path / "killed", folders)
    config.download.connections = 3
    below = tmp_path / "killed" / "archives"
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    steps = [rng.randrange(1, 40) for _ in range(4)]
    killed = [killing.run_to_step("download", config, run_of(config), below, step) == step for step in steps]
    assert killed[0], "fewer than 40 file operations, so the kill was not tested"
    killing.run_to_step("download", config, run_of(config), below)
    excluded = tuple(f"{file}.receipt.json" for file in FILES.values())  # they contain mtimes
    assert killing.snapshot(below, but=excluded) == killing.snapshot(
        tmp_path / "complete/archives", but=excluded
    )
    assert not receipt.missing_receipts(below / "numbers", FILES.values())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("kind", ["tmpfs"])
def test_resumes_after_a_full_disk(tmp_path: Path, source: Path, kind: str) -> None:
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
            error = stage_error(download, config_of(small, url))
            assert f"not enough free space for 3 archives: it needs {size:,} bytes" in error
            assert not list((small / "archives/numbers").iterdir())
            # Without a Content-Length the free space cannot be checked in advance.
            with serving(source, faulty(Faults(length=False, ranges=False, only=""))) as silent:
                error = stage_error(download, config_of(small, silent))
                assert "No space left on device (bytes or inodes)" in error
                assert not list((small / "archives/numbers").glob("*.tar"))
            subprocess.run(["mount", "-o", "remount,size=9M", str(small)], check=True)
            run_stage(download, config_of(small, url))
            assert_complete(small, source)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_archive_changed_while_it_is_hashed_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    real_md5 = archive_folder.md5_of_file

    def hash_and_write(path: Path, progress: Callable[[int], None]) -> str:
        md5 = real_md5(path, progress)
        with path.open("ab") as file:
            file.write(b"more")
        return md5

    monkeypatch.setattr(archive_folder, "md5_of_file", hash_and_write)
    error = stage_error(download, config_of(tmp_path, copy))
    assert "changed while it was read" in error
    assert receipt.missing_receipts(tmp_path / "archives/numbers", FILES.values()) == list(FILES.values())


@pytest.mark.slow
def test_login_appears_only_in_the_requests(tmp_path: Path, source: Path, cli: Cli) -> None:
    """Search all files, all output and all command lines for the secret."""
    login = tmp_path / "login"
    login.write_text("X-Token: s3cr3t-t0ken\nCookie: session=s3cr3t-t0ken\n")
    faults = Faults(pause=0.01, only="", statuses=[(200, {}), (500, {})])
    with serving(source, faulty(faults)) as url:
        arguments = ["+stage=download", "dataset=ilsvrc", "dataset.name=numbers", f"dataset.source={url}"]
        arguments += ["cluster=local", f"download.login={login}", "wait=true"]
        login.chmod(0o644)
        outputs = [cli.process(*arguments, code=2), cli("jobs"), cli("jobs", "--json")]
        assert "other users may read it (mode 644)" in outputs[0].stderr
        assert not list(cli.workspace.rglob("config.yaml")), "the job was submitted"
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
        outputs += [cli.process(*arguments), cli("jobs"), cli("jobs", "--json")]
        done.set()
        watcher.join()
    assert {headers.get("X-Token") for headers in faults.headers} == {"s3cr3t-t0ken"}
    assert any("hpc_imagenet" in line for line in listed), "no process was listed"
    assert not [line for line in listed if "s3cr3t-t0ken" in line]
    assert not [output for output in outputs if "s3cr3t-t0ken" in output.stdout + output.stderr]
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != login:
            assert b"s3cr3t-t0ken" not in path.read_bytes(), path
    assert list(tmp_path.rglob("config.yaml")), "there is no config.yaml to search"


@pytest.mark.slow
def test_login_in_the_source_url_is_refused_and_not_shown(cli: Cli) -> None:
    for source in ("https://ada:s3cr3t@x.example/y", "https://x.example/y?token=s3cr3t"):
        error = cli.refused(
            "+stage=download", "dataset=ilsvrc", "dataset.name=x", f"dataset.source='{source}'"
        )
        assert "set download.login instead" in error
        assert "s3cr3t" not in error
    assert not list(cli.workspace.rglob("*.yaml"))
