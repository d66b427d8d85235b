from __future__ import annotations

import dataclasses
import json
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
from asking import ask, config_of
from door import Door, eventually
from pictures import jpeg
from sample_dataset import make_dataset

from hpc_imagenet.config.compose import compose
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.data.prepare import verify
from hpc_imagenet.data.prepare.verify import VerifyReport
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages import download, process, upload

LAYOUTS = ("index", "shards", "folders")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workspaces with a dataset `numbers` of each layout."""
    source, bits = tmp_path_factory.mktemp("sources") / "small", random.Random(3)
    source.mkdir()
    synsets = [Synset(3 - i, f"n{i}", f"word {i}") for i in range(3)]
    ilsvrc_writer.write_train(
        source / ilsvrc_writer.TRAIN, [(s.wnid, [jpeg(bits, 800) for _ in range(9)]) for s in synsets]
    )
    ilsvrc_writer.write_val(source / ilsvrc_writer.VAL, [jpeg(bits, 500) for _ in range(6)])
    ilsvrc_writer.write_devkit(source / ilsvrc_writer.DEVKIT, synsets, [1 + i % 3 for i in range(6)])
    workspaces = {}
    for layout in LAYOUTS:
        workspace = tmp_path_factory.mktemp(layout)
        config = config_of(workspace, source, layout=layout)
        config.process.shard_size = 8_000 / 2**30
        ask(download, config)
        ask(process, config)
        workspaces[layout] = workspace
    return workspaces


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(layout: str) -> Path:
        shutil.copytree(made[layout], tmp_path / layout)
        return tmp_path / layout / "datasets" / "numbers"

    return copy


def look(folder: Path, quick: bool = False) -> VerifyReport:
    return verify.verify_dataset(folder, quick=quick, workers=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_just_made_is_whole(made: dict[str, Path], layout: str) -> None:
    folder = made[layout] / "datasets" / "numbers"
    report = look(folder)
    assert report.wrong == []
    assert report.images == 33
    assert report.bytes > 33 * 500 * (2 if layout == "folders" else 1)
    quick = look(folder, quick=True)
    assert (quick.wrong, quick.bytes) == ([], 0)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


HARMS = [
    ("index", lambda f: flip(f / "../../archives/numbers" / ilsvrc_writer.VAL, 900), "has other bytes"),
    ("index", lambda f: (f / "../../archives/numbers" / ilsvrc_writer.TRAIN).unlink(), "is missing"),
    ("index", lambda f: flip(f / "train.npy", 140), "train.npy has other bytes"),
    ("index", lambda f: (f / "val.npy").write_bytes((f / "val.npy").read_bytes()[:-3]), "val.npy has"),
    ("index", lambda f: (f / "meta.bin").unlink(), "meta.bin is missing"),
    ("index", lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    ("index", lambda f: (f / "certificate.json").write_text("{}"), "certificate.json"),
    ("shards", lambda f: flip(next(f.glob("shards-*/val-00000.tar")), 600), "has other bytes"),
    ("shards", lambda f: next(f.glob("shards-*/train-00001.tar")).unlink(), "train-00001.tar is missing"),
    ("folders", lambda f: flip(f / "train/n1/n1_3.JPEG", 5), "n1_3.JPEG differs"),
    ("folders", lambda f: (f / "train/n1/n1_3.JPEG").unlink(), "n1 has 8 files instead of 9"),
    ("folders", lambda f: (f / "val/n1/x.JPEG").write_bytes(b"x"), "n1 has 3 files instead of 2"),
    ("folders", lambda f: (f / "train/n1/n1_3.JPEG").rename(f / "train/n1/n1_33.JPEG"), "n1_3.JPEG"),
    ("folders", lambda f: shutil.rmtree(f / "val/n2"), "val/n2: No such file"),
]


SEEN_AT_ONCE = (1, 3, 4, 5, 6, 8, 10, 11, 13)  # without reading an image


@pytest.mark.parametrize(
    ("layout", "harm", "words", "at_once"),
    [(*harm, number in SEEN_AT_ONCE) for number, harm in enumerate(HARMS)],
)
def test_names_what_is_wrong(copied, layout: str, harm, words: str, at_once: bool) -> None:  # type: ignore[no-untyped-def]
    folder = copied(layout)
    harm(folder)
    for quick in {False, at_once}:
        wrong = look(folder, quick=quick).wrong
        assert any(words in line for line in wrong), wrong
        assert not any("\n" in line for line in wrong)


def test_an_index_that_leads_elsewhere_is_seen_at_once(copied: Callable[[str], Path]) -> None:
    folder = copied("index")
    entries = np.load(folder / "train.npy")
    entries["offset"][4] += 512
    np.save(folder / "train.npy", entries)
    assert any("where no image begins" in line for line in look(folder, quick=True).wrong)
    entries["shard"][4] = 9
    np.save(folder / "train.npy", entries)
    assert any(
        "1 addresses lead nowhere, the first is entry 4" in line for line in look(folder, quick=True).wrong
    )


def test_a_certificate_of_something_else_is_seen(copied: Callable[[str], Path]) -> None:
    folder = copied("index")
    certificate = json.loads((folder / "certificate.json").read_text())
    certificate["counts"]["n1"]["train"] = 8
    (folder / "certificate.json").write_text(json.dumps(certificate))
    assert any("says 8 images of n1 in train, the index 9" in line for line in look(folder, quick=True).wrong)


def test_targets(made: dict[str, Path], tmp_path: Path) -> None:
    workspace = made["shards"]
    folder = workspace / "datasets" / "numbers"
    assert verify.find_folders(workspace, "numbers") == [folder]
    assert verify.find_folders(workspace, str(folder)) == [folder]
    assert verify.all_folders(workspace) == [folder]
    assert verify.all_folders(tmp_path) == []
    for name in ("other", "numbers@v1", str(tmp_path)):
        with pytest.raises(UserError, match="no dataset, datastore or folder"):
            verify.find_folders(workspace, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_uploaded_version_is_verified_as_well(copied: Callable[[str], Path], layout: str) -> None:
    workspace = copied(layout).parents[1]
    words = ["dataset=ilsvrc", "dataset.name=numbers", "dataset.source=x", f"workspace={workspace}"]
    (config,) = compose(words)
    ask(upload, config)
    (dataset, version) = verify.find_folders(workspace, "numbers")
    assert version == workspace / "datastores" / "numbers" / "v1"
    assert verify.find_folders(workspace, "numbers@v1") == [version]
    assert look(version).wrong == []
    (version / "certificate.md").chmod(0o644)
    (version / "certificate.md").write_text("x")
    assert "certificate.md" in look(version, quick=True).wrong[0]
    assert look(dataset).wrong == []


def test_the_verb(copied: Callable[[str], Path]) -> None:
    folder = copied("shards")
    door = Door(folder.parents[1])
    told = door("verify").stdout
    assert "whole: 33 images, " in told
    assert "ok    train.npy" in told
    assert "no image read" in door("verify", "numbers", "--quick").stdout
    flip(next(folder.glob("shards-*/val-00000.tar")), 600)
    told = door("verify", "numbers", code=1).stdout
    assert "wrong: " in told
    assert "wrong in 1 places" in told
    assert "no dataset, datastore" in door("verify", "other", code=2).stderr
    shutil.rmtree(folder)
    assert "nothing to verify" in door("verify", code=2).stderr


@pytest.mark.parametrize("words", [("verify", "digits"), ("datastores", "verify", "digits@v1")])
def test_an_interrupt_waits_for_no_file_to_be_read_to_its_end(tmp_path: Path, words: tuple[str, ...]) -> None:
    manifest = make_dataset(tmp_path)
    folder = tmp_path / "datasets" / "digits"
    with (folder / "large").open("wb") as file:
        file.truncate(2**40)  # holes: an hour of hashing
    large = File("large", 2**40, f"md5:{0:032}")
    dataclasses.replace(manifest, files=(*manifest.files, large)).save(folder)
    (tmp_path / "datastores" / "digits").mkdir(parents=True)
    (tmp_path / "datastores" / "digits" / "v1").symlink_to(folder)
    with subprocess.Popen(
        [sys.executable, "-m", "hpc_imagenet", *words, f"workspace={tmp_path}"], stderr=subprocess.PIPE
    ) as process:
        try:
            eventually(
                lambda: any(f.path.endswith("large") for f in psutil.Process(process.pid).open_files())
            )
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert told.decode().startswith("\ninterrupted: ")
    assert b"Traceback" not in told
