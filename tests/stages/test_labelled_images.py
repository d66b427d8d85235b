"""`dataset=images` through the command line: from a folder of people's photos to a version and its copy."""

from __future__ import annotations

import json
import os
import shutil
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


def made(cli: Cli, folder: Path, *more: str) -> None:
    for stage in ("download", "process", "upload"):
        cli(f"+stage={stage}", *settings(folder, *more))


def reason(cli: Cli, stage: str) -> str:
    (row,) = [row for row in cli.jobs() if row["run"].endswith(f"{stage}-photos")]
    return str(row["reason"])


def remove(folder: Path) -> None:
    """Remove one image of train."""
    (folder / "train" / CLASSES[0] / "0.gif").unlink()


def test_changed_images_are_noticed_before_submission(cli: Cli, folder: Path) -> None:
    made(cli, folder)
    archives = cli.workspace / "archives/photos"
    remove(folder)
    error = cli("+stage=download", *settings(folder), code=2).stderr
    assert "has changed since" in error
    assert "(then 16 train, 8 val, 12 test; now 15 train, 8 val, 12 test)" in error
    assert f"remove {archives} and set dataset.revision=NAME" in error
    assert error.count("\n") == 1
    (folder / "train" / CLASSES[0] / "new.gif").write_bytes(b"GIF89a")
    error = cli("+stage=download", *settings(folder), code=2).stderr
    assert "(other files, sizes or labels)" in error
    (folder / "train" / CLASSES[0] / "new.gif").unlink()
    error = cli("+stage=download", *settings(folder), "dataset.revision=b", code=2).stderr
    assert f"remove {archives}" in error  # those archives are of the images before
    shutil.rmtree(archives)
    made(cli, folder, "dataset.revision=b")
    shown = json.loads(cli("datastores", "show", "photos", "--json").stdout)
    assert sorted(each["splits"]["train"] for each in shown) == [15, 16]
    assert len({each["content"] for each in shown}) == 2
    # The archives of the new images are not taken for those of before.
    error = cli("+stage=process", *settings(folder), "process.layout=folders", code=2).stderr
    assert "train.tar was made of" in error


def test_a_change_that_is_an_error_is_no_removal(cli: Cli, folder: Path) -> None:
    made(cli, folder)
    (folder / "train" / CLASSES[0] / "2.gif").write_bytes(b"")
    error = cli("+stage=download", *settings(folder), code=2).stderr
    assert "2.gif" in error, error
    (folder / "train" / CLASSES[0] / "2.gif").unlink()
    (folder / "valid" / "new class").mkdir()
    (folder / "valid" / "new class" / "1.jpg").write_bytes(encoded("JPEG"))
    assert "new class" in cli("+stage=download", *settings(folder), code=2).stderr


def test_times_of_files_alone_need_no_new_revision(cli: Cli, folder: Path) -> None:
    made(cli, folder)
    os.utime(folder / "train" / CLASSES[0] / "0.gif", (1, 1))
    error = cli("+stage=download", *settings(folder), code=2).stderr
    assert "the times of files in" in error
    assert "revision" not in error
    shutil.rmtree(cli.workspace / "archives/photos")
    cli("+stage=download", *settings(folder))


def test_images_that_only_another_user_may_read_are_not_compared(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(cli, folder)
    is_dir = Path.is_dir

    def refuse(path: Path) -> bool:
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert "already finished" in cli("+stage=download", *settings(folder)).stdout


def test_images_that_were_removed_after_the_download_are_not_missed(cli: Cli, folder: Path) -> None:
    made(cli, folder)
    for image in folder.rglob("*.*"):
        image.unlink()
    assert "already finished" in cli("+stage=download", *settings(folder)).stdout
    shutil.rmtree(folder)
    assert "already finished" in cli("+stage=download", *settings(folder)).stdout


def test_archives_of_other_images_are_not_taken_for_those_of_a_run(cli: Cli, folder: Path) -> None:
    made(cli, folder)
    archives = cli.workspace / "archives/photos"
    shutil.rmtree(archives)
    cli("+stage=download", *settings(folder))  # of the same images: the same archives
    shutil.rmtree(archives)
    remove(folder)
    for _ in range(2):
        cli("+stage=download", *settings(folder), code=1)
        error = reason(cli, "download")
        assert "train.tar has other images than before" in error
        assert "set dataset.revision=NAME" in error
        assert "on a node without jpegtran" in error
    error = cli("+stage=process", *settings(folder), "process.layout=folders", code=2).stderr
    assert "has no verified train.tar" in error
    (folder / "train" / CLASSES[0] / "2.gif").unlink()  # a further change, which is taken too
    made(cli, folder, "dataset.revision=b")
    shown = json.loads(cli("datastores", "show", "photos", "--json").stdout)
    assert sorted(each["splits"]["train"] for each in shown) == [14, 16]


def test_a_version_with_the_same_settings_and_other_images_is_refused(cli: Cli, folder: Path) -> None:
    made(cli, folder)
    for name in ("archives", "datasets", "runs"):
        shutil.rmtree(cli.workspace / name)
    for stage in ("download", "process"):
        cli(f"+stage={stage}", *settings(folder))
    cli("+stage=upload", *settings(folder))  # the same images
    for name in ("archives", "datasets", "runs"):
        shutil.rmtree(cli.workspace / name)
    remove(folder)
    for stage in ("download", "process"):
        cli(f"+stage={stage}", *settings(folder))
    cli("+stage=upload", *settings(folder), code=1)
    assert "photos@v1 was made with the same settings, but of other images" in reason(cli, "upload")
