from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from command_line import Cli, eventually
from run_stage import config_of, run_stage
from sample_dataset import link_version, make_dataset
from sample_images import jpeg

from hpc_imagenet.config.compose import compose
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.data.prepare import verify
from hpc_imagenet.data.prepare.verify import VerifyReport
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.work import download, process, upload

LAYOUTS = ("index", "shards", "folders")


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout → workspace with a dataset `numbers`."""
    source, bits = tmp_path_factory.mktemp("sources") / "small", random.Random(3)
    source.mkdir()
    synsets = [Synset(3 - i, f"n{i}", f"word {i}") for i in range(3)]
    ilsvrc_writer.write_train(
        source / ilsvrc_writer.TRAIN, [(s.wnid, [jpeg(bits, 800) for _ in range(9)]) for s in synsets]
    )
    ilsvrc_writer.write_val(source / ilsvrc_writer.VAL, [jpeg(bits, 500) for _ in range(6)])
    ilsvrc_writer.write_devkit(source / ilsvrc_writer.DEVKIT, synsets, [1 + i % 3 for i in range(6)])
    made = {}
    for layout in LAYOUTS:
        workspace = tmp_path_factory.mktemp(layout)
        config = config_of(workspace, source, layout=layout)
        config.process.shard_size = 8_000 / 2**30
        run_stage(download, config)
        run_stage(process, config)
        made[layout] = workspace
    return made


@pytest.fixture
def copy_dataset(workspaces: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(layout: str) -> Path:
        shutil.copytree(workspaces[layout], tmp_path / layout)
        return tmp_path / layout / "datasets" / "numbers"

    return copy


def run_verify(folder: Path, quick: bool = False) -> VerifyReport:
    return verify.verify_dataset(folder, quick=quick, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_dataset_has_no_problems(workspaces: dict[str, Path], layout: str) -> None:
    folder = workspaces[layout] / "datasets" / "numbers"
    report = run_verify(folder)
    assert report.problems == []
    assert report.images == 33
    assert report.bytes > 33 * 500 * (2 if layout == "folders" else 1)
    quick = run_verify(folder, quick=True)
    assert (quick.problems, quick.bytes) == ([], 0)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGES = [
    (
        "index",
        lambda f: flip_bit(f / "../../archives/numbers" / ilsvrc_writer.VAL, 900),
        "is damaged: its hash is",
    ),
    ("index", lambda f: (f / "../../archives/numbers" / ilsvrc_writer.TRAIN).unlink(), "is missing"),
    ("index", lambda f: flip_bit(f / "train.npy", 140), "train.npy is damaged: its hash is"),
    ("index", lambda f: (f / "val.npy").write_bytes((f / "val.npy").read_bytes()[:-3]), "val.npy has"),
    ("index", lambda f: (f / "meta.bin").unlink(), "meta.bin is missing"),
    ("index", lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    ("index", lambda f: (f / "certificate.json").write_text("{}"), "certificate.json"),
    (
        "shards",
        lambda f: flip_bit(next(f.glob("shards-*/val-00000.tar")), 600),
        "is damaged: its hash is",
    ),
    ("shards", lambda f: next(f.glob("shards-*/train-00001.tar")).unlink(), "train-00001.tar is missing"),
    ("folders", lambda f: flip_bit(f / "train/n1/n1_3.JPEG", 5), "n1_3.JPEG differs"),
    ("folders", lambda f: (f / "train/n1/n1_3.JPEG").unlink(), "n1 has 8 files instead of 9"),
    ("folders", lambda f: (f / "val/n1/x.JPEG").write_bytes(b"x"), "n1 has 3 files instead of 2"),
    ("folders", lambda f: (f / "train/n1/n1_3.JPEG").rename(f / "train/n1/n1_33.JPEG"), "n1_3.JPEG"),
    ("folders", lambda f: shutil.rmtree(f / "val/n2"), "val/n2: No such file"),
]


FOUND_BY_QUICK = (1, 3, 4, 5, 6, 8, 10, 11, 13)  # indices in DAMAGES


@pytest.mark.parametrize(
    ("layout", "damage", "message", "found_by_quick"),
    [(*damage, number in FOUND_BY_QUICK) for number, damage in enumerate(DAMAGES)],
)
def test_verify_names_each_problem(
    copy_dataset: Callable[[str], Path],
    layout: str,
    damage: Callable[[Path], object],
    message: str,
    found_by_quick: bool,
) -> None:
    folder = copy_dataset(layout)
    damage(folder)
    for quick in {False, found_by_quick}:
        problems = run_verify(folder, quick=quick).problems
        assert any(message in line for line in problems), problems
        assert not any("\n" in line for line in problems)


@pytest.mark.parametrize(
    ("layout", "quick", "message"),
    [
        ("index", True, "cannot be read: Input/output error"),
        ("folders", False, "n1 cannot be compared with the shards: Input/output error"),
    ],
)
def test_a_read_error_is_one_problem(
    copy_dataset: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    quick: bool,
    message: str,
) -> None:
    folder = copy_dataset(layout)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    problems = run_verify(folder, quick).problems
    assert any(message in line for line in problems), problems
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert run_verify(folder, quick).problems == [f"{folder}/manifest.json cannot be read: Is a directory"]


def test_quick_verify_finds_invalid_index_entries(copy_dataset: Callable[[str], Path]) -> None:
    folder = copy_dataset("index")
    entries = np.load(folder / "train.npy")
    entries["offset"][4] += 512
    np.save(folder / "train.npy", entries)
    assert any("where no image begins" in line for line in run_verify(folder, quick=True).problems)
    entries["shard"][4] = 9
    np.save(folder / "train.npy", entries)
    assert any(
        "1 entries are invalid, the first is entry 4" in line
        for line in run_verify(folder, quick=True).problems
    )


def test_certificate_with_other_counts_is_reported(copy_dataset: Callable[[str], Path]) -> None:
    folder = copy_dataset("index")
    certificate = json.loads((folder / "certificate.json").read_text())
    certificate["counts"]["n1"]["train"] = 8
    (folder / "certificate.json").write_text(json.dumps(certificate))
    message = "lists 8 images of n1 in train, but the index has 9"
    assert any(message in line for line in run_verify(folder, quick=True).problems)


def test_find_folders_by_name_version_and_path(workspaces: dict[str, Path], tmp_path: Path) -> None:
    workspace = workspaces["shards"]
    folder = workspace / "datasets" / "numbers"
    assert verify.find_folders(workspace, "numbers") == [folder]
    assert verify.find_folders(workspace, str(folder)) == [folder]
    assert verify.all_folders(workspace) == [folder]
    assert verify.all_folders(tmp_path) == []
    for name in ("other", "numbers@v1", str(tmp_path)):
        with pytest.raises(UserError, match="no dataset, datastore or folder"):
            verify.find_folders(workspace, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_uploaded_version(copy_dataset: Callable[[str], Path], layout: str) -> None:
    workspace = copy_dataset(layout).parents[1]
    overrides = ["dataset=ilsvrc", "dataset.name=numbers", "dataset.source=x", f"workspace={workspace}"]
    (config,) = compose(overrides)
    run_stage(upload, config)
    (dataset, version) = verify.find_folders(workspace, "numbers")
    assert version == workspace / "datastores" / "numbers" / "v1"
    assert verify.find_folders(workspace, "numbers@v1") == [version]
    assert run_verify(version).problems == []
    (version / "certificate.md").chmod(0o644)
    (version / "certificate.md").write_text("x")
    assert "certificate.md" in run_verify(version, quick=True).problems[0]
    assert run_verify(dataset).problems == []


def test_verify_command(copy_dataset: Callable[[str], Path]) -> None:
    folder = copy_dataset("shards")
    cli = Cli(folder.parents[1])
    output = cli("verify").stdout
    assert "intact: 33 images, " in output
    assert "ok    train.npy" in output
    assert "no image read" in cli("verify", "numbers", "--quick").stdout
    flip_bit(next(folder.glob("shards-*/val-00000.tar")), 600)
    output = cli("verify", "numbers", code=1).stdout
    assert "wrong: " in output
    assert "1 problem" in output
    assert "no dataset, datastore" in cli("verify", "other", code=2).stderr
    shutil.rmtree(folder)
    assert "nothing to verify" in cli("verify", code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("verify", "digits"), ("datastores", "verify", "digits@v1")])
def test_interrupt_stops_while_a_large_file_is_hashed(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    manifest = make_dataset(tmp_path)
    folder = tmp_path / "datasets" / "digits"
    with (folder / "large").open("wb") as file:
        file.truncate(2**40)  # a sparse file that takes an hour to hash
    large = File("large", 2**40, f"md5:{0:032}")
    dataclasses.replace(manifest, files=(*manifest.files, large)).save(folder)
    link_version(folder, tmp_path / "datastores" / "digits" / "v1")
    with subprocess.Popen(
        [sys.executable, "-m", "hpc_imagenet", *arguments, f"workspace={tmp_path}"], stderr=subprocess.PIPE
    ) as process:
        try:
            eventually(
                lambda: any(f.path.endswith("large") for f in psutil.Process(process.pid).open_files())
            )
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stderr.decode().startswith("\ninterrupted: ")
    assert b"Traceback" not in stderr
