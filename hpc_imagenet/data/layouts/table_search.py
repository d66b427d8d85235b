"""Search a dataset's folder for the tables and lists that label its images or divide them into splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from posixpath import splitext

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.layouts.class_folders import descend, find_level
from hpc_imagenet.data.layouts.folder_tree import Folder
from hpc_imagenet.data.layouts.image_index import ImageIndex
from hpc_imagenet.data.layouts.label_table import TABLE_ENDINGS, Table, read_table
from hpc_imagenet.data.layouts.split_names import file_split, list_split, words_of
from hpc_imagenet.data.layouts.table_labels import (
    DamagedTableError,
    TableLabels,
    has_classes,
    is_bijection,
    read_held_out,
    read_labels,
    unmatched_splits,
)
from hpc_imagenet.errors import UserError

_OTHER_FILES = {"submission", "sample", "readme", "license", "licence", "requirements", "citation"}
_MAT_FILES = {"list", "annos"}  # of Stanford Dogs and Cars; others are features or masks, and large
_TABLES = (".csv", ".tsv", ".tab", ".jsonl")
_UNREAD = (".parquet", ".xlsx", ".xls", ".ods", ".feather", ".arrow")
_MAX_SHOWN = 60  # characters of a line in an error
_MAX_FILES, _MAX_FOLDERS, _MAX_DEPTH = 60, 30, 4  # more are one file or folder per image or class


class TableSearch:
    """The tables and lists of a dataset's folder.

    Args:
        root: the folder.
        tree: its tree.
        source: dataset.source, for errors.

    Attributes:
        files: paths of what may be tables and lists.
    """

    def __init__(self, root: Path, tree: Folder, source: str) -> None:
        self._root, self._source = root, source
        self.files = _candidates(tree, TABLE_ENDINGS)
        self._unread = _candidates(tree, _UNREAD)
        self._index: dict[tuple[tuple[str, int], ...], ImageIndex] = {}

    def index(self, folders: Sequence[Folder]) -> ImageIndex:
        """Return the index of the images of some folders."""
        key = tuple((folder.path, folder.total) for folder in folders)  # the total, as of `Folder.without`
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
            UserError: two tables differ, one is damaged, or it is ambiguous which column has the labels.
        """
        found, problem = [], None
        for path in self.files:
            if file_split(path) not in (None, split) or not path.lower().endswith(endings):
                continue
            # A table of all splits names images of each, and a bare `1.png` is not one of train and of test.
            shared = split is not None and file_split(path) is None
            index = self.index([tree] if shared else folders)
            try:
                table = read_table(self._root, path, index.__contains__)
                labels = read_labels(table, index, None if shared else split) if table else None
            except DamagedTableError as error:  # it may be the one that has the classes
                raise UserError(f"{error}, or set dataset.labels to the table of the classes") from None
            except UserError as error:
                problem = problem or error
                continue
            if labels and shared:
                paths = {path for folder in folders for path in folder.paths()}
                labels.labels = {path: name for path, name in labels.labels.items() if path in paths}
            if labels and labels.labels and labels.column is not None and not _is_count(labels):
                labels.require_splits()
                found.append(labels)
        if problem and not found:
            raise problem
        most = max((len(labels.labels) for labels in found), default=0)
        return self._only([labels for labels in found if len(labels.labels) * 2 > most], "dataset.labels")

    def lists(
        self,
        folders: Sequence[Folder],
        columns: Sequence[str],
        need_labels: bool,
        known: Collection[str],
        others: Sequence[Folder],
    ) -> dict[str, TableLabels]:
        """Return the lists of the images of each split, by the names of the lists.

        Args:
            folders: where the images are.
            columns: the columns that dataset.labels names; empty if it names none.
            need_labels: whether neither folders nor a setting give the classes.
            known: splits whose lists are not of interest.
            others: folders whose images may be listed, too, and are left out.

        Raises:
            UserError: two lists of one split differ.
        """
        index, other = self.index(folders), self.index(others)
        found: dict[str, list[TableLabels]] = {"train": [], "trainval": [], "val": [], "test": []}
        files = [(list_split(path), path) for path in self.files]
        for split, path in sorted(files, key=lambda each: list(found).index(each[0] or "test")):
            if split is None or split in known:
                continue
            try:
                table = read_table(self._root, path, lambda value: value in index or value in other)
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
            if labels:
                labels.missing = [value for value in labels.missing if value not in other]
            if labels and len(labels.labels) > len(labels.missing):
                found[split].append(labels)
        trainval = found.pop("trainval")
        found["train"] = found["train"] or trainval
        lists = {split: self._only(tables, f"dataset.splits.{split}") for split, tables in found.items()}
        return {split: labels for split, labels in lists.items() if labels}

    def more_lists(
        self,
        base: Folder,
        columns: Sequence[str],
        need_labels: bool,
        folders: Mapping[str, Sequence[Folder]],
        lists: Mapping[str, TableLabels],
    ) -> dict[str, TableLabels]:
        """Return the lists of the splits that are not known yet, without the images of those that are.

        Args:
            base: where the images are that no folder of a split has.
            columns: as for `lists`.
            need_labels: as for `lists`.
            folders: folders of splits that are known.
            lists: lists of splits that are known.

        Raises:
            UserError: two lists of one split differ.
        """
        others = [folder for several in folders.values() for folder in several]
        found = self.lists([base], columns, need_labels, {*folders, *lists}, others)
        named = {path for labels in lists.values() for path in labels.labels}
        for labels in found.values():
            labels.labels = {path: name for path, name in labels.labels.items() if path not in named}
        return {split: labels for split, labels in found.items() if labels.labels}

    def describe_unused(self, image: str) -> str:
        """Return why a table beside images is none of their classes, for an error; empty without one.

        Args:
            image: path of one of the images.
        """
        files = [path for path in self.files if not path.endswith(".mat")]
        files.sort(key=lambda path: not path.lower().endswith(_TABLES))
        if not files:
            return f"; {self._unread[0]} is not read, save it as .csv" if self._unread else ""
        with (self._root / files[0]).open(encoding="utf-8-sig", errors="replace") as file:
            lines = [file.readline(_MAX_SHOWN).strip() for _ in range(2)]
        shown = " and ".join(repr(line) for line in lines if line) or "nothing"
        return (
            f"; {files[0]} has no column of names such as {image.rpartition('/')[2]} beside one of classes, "
            f"it begins with {shown}"
        )

    def check_splits(
        self,
        train: Collection[str],
        tree: Folder,
        dataset: Dataset,
        classes: str,
        known: TableLabels | None,
        unlisted: Collection[str],
    ) -> list[str]:
        """Refuse training images that a table or list holds out; return warnings of splits that are ignored.

        Args:
            train: paths of the training images.
            tree: the whole tree.
            dataset: its settings `labels` and `splits`.
            classes: value of `labels` that takes the classes from where they are.
            known: the table of `labels`, which is not read again.
            unlisted: splits of which no list was searched, as train is a folder.

        Raises:
            UserError: no setting ignores the table or list, or its splits cannot be read.
        """
        explicit = " and ".join(f"dataset.splits.{split}" for split, path in dataset.splits.items() if path)
        warnings = list[str]()
        for path in self.files:
            own = known is not None and path == known.table.path
            problem, uses = self._held_out(path, train, tree, known if own else None, warnings)
            listed = None if own or problem else self._listed(path, train, tree, unlisted)
            if listed and dataset.labels is None:
                raise UserError(f"{listed[0]}; {listed[1]}, or set dataset.labels={classes} to ignore it")
            problem = listed[0] if listed else problem
            if not problem:
                continue
            if dataset.labels is not None and (not own or dataset.splits.get("train")):
                warnings.append(f"{problem}; it is ignored, as dataset.labels={dataset.labels}")
                continue
            ignore = f"set dataset.labels={classes}" if path != classes else "remove the column"
            if own:
                uses, ignore = [], "set dataset.splits.train"
            elif uses and classes in self.files and path != classes:
                uses = [f"add it to {classes}"]
            if uses or own:
                uses += [f"remove {explicit}"] if explicit else []
                problem = f"{problem}; {' and '.join(uses)} to use it"
            raise UserError(f"{problem}, or {ignore} to ignore it")
        return warnings

    def _held_out(
        self,
        path: str,
        train: Collection[str],
        tree: Folder,
        known: TableLabels | None,
        warnings: list[str],
    ) -> tuple[str, list[str]]:
        """Return what is wrong with the splits of a table, and what takes them; empty if nothing is wrong.

        A table whose rows name no image is added to the warnings, as it may be of something else.
        """
        index = self.index([tree])
        try:
            table = None if known else read_table(self._root, path, index.__contains__)
        except UserError:  # not a table
            return "", []
        held, problem, uses = [], "", [f"set dataset.labels={path}"]
        if known:
            held = [image for image, split in known.splits.items() if split != "train" and image in train]
        elif table:
            held, problem = read_held_out(table, index, file_split(path), train)
            if column := unmatched_splits(table, index):
                warnings.append(f"not used: {path} has splits in its column {column}, but names no image")
        if not held:
            return problem, []
        if table and not self._gives_classes(table, index, tree):
            uses.insert(0, f"add a column of classes to {path}")
        return (
            f"{path} has a column of splits, by which {len(held)} of {len(train)} training images are not "
            f"for training, such as {held[0]}",
            uses,
        )

    def _listed(
        self, path: str, train: Collection[str], tree: Folder, splits: Collection[str]
    ) -> tuple[str, str] | None:
        """Return what is wrong with a list of a split that is not used, and what takes it."""
        split, index = list_split(path), self.index([tree])
        if split is None or split not in splits:
            return None
        try:
            table = read_table(self._root, path, index.__contains__)
            labels = read_list(table, index, split, (), False) if table else None
        except UserError:  # not a list
            return None
        held = [image for image in labels.labels if image in train] if labels else []
        if not labels or not held or len(labels.labels) <= len(labels.missing):
            return None
        other = next((image for image in labels.labels if image not in train), None)
        return (
            f"{path} lists {len(held)} of {len(train)} training images for {split}, such as {held[0]}",
            f"set dataset.splits.{split}={path} to use it"
            if other is None
            else f"remove the rows of others from it, such as {other}",
        )

    def _gives_classes(self, table: Table, index: ImageIndex, tree: Folder) -> bool:
        """Whether a table has classes, or the folders of a tree give them if it is that of `labels`."""
        try:
            found = read_labels(table, index, None)
        except UserError:  # names the setting for its classes
            return True
        try:
            return bool((found and found.column is not None) or find_level(descend(tree), self._source))
        except UserError:  # the folders may be splits
            return False

    def _only(self, found: list[TableLabels], setting: str) -> TableLabels | None:
        """Return the one table, or one of several that state the same."""
        found = sorted(found, key=lambda each: (each.column is None, not each.splits))
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


def _candidates(folder: Folder, endings: tuple[str, ...], depth: int = 0) -> list[str]:
    found = []
    if len(folder.others) <= _MAX_FILES:
        prefix = f"{folder.path}/" if folder.path else ""
        for name in folder.others:
            ending, words = splitext(name.lower())[1], words_of(name)
            if ending in endings and not words & _OTHER_FILES and (ending != ".mat" or words & _MAT_FILES):
                found.append(prefix + name)
    if depth < _MAX_DEPTH and len(folder.folders) <= _MAX_FOLDERS:
        for inner in folder.folders:
            found += _candidates(inner, endings, depth + 1)
    return found


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
