"""Search a dataset's folder for the tables and lists that label its images or divide them into splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from posixpath import splitext

from hpc_imagenet.data.layouts.folder_tree import Folder
from hpc_imagenet.data.layouts.image_index import ImageIndex
from hpc_imagenet.data.layouts.label_table import TABLE_ENDINGS, Table, read_table
from hpc_imagenet.data.layouts.split_names import is_trainval, split_of, words_of
from hpc_imagenet.data.layouts.table_labels import TableLabels, has_classes, is_bijection, read_labels
from hpc_imagenet.errors import UserError

_OTHER_FILES = {"submission", "sample", "readme", "license", "licence", "requirements", "citation"}
_MAT_FILES = {"list", "annos"}  # of Stanford Dogs and Cars; others are features or masks, and large
_TABLES = (".csv", ".tsv", ".tab", ".jsonl")
_MAX_FILES, _MAX_FOLDERS, _MAX_DEPTH = 60, 30, 4  # more are one file or folder per image or class


class TableSearch:
    """The tables and lists of a dataset's folder.

    Args:
        root: the folder.
        tree: its tree.
        source: dataset.source, for errors.
    """

    def __init__(self, root: Path, tree: Folder, source: str) -> None:
        self._root, self._source = root, source
        self._files = list(_candidates(tree, 0))
        self._index: dict[tuple[str, ...], ImageIndex] = {}

    def index(self, folders: Sequence[Folder]) -> ImageIndex:
        """Return the index of the images of some folders."""
        key = tuple(folder.path for folder in folders)
        if key not in self._index:
            paths = (path for folder in folders for path in folder.paths())
            self._index[key] = ImageIndex(paths, self._root.resolve().name)
        return self._index[key]

    def read(self, path: str, tree: Folder, setting: str) -> tuple[Table, ImageIndex]:
        """Return a table that a setting names.

        Raises:
            UserError: it is no table of images of this folder.
        """
        index = self.index([tree])
        table = read_table(self._root, path, index.__contains__)
        if table is None:
            raise UserError(f"{setting}={path}: no line of it names an image of {self._source}")
        return table, index

    def second_labels(self, folders: Sequence[Folder], tree: Folder) -> TableLabels | None:
        """Return a table with classes of training images that are in class folders; None if there is none.

        It has a column with a usual header of classes, or one of words beside that of the images. Lists, and
        annotations in JSON or MATLAB files, are not read.

        Args:
            folders: where the images are.
            tree: the whole tree.
        """
        try:
            found = self.labels_for("train", folders, tree, _TABLES)
        except UserError:  # several tables or columns, so none has the classes
            return None
        return found if found and has_classes(found) else None

    def labels_for(
        self,
        split: str | None,
        folders: Sequence[Folder],
        tree: Folder,
        endings: tuple[str, ...] = TABLE_ENDINGS,
    ) -> TableLabels | None:
        """Return the table that labels the images of a split; None if there is none.

        Args:
            split: train, val or test; None for all images.
            folders: where its images are.
            tree: the whole tree.
            endings: of the files that are read.

        Raises:
            UserError: two tables differ, or it is ambiguous which column has the labels.
        """
        found, problem = [], None
        for path in self._files:
            if _file_split(path) not in (None, split) or not path.lower().endswith(endings):
                continue
            # A table of all splits names images of each, and a bare `1.png` is not one of train and of test.
            shared = split is not None and _file_split(path) is None
            index = self.index([tree] if shared else folders)
            try:
                table = read_table(self._root, path, index.__contains__)
                labels = read_labels(table, index, None if shared else split) if table else None
            except UserError as error:
                problem = problem or error
                continue
            if labels and shared:
                paths = {path for folder in folders for path in folder.paths()}
                labels.labels = {path: name for path, name in labels.labels.items() if path in paths}
            if labels and labels.labels and labels.column is not None and not _is_count(labels):
                found.append(labels)
        if problem and not found:
            raise problem
        most = max((len(labels.labels) for labels in found), default=0)
        return self._only([labels for labels in found if len(labels.labels) * 2 > most], "dataset.labels")

    def lists(
        self, folders: Sequence[Folder], columns: Sequence[str], need_labels: bool
    ) -> dict[str, TableLabels]:
        """Return the lists of the images of each split, by the names of the lists.

        Args:
            folders: where the images are.
            columns: the columns that dataset.labels names; empty if it names none.
            need_labels: whether neither folders nor a setting give the classes.

        Raises:
            UserError: two lists of one split differ.
        """
        found: dict[str, list[TableLabels]] = {"train": [], "trainval": [], "val": [], "test": []}
        files = [(_list_split(path), path) for path in self._files]
        for split, path in sorted(files, key=lambda each: list(found).index(each[0] or "test")):
            if split is None:
                continue
            index = self.index(folders)
            try:
                table = read_table(self._root, path, index.__contains__)
            except UserError:  # not a list
                continue
            if table is None:
                continue
            name = "train" if split == "trainval" else split
            train = found["train"] or found["trainval"]
            if need_labels and train and split != "train":  # the column that the list of train has
                column, same = train[0].column, train[0].table.header == table.header
                labels = read_list(table, index, name, [column] if column else [], same)
            else:
                labels = read_list(table, index, name, columns, need_labels)
            if labels and len(labels.labels) > len(labels.missing):
                found[split].append(labels)
        trainval = found.pop("trainval")
        found["train"] = found["train"] or trainval
        lists = {split: self._only(tables, f"dataset.splits.{split}") for split, tables in found.items()}
        return {split: labels for split, labels in lists.items() if labels}

    def _only(self, found: list[TableLabels], setting: str) -> TableLabels | None:
        """Return the one table, or one of several that state the same."""
        found = sorted(found, key=lambda each: each.column is None)
        for other in found[1:]:
            first = found[0]
            same = first.labels.keys() == other.labels.keys()
            if same and other.column is not None:
                same = is_bijection(
                    [str(first.labels[path]) for path in first.labels],
                    [str(other.labels[path]) for path in first.labels],
                )
            if not same:
                raise UserError(
                    f"{self._source} has {first.table.path} and {other.table.path}, which differ; set "
                    f"{setting}={first.table.path}, or the other one"
                )
        return found[0] if found else None


def _is_count(labels: TableLabels) -> bool:
    """Whether the column of labels only numbers the images."""
    names = set(labels.labels.values())
    return len(names) == len(labels.labels) > 10 and all(name and name.isdecimal() for name in names)


def _candidates(folder: Folder, depth: int) -> list[str]:
    found = []
    if len(folder.others) <= _MAX_FILES:
        prefix = f"{folder.path}/" if folder.path else ""
        for name in folder.others:
            ending, words = splitext(name.lower())[1], words_of(name)
            if (
                ending in TABLE_ENDINGS
                and not words & _OTHER_FILES
                and (ending != ".mat" or words & _MAT_FILES)
            ):
                found.append(prefix + name)
    if depth < _MAX_DEPTH and len(folder.folders) <= _MAX_FOLDERS:
        for inner in folder.folders:
            found += _candidates(inner, depth + 1)
    return found


def _file_split(path: str) -> str | None:
    """Return the split that the name of a table, or of a folder that contains it, means."""
    *folders, name = path.split("/")
    if is_trainval(splitext(name)[0]):
        return "train"
    return next(
        (split for part in (splitext(name)[0], *reversed(folders)) if (split := split_of(part))), None
    )


def _list_split(path: str) -> str | None:
    """Return the split of a list by its name: train, val, test, or trainval for both."""
    return "trainval" if is_trainval(splitext(path.rpartition("/")[2])[0]) else _file_split(path)


def read_list(
    table: Table, index: ImageIndex, split: str, columns: Sequence[str], need_labels: bool
) -> TableLabels | None:
    """Return a list of the images of a split; None if no column names images.

    Args:
        table: the list.
        index: the images.
        split: train, val or test.
        columns: the columns to use, if it has them.
        need_labels: whether its classes are of interest if it does not have these columns.
    """
    if columns and set(columns) <= set(table.header):
        return read_labels(table, index, split, columns)
    return read_labels(table, index, split, unlabelled=not need_labels)
