"""Published datasets whose labels and splits are in several files: CUB-200, NABirds, Flowers-102."""

from __future__ import annotations

from pathlib import Path

from hpc_imagenet.data.layouts.folder_tree import Folder
from hpc_imagenet.data.layouts.label_table import Table, load_mat, read_text
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.mat_file import flat

_CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
_FLOWERS = ("imagelabels.mat", "setid.mat")


def read_joined(root: Path, tree: Folder) -> Table | None:
    """Return path, label and split of every image of such a dataset; None if the folder has none.

    Raises:
        UserError: a file is a link to a missing one, or a MATLAB file cannot be read.
    """
    for folder in tree.walk():
        if set(_CUB) <= set(folder.others):
            return _read_cub(root, folder.path)
        if set(_FLOWERS) <= set(folder.others):
            return _read_flowers(root, folder.path)
    return None


def _read_cub(root: Path, folder: str) -> Table:
    # Each line is an id and a value; classes.txt has the names of the classes, which NABirds repeats.
    paths, labels, training, names = (
        dict(
            [*line.split(maxsplit=1), ""][:2]
            for line in read_text(root / folder / file).split("\n")
            if line.strip()
        )
        for file in _CUB
    )
    used = {label: names.get(label, label) for label in set(labels.values())}
    if len(set(used.values())) < len(used):
        used = {label: label for label in used}
    rows = [
        [path, used[labels[key]], "train" if training[key].strip() == "1" else "test"]
        for key, path in paths.items()
        if key in labels and key in training
    ]
    return Table(f"{folder}/images.txt".lstrip("/"), ["file", "label", "split"], rows)


def _read_flowers(root: Path, folder: str) -> Table:
    try:
        labels = flat(load_mat(root / folder / "imagelabels.mat")["labels"])
        sets = load_mat(root / folder / "setid.mat")
        rows = [
            [f"image_{number:05d}", str(labels[number - 1]), split]
            for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
            for number in map(int, flat(sets[key]))
        ]
    except (KeyError, IndexError, ValueError, TypeError, OverflowError):
        raise UserError(
            f"{root / folder}: imagelabels.mat and setid.mat do not match; fetch them again"
        ) from None
    return Table(f"{folder}/imagelabels.mat".lstrip("/"), ["file", "label", "split"], rows)
