"""`dataset=images` through the command line: from a folder of people's photos to a version and its copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli
from sample_images import encoded

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader

pytestmark = pytest.mark.slow

CLASSES = ("2, deux", "10 [red]", "café au lait", "日本=x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write class folders of three splits, in a folder whose name needs care in a shell."""
    root = tmp_path / "my photos"
    for split, images in (("train", 4), ("valid", 2), ("test", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                data = encoded("JPEG" if number % 2 else "GIF", size=(20 + label, 20))
                (root / split / name / f"{number}.{'jpg' if number % 2 else 'gif'}").write_bytes(data)
    (root / "train" / CLASSES[0] / "Thumbs.db").write_bytes(b"x")
    return root


def settings(folder: Path, *more: str) -> list[str]:
    return [
        "dataset=images",
        "dataset.name=photos",
        f"dataset.source='{folder}'",
        "cluster.executor=foreground",
        *more,
    ]


def test_all_stages_keep_the_test_split(cli: Cli, folder: Path) -> None:
    done = cli("+stage=upload", *settings(folder), "process.layout=folders", code=None)
    assert "run +stage=process first" in done.stderr
    for stage in ("download", "process", "upload"):
        done = cli(f"+stage={stage}", *settings(folder), "wait=true")
    assert "36 images" in done.stdout
    shown = json.loads(cli("datastores", "show", "photos", "--json").stdout)
    assert shown[0]["splits"] == {"train": 16, "val": 8, "test": 12}
    assert "intact: 36 images" in cli("verify", "photos").stdout
    assert "is intact" in cli("datastores", "verify", "photos").stdout
    cli("datastores", "fetch", "photos", str(folder.parent / "copy"))
    reader = DatasetReader(folder.parent / "copy/photos/v1")
    assert tuple(category.names[0] for category in reader.manifest.classes) == CLASSES
    assert sorted({label for _, label in reader.open_split("test")}) == [0, 1, 2, 3]
    # Nothing is made again.
    assert "finished" in cli("+stage=upload", *settings(folder), "wait=true").stdout
    assert len(list((cli.workspace / "datastores/photos").iterdir())) == 1


def test_what_a_small_folder_lacks_is_known_before_submission(cli: Cli, folder: Path) -> None:
    for name in ("valid", "test"):
        (folder / name).rename(folder.parent / name)
    error = cli("+stage=pipeline", *settings(folder), code=2).stderr
    assert "set dataset.val_fraction=0.1" in error
    error = cli("+stage=download", *settings(folder / "absent"), code=2).stderr
    assert "no such folder" in error
    assert error.count("\n") == 1
    assert not cli.workspace.exists() or not list(cli.workspace.iterdir())


def test_other_settings_are_refused_before_submission(cli: Cli, folder: Path) -> None:
    cli("+stage=download", *settings(folder), "wait=true")
    error = cli("+stage=download", *settings(folder), "dataset.orient=false", code=2).stderr
    assert "set another dataset.name, or remove" in error
