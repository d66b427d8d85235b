"""Folders whose names mean splits, such as `train` and `seg_test`, and where in a tree they are."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import takewhile

from hpc_imagenet.data.layouts.class_folders import descend, is_flat
from hpc_imagenet.data.layouts.folder_tree import Folder
from hpc_imagenet.data.layouts.split_names import is_series, split_of, words_of
from hpc_imagenet.errors import UserError

_MASK_WORDS = {"mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "gt"}
_MAX_DEPTH = 3  # of folders beside others that are searched for splits


def find_splits(
    base: Folder,
    source: str,
    is_labelled: Callable[[list[Folder]], bool],
    are_classes: bool,
    skipped: Counter[str],
) -> dict[str, list[Folder]]:
    """Return split → its folders; empty if no names mean splits.

    Args:
        base: the folder that contains them.
        source: the dataset's folder, for errors.
        is_labelled: whether a table or setting labels the images of some folders.
        are_classes: whether a setting says that folders of images are classes.
        skipped: reason → number of files that are left out; is extended.

    Raises:
        UserError: several folders may be one split.
    """
    named: dict[str, list[Folder]] = {}
    others = 0
    for folder in base.filled:
        split = split_of(folder.name)
        others += split is None
        if split is not None:
            named.setdefault(split, []).append(folder)
    if others:
        if "train" not in named:
            return {}
        # Classes may be called train and plane: then train has no classes within. Beside a test without any,
        # both may be splits whose table is missing, so only a setting makes classes of them.
        flat = all(is_flat(descend(each)) for folders in named.values() for each in folders)
        if flat and (are_classes or (len(named) == 1 and not is_labelled(named["train"]))):
            return {}
    for split, folders in named.items():
        kept = [folder for folder in folders if not words_of(folder.name) & _MASK_WORDS] or folders
        skipped["mask or preview"] += sum(folder.total for folder in folders if folder not in kept)
        if not is_series(folder.name for folder in kept):
            names = " and ".join(folder.path for folder in kept[:3])
            raise UserError(
                f"{source} has {names}, and each may be {split}; set dataset.splits.{split}={kept[0].path}, "
                f"or dataset.splits.{split}={_common(kept)}* for all"
            )
        named[split] = kept
    return named


def _common(folders: list[Folder]) -> str:
    """Return the characters with which all paths begin."""
    characters = zip(*(folder.path for folder in folders), strict=False)
    return "".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, characters))


def find_base(base: Folder, source: str) -> Folder:
    """Return the folder that contains the splits: itself, or one below it that has other folders beside it.

    Raises:
        UserError: there are several.
    """
    if any(split_of(folder.name) for folder in base.filled):
        return base
    found = list(_with_splits(base, 0))
    if len(found) > 1:
        names = " and ".join(folder.path for folder in found[:3])
        raise UserError(f"{source} has splits in {names}; set dataset.source to one of these folders")
    return found[0] if found else base


def _with_splits(folder: Folder, depth: int) -> list[Folder]:
    splits = {split_of(inner.name) for inner in folder.filled}
    if "train" in splits and splits & {"val", "test"}:
        return [folder]
    if depth == _MAX_DEPTH or len(folder.filled) > 20:
        return []
    return [each for inner in folder.filled for each in _with_splits(inner, depth + 1)]


def folders_named(value: str, folders: Mapping[str, Folder]) -> list[Folder]:
    """Return the folder of a path in the dataset, or those that a pattern such as `train_*` names.

    Args:
        value: path or pattern.
        folders: all folders of the dataset by path.
    """
    path = value.removeprefix("./").strip("/")
    if path in folders:
        return [folders[path]]
    depth = path.count("/")
    return [
        folder
        for name, folder in folders.items()
        if name and name.count("/") == depth and fnmatch.fnmatchcase(name, path)
    ]


def folders_beside(used: list[Folder], tree: Folder) -> list[Folder]:
    """Return the topmost folders of a tree that neither are nor contain the used ones."""
    paths = [folder.path for folder in used]
    if tree.path in paths:
        return []
    if any(path.startswith(f"{tree.path}/" if tree.path else "") for path in paths):
        return [each for inner in tree.folders for each in folders_beside(used, inner)]
    return [tree]
