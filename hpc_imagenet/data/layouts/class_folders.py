"""Class folders: which folder of an image's path is its class."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hpc_imagenet.data.layouts.folder_tree import IMAGE_FOLDERS, Folder, foreign_photos
from hpc_imagenet.data.layouts.split_names import is_series_of_parts, is_split, split_of
from hpc_imagenet.errors import UserError

# A level is the depth of the class folders: 1 for the folders of the folder that is searched, 2 for those in
# them …; or this: the class is the whole path of folders.
WHOLE_PATH = -1


def descend(folder: Folder, classes: Collection[str] = (), above_splits: bool = False) -> Folder:
    """Return the folder that has the class folders, or the images of a split: within folders of one folder.

    Args:
        folder: where the search begins.
        classes: names of class folders that are known already: the search ends above them.
        above_splits: whether the search ends above a folder with the name of a split.
    """
    while True:
        inner = [each for each in folder.folders if each.total or each.is_empty]
        below = folder.total - len(folder.images)
        if len(folder.images) >= below or any(each.name in classes for each in inner):
            return folder
        filled = [each for each in inner if each.total]
        if above_splits and any(split_of(each.name) for each in filled):
            return folder
        # Beside one folder with folders of images, empty folders are no classes.
        if len(filled) != 1 or (len(inner) > 1 and filled[0].images):
            return folder
        folder = filled[0]


def is_flat(folder: Folder) -> bool:
    """Whether the images of a folder are not in class folders."""
    if len(folder.images) * 2 >= folder.total:
        return True
    return is_series_of_parts([each.name for each in folder.filled])


def find_level(folder: Folder, source: str) -> int:
    """Return the level of the class folders: 1, 2 … or `WHOLE_PATH`.

    Args:
        folder: the folder that is searched.
        source: dataset.source, for errors.

    Raises:
        UserError: it is ambiguous.
    """
    filled = folder.filled
    inner = {each.name: [name.name for name in each.filled] for each in filled}
    without = [each for each in filled if not each.images and len(inner[each.name]) > 1]
    if any(each.images for each in filled) and not without:
        return 1
    names = {name for names in inner.values() for name in names}
    if all(name.lower() in IMAGE_FOLDERS for name in names):
        return 1
    if all(len(names) == 1 for names in inner.values()) and (
        len(names) == 1 or all(names == [name] for name, names in inner.items())
    ):
        return 1
    if len(filled) > 2 and all(_is_initial(letter, name) for letter in inner for name in inner[letter]):
        return WHOLE_PATH  # alphabetical, as SUN397
    example = (without or filled)[0]
    within = inner[example.name][0]
    raise UserError(
        f"{source}/{example.path} has folders of images, such as {within}; set dataset.labels=folder:1 if "
        f"the class is {example.name}, dataset.labels=folder:2 if it is {within}, or "
        f"dataset.splits.train={example.path} if its folders are all classes"
    )


def _is_initial(letter: str, name: str) -> bool:
    return len(letter) == 1 and letter.isalpha() and name[:1].lower() == letter.lower()


def splits_in_classes(folder: Folder) -> bool:
    """Whether each class folder has folders of its splits, as `cat/train` and `cat/val`."""
    names = {inner.name for each in folder.filled for inner in each.filled}
    below = all(not each.images for each in folder.filled)
    flat = all(is_flat(inner) for each in folder.filled for inner in each.filled)
    return below and flat and len(names) > 1 and all(split_of(name) for name in names)


def class_of(path: str, folder: Folder, level: int) -> str | None:
    """Return the class of an image by its path; None if the path has too few folders.

    Args:
        path: of the image, relative to the dataset's folder.
        folder: the folder with the class folders.
        level: their level.
    """
    folders = path[len(folder.path) :].strip("/").split("/")[:-1]
    if level == WHOLE_PATH:
        while folders and folders[-1].lower() in IMAGE_FOLDERS:
            folders.pop()
        if len(folders) > 1 and _is_initial(folders[0], folders[1]):
            folders = folders[1:]
        return "/".join(folders) or None
    return folders[level - 1] if len(folders) >= level else None


def empty_classes(folder: Folder, level: int, pool: bool) -> Iterator[Folder]:
    """Yield class folders without images that Pillow decodes.

    Args:
        folder: the folder with the class folders.
        level: their level.
        pool: whether it is the dataset's folder, so that folders without any photos are no class folders.
    """
    level_folders = [folder]
    for _ in range(level):
        level_folders = [inner for each in level_folders for inner in each.folders]
    if level != WHOLE_PATH:
        for each in level_folders:
            if not each.total and (not pool or each.is_empty or foreign_photos(each)):
                yield each


def require_classes(folder: Folder, source: str, listed: Collection[str]) -> None:
    """Require that no folder beside class folders may be a split, as `test` beside `cat` and `dog`.

    Args:
        folder: the folder with the class folders.
        source: dataset.source, for errors.
        listed: paths of images in lists that a setting names.

    Raises:
        UserError: one may be.
    """
    held_out = [each for each in _held_out(folder) if not all(path in listed for path in each.paths())]
    classes = [
        each.name
        for each in folder.filled
        if each not in held_out
        and (each.images or all(inner.name.lower() in IMAGE_FOLDERS for inner in each.filled))
    ]
    for each in held_out:
        split = split_of(each.name)
        if len(classes) > 1:  # a split would leave one class only
            table = " with a table of their classes" if is_flat(each) else ""
            raise UserError(
                f"{source}/{each.path} is beside {classes[0]} and {classes[1]}, and may be a class or have "
                f"images of {split}; set dataset.labels=folder:1 if it is a class, or "
                f"dataset.splits.{split}={each.path}{table}, or move it out of {source}"
            )


def require_train(folder: Folder, paths: Collection[str], source: str, labels: str) -> None:
    """Require that no training images are in a folder `val` or `test`, where a setting gives the classes.

    Args:
        folder: where the training images are.
        paths: of the training images.
        source: dataset.source, for errors.
        labels: the setting, dataset.labels.

    Raises:
        UserError: some are.
    """
    for each in _held_out(folder):
        if any(path in paths for path in each.paths()):
            # The levels of the other folders may be counted from another folder without it.
            remove = " and remove dataset.labels" if labels.startswith("folder:") else ""
            raise UserError(
                f"{source}/{each.path} may have images of {split_of(each.name)}, but dataset.labels={labels} "
                f"takes them for train; set dataset.splits.{split_of(each.name)}={each.path}{remove}, or "
                f"move it out of {source}"
            )


def _held_out(folder: Folder) -> list[Folder]:
    return [each for each in folder.filled if is_split(each.name) and split_of(each.name) != "train"]


def unlabelled(
    folder: Folder, path: str, alone: str, beside: list[Folder], source: str, unused: str
) -> UserError:
    """Return the error of images that are in no class folder and in no table.

    Args:
        folder: where they are.
        path: of one of them.
        alone: name of their one folder, if it may be a class.
        beside: if it is that of train, the folder and those beside it.
        source: dataset.source.
        unused: why a table is not theirs.
    """
    if alone and alone.lower() not in IMAGE_FOLDERS and not split_of(alone):
        where = f"{source}/{folder.path}".removesuffix(alone).rstrip("/")
        return UserError(
            f"{where} has one class folder only, {alone}; a class needs others beside it, unless "
            "dataset.labels=TABLE or, for names such as cat_1.jpg, dataset.labels=filename gives the "
            f"classes{unused}"
        )
    if parts := [each.name for each in folder.filled]:
        return UserError(
            f"{source}: {parts[0]} … {parts[-1]} may be classes, or parts of one set without a "
            f"table of classes; set dataset.labels=folder:1 or dataset.labels=TABLE{unused}"
        )
    if split_of(folder.name) and not all(split_of(each.name) for each in beside):
        unused = f", or dataset.labels=folder:1 if {folder.name} is a class{unused}"
    return UserError(
        f"{source}/{path} is in no class folder, and no table gives its class; set "
        "dataset.labels=TABLE, or dataset.labels=filename if names such as cat_1.jpg begin with it"
        f"{unused}"
    )
