"""Search a folder for the splits and classes of its images: by folders, lists, tables and settings."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from posixpath import splitext

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.layouts import class_folders
from hpc_imagenet.data.layouts.class_folders import WHOLE_PATH, class_of, descend, is_flat
from hpc_imagenet.data.layouts.completed_splits import Labels
from hpc_imagenet.data.layouts.folder_tree import Folder, scan_folder
from hpc_imagenet.data.layouts.joined_tables import read_joined
from hpc_imagenet.data.layouts.split_folders import find_base, find_splits, folders_beside, folders_named
from hpc_imagenet.data.layouts.split_names import SPLITS, split_of
from hpc_imagenet.data.layouts.table_labels import TableLabels, joined_classes, names_for_numbers, read_labels
from hpc_imagenet.data.layouts.table_search import TableSearch, read_list
from hpc_imagenet.errors import UserError, did_you_mean

_BEFORE_NUMBER = r"(.*?)[\s._-]*[0-9]+\D*$"  # dataset.labels=filename: `cat` in cat_12 and cat (12)


class LayoutSearch:
    """One search.

    Args:
        root: the dataset's folder.
        dataset: the settings that decide where the layout is ambiguous.
        threads: number of folders listed at a time.

    Attributes:
        source: the dataset's folder, for errors.
        skipped: reason → number of files that are left out.
        warnings: what the user should know.
        empty: class folders without images.
        how: how classes and splits were found.
    """

    def __init__(self, root: Path, dataset: Dataset, threads: int) -> None:
        self.source = str(root)
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.empty: list[Folder] = []
        self.how = ""
        self._root, self._dataset = root, dataset
        self._tree = scan_folder(root, threads, self.skipped)
        self._folders = {folder.path: folder for folder in self._tree.walk()}
        self._tables = TableSearch(root, self._tree, self.source)
        self._left: Counter[str] = Counter()  # as `skipped`, of the images of the tree
        self._samples: dict[str, Labels] = {split: {} for split in SPLITS}
        self._train_table: Labels = {}  # training images whose class is from a table
        self._train_path = ""  # of that table
        self._train_level: int | None = None
        self._train_names: set[str] = set()  # of the folders beside the class folders of train
        self._unlisted: set[str] = set()  # splits of which lists may hold images of a folder train out
        # At most one of these is set, by dataset.labels.
        self._level: int | None = None
        self._pattern: re.Pattern[str] | None = None
        self._table: TableLabels | None = None
        self._columns: list[str] = []  # of the table of dataset.labels

    def run(self) -> dict[str, Labels]:
        """Return the images of each split with their classes.

        Raises:
            UserError: what was found is ambiguous or incomplete, and which setting decides.
        """
        if self._dataset.labels is not None:
            self._read_labels_setting(self._dataset.labels)
        self._assign({split: path for split, path in self._dataset.splits.items() if path})
        level = "path" if self._train_level == WHOLE_PATH else self._train_level or 1
        classes = self._train_path or f"folder:{level}"
        train = self._samples["train"]
        self.warnings += self._tables.check_splits(
            train, self._tree, self._dataset, classes, self._table, self._unlisted
        )
        self.warnings += joined_classes(self._train_table.values())
        self._name_numbers()
        rest = self._tree.total - sum(map(len, self._samples.values())) - self._left.total()
        self._left["beside the splits and classes"] += rest
        self.skipped += self._left
        return self._samples

    def _read_labels_setting(self, value: str) -> None:
        kind, _, rest = value.partition(":")
        if kind == "folder":
            if rest != "path" and not re.fullmatch("[1-9]", rest):
                raise UserError(f"dataset.labels={value} is not folder:1, folder:2 … or folder:path")
            self._level = WHOLE_PATH if rest == "path" else int(rest)
        elif kind == "filename":
            try:
                self._pattern = re.compile(rest or _BEFORE_NUMBER)
            except re.error as error:
                raise UserError(f"dataset.labels={value}: {error} in the regular expression") from None
            if self._pattern.groups < 1:
                raise UserError(f"dataset.labels={value} needs a group for the class: filename:([a-z]+)")
        else:
            self._table = self._read_label_file(value)

    def _read_label_file(self, value: str) -> TableLabels:
        path, columns = value, list[str]()
        while not os.path.isfile(self._root / path):  # noqa: PTH113 - Path.is_file refuses long names
            path, colon, column = path.rpartition(":")
            if not colon:
                meant = did_you_mean(value, self._tables.files[:200])
                raise UserError(f"dataset.labels={value}: no such file in {self.source}{meant}")
            columns.insert(0, column)
        table, index = self._tables.read(path, self._tree, "dataset.labels")
        labels = read_labels(table, index, split_of(table.stem), columns)
        if labels is not None and labels.problem:
            labels.require_splits(columns)
            self.warnings.append(f"{labels.problem}; it is ignored, as dataset.labels={value}")
        if labels is None or (labels.column is None and not labels.splits):
            raise UserError(f"dataset.labels={value}: no column names the images and another the classes")
        self._columns = columns or ([labels.column] if labels.column is not None else [])
        return self._complete(labels)

    # Which images are in which split.

    def _assign(self, explicit: dict[str, str]) -> None:
        folders: dict[str, list[Folder]] = {}
        lists: dict[str, TableLabels] = {}
        for split, value in explicit.items():
            if found := folders_named(value, self._folders):
                folders[split] = found
            else:
                lists[split] = self._list_named(split, value)
        taken = [folder for found in folders.values() for folder in found]
        base = descend(self._tree.without(taken), above_splits=bool(taken))
        if not explicit and self._dataset.labels is None and (joined := read_joined(self._root, self._tree)):
            self._table = read_labels(joined, self._tables.index([self._tree]), None)
        if not explicit and self._table and self._table.splits:
            return self._assign_table(self._table)
        if "train" not in lists:
            more = self._more_split_folders(base, folders, lists)
            if more and "train" not in {*more, *folders}:
                seen = " and ".join(folder.path for found in more.values() for folder in found)
                raise UserError(f"{self.source} has {seen}, but no train; set dataset.splits.train=FOLDER")
            folders |= more
        if not folders and not lists:
            # With another setting training would be on all splits.
            by_folder = self._dataset.labels is None or self._level == 1
            if by_folder and class_folders.splits_in_classes(base):
                return self._assign_splits_in_classes(base)
        if "train" in folders:
            self._unlisted = {"val", "test"} - {*folders, *lists}
        elif "train" not in lists:  # it is what the other splits leave, so lists of these are needed
            need_labels = not self._has_level(base)
            lists |= self._tables.more_lists(base, self._columns, need_labels, folders, lists)
        pool: Labels = {}  # the images outside of folders of splits
        if not {"train"} & {*folders, *lists} and base.total:
            if self._dataset.labels is None:
                own = [lists[split].labels for split in lists if split in explicit]
                class_folders.require_classes(base, self.source, set[str]().union(*own))
            pool = self._label_folders("train", [base], True, pool=True)
            if self._dataset.labels is not None and self._level != 1:
                unlisted = pool.keys() - {path for each in lists.values() for path in each.labels}
                class_folders.require_train(base, unlisted, self.source, self._dataset.labels)
        for split in SPLITS:
            if split in folders:
                self._samples[split] |= self._label_folders(split, folders[split], split in explicit)
            elif split in lists:
                known = self._samples["train"] if "train" in folders else {}
                if not known.keys() & lists[split].labels.keys():
                    remaining = base.without([folder for found in folders.values() for folder in found])
                    known = pool = pool or self._label_pool(descend(remaining), lists[split])
                self._samples[split] = self._label_list(split, lists[split], known, split in explicit)
        if "train" not in lists:
            others = () if "train" in folders else self._samples.values()
            listed = {path for labels in lists.values() for path in labels.labels}.union(*others)
            rest = self._samples["train"] if "train" in folders else pool
            self._samples["train"] = {path: name for path, name in rest.items() if path not in listed}
        kinds = [kind for kind, found in (("folders", folders), ("lists", lists)) if found]
        self.how += f", splits by {' and '.join(kinds)}" if kinds else ""
        return None

    def _list_named(self, split: str, value: str) -> TableLabels:
        setting = f"dataset.splits.{split}"
        if not os.path.isfile(self._root / value):  # noqa: PTH113
            names = [folder.path for folder in self._tree.walk()][1:200]
            raise UserError(
                f"{setting}={value}: no such folder or list in {self.source}{did_you_mean(value, names)}"
            )
        table, index = self._tables.read(value, self._tree, setting)
        labels = read_list(table, index, split, self._columns, self._dataset.labels is None)
        if labels is None:
            raise UserError(f"{setting}={value}: no column of it names an image of {self.source}")
        return labels

    def _more_split_folders(
        self, base: Folder, known: dict[str, list[Folder]], lists: Collection[str]
    ) -> dict[str, list[Folder]]:
        if self._level is None and not class_folders.splits_in_classes(base):
            base = find_base(base, self.source)

        def is_labelled(folders: list[Folder]) -> bool:
            if self._dataset.labels is not None:
                return True
            return self._tables.labels_for("train", folders, self._tree) is not None

        found = find_splits(base, self.source, is_labelled, self._level in (1, WHOLE_PATH), self._left)
        found = {split: folders for split, folders in found.items() if split not in {*known, *lists}}
        used = [folder for folders in (*found.values(), *known.values()) for folder in folders]
        if found and "train" in {*found, *known} and not lists:
            others = [folder for folder in folders_beside(used, self._tree) if folder.total]
            if others:
                names = ", ".join(folder.path for folder in others[:4])
                splits = ", ".join(folder.path for folder in used)
                self.warnings.append(f"not used: {names}; the splits are {splits}")
        return found

    def _assign_table(self, table: TableLabels) -> None:
        level = None
        base = descend(self._tree)
        for path, label in self._complete(table).labels.items():
            if label is None:
                level = level or class_folders.find_level(base, self.source)
                label = class_of(path, base, level)
            if label:
                self._samples[table.splits.get(path, "train")][path] = label
        self._train_table = dict(self._samples["train"]) if table.column is not None else {}
        self._left[f"not in {table.table.path}"] += self._tree.total - len(table.labels)
        self.how = f"classes and splits of {table.table.path}"

    def _assign_splits_in_classes(self, base: Folder) -> None:
        for each in base.filled:
            for inner in each.filled:
                self._samples[str(split_of(inner.name))].update((path, each.name) for path in inner.paths())
        self.how = "class folders with folders of splits"

    # Which class an image has.

    def _has_level(self, base: Folder) -> bool:
        """Whether folders, or a setting, give the classes."""
        if self._dataset.labels is not None or is_flat(base):
            return self._dataset.labels is not None
        try:
            return bool(class_folders.find_level(base, self.source))
        except UserError:
            return False

    def _label_pool(self, base: Folder, listed: TableLabels) -> Labels:
        """Return the classes of all images, for a list without classes; empty if nothing gives them."""
        by_folders = self._dataset.labels is not None or not is_flat(base)
        if listed.column is None and (by_folders or self._tables.labels_for(None, [base], self._tree)):
            return self._label_folders("train", [base], False, pool=True)
        return {}

    def _label_list(self, split: str, listed: TableLabels, pool: Labels, explicit: bool) -> Labels:
        self._complete(listed)
        if listed.column is not None and not listed.only_renames(pool):
            listed.require_splits(self._columns)
            self.how = self.how or f"classes of {listed.where}"
            labels = {path: label for path, label in listed.labels.items() if label}
            if split == "train":
                self._train_table, self._train_path = dict(labels), listed.table.path
            return labels
        labels = {path: pool[path] for path in listed.labels if path in pool}
        if len(labels) < len(listed.labels):
            if labels or explicit or split != "test":
                path = next(path for path in listed.labels if path not in labels)
                raise UserError(f"{listed.table.path}: {path} has no class; set dataset.labels=TABLE")
            self._skip_test(listed.table.path, len(listed.labels))
        return labels

    def _label_folders(self, split: str, folders: list[Folder], explicit: bool, pool: bool = False) -> Labels:
        """Return the classes of all images of some folders.

        Args:
            split: of the images.
            folders: where they are.
            explicit: whether a setting names them, so that they must have classes.
            pool: whether they are the images of all splits.
        """
        if self._pattern or self._table:
            return self._label_by_rule(split, folders, explicit)
        found = [descend(folder, self._train_names) for folder in folders]
        known = any(inner.name in self._train_names for folder in found for inner in folder.filled)
        if self._level is None and not known and all(map(is_flat, found)):
            alone = found[0].name if len(found) == 1 and (pool or found[0] is not folders[0]) else ""
            return self._label_by_table(split, found, explicit, pool, alone)
        labels: Labels = {}
        for folder in found:
            level = self._level or self._train_level or class_folders.find_level(folder, self.source)
            if split == "train":
                self._train_level = level
                self._train_names.update(inner.name for inner in folder.folders)
                self.empty += class_folders.empty_classes(folder, level, pool)
            for path in folder.paths():
                if name := class_of(path, folder, level):
                    labels[path] = name
        if not labels:
            where = f"{self.source}/{folders[0].path}".rstrip("/")
            raise UserError(f"dataset.labels={self._dataset.labels}: {where} has fewer levels of folders")
        if split == "train" and self._dataset.labels is None:
            self._compare_with_tables(labels, folders, level)
        self.how = self.how or "class folders"
        return labels

    def _compare_with_tables(self, labels: Labels, folders: list[Folder], level: int) -> None:
        """Refuse folders that divide the images in another way than a table's column of classes."""
        table = self._tables.second_labels(folders, self._tree)
        if table is None:
            return
        pairs = [(name, other) for path, name in labels.items() if (other := table.labels.get(path))]
        ours, theirs = ({pair[place] for pair in pairs} for place in (0, 1))
        if len(pairs) * 2 <= len(labels) or not 1 < len(theirs) <= len(pairs) / 2:
            return  # a table of few images, or a column that describes single images
        if len(set(pairs)) > max(len(ours), len(theirs)):  # neither divides the groups of the other
            first, second = pairs[0]
            depth = "path" if level == WHOLE_PATH else level
            raise UserError(
                f"{self.source}: the class may be the folder, such as {first}, or that of {table.where}, "
                f"such as {second}; set dataset.labels=folder:{depth}, or "
                f"dataset.labels='{table.table.path}:{table.column}'"
            )
        if ours != theirs and not all(name.isdecimal() for name in theirs):
            self.warnings.append(
                f"{table.where} is not used, as the folders are the classes; "
                f"dataset.labels='{table.table.path}:{table.column}' takes it"
            )

    def _label_by_rule(self, split: str, folders: list[Folder], explicit: bool) -> Labels:
        labels: Labels = {}
        table = self._table
        reason = f"not in {table.table.path}" if table else "no class in the file name"
        for path in (path for folder in folders for path in folder.paths()):
            name = table.labels.get(path) if table else self._class_in_name(path)
            if name:
                labels[path] = name
            else:
                self._left[reason] += 1
        if not labels and (explicit or split != "test"):
            other = f"; set dataset.splits.{split} to the table of its classes" if table else ""
            raise UserError(
                f"dataset.labels={self._dataset.labels} gives no image of {split} a class, such as "
                f"{next(folders[0].paths())}{other}"
            )
        self.how = f"classes of {table.where}" if table else "classes in file names"
        if split == "train" and table:
            self._train_table = dict(labels)
        return labels

    def _class_in_name(self, path: str) -> str | None:
        assert self._pattern
        match = self._pattern.match(splitext(path.rpartition("/")[2])[0])
        return match[1] if match else None

    def _label_by_table(
        self, split: str, folders: list[Folder], explicit: bool, pool: bool, alone: str
    ) -> Labels:
        """Return the classes of images without class folders; `alone` is the name of their one folder."""
        found = self._tables.labels_for(None if pool else split, folders, self._tree)
        total = sum(folder.total for folder in folders)
        if found is None:
            if split == "test" and not explicit:
                self._skip_test(folders[0].path, total)
                return {}
            path = next(folders[0].paths(), folders[0].path)
            beside = self._folders[folders[0].path.rpartition("/")[0]].filled if split == "train" else []
            unused = self._tables.describe_unused(path)
            raise class_folders.unlabelled(folders[0], path, alone, beside, self.source, unused)
        self._complete(found)
        labels = {path: label for path, label in found.labels.items() if label}
        self._left[f"not in {found.table.path}"] += total - len(found.labels)
        self._left[f"no class in {found.table.path}"] += len(found.labels) - len(labels)
        self.how = self.how or f"classes of {found.where}"
        if split == "train":
            self._train_table, self._train_path = dict(labels), found.table.path
        if pool and found.splits:
            self.how = f"classes and splits of {found.table.path}"
            for path in [path for path in labels if found.splits[path] != "train"]:
                self._samples[found.splits[path]][path] = labels.pop(path)
        return labels

    def _skip_test(self, where: str, count: int) -> None:
        self._left["test image without a class"] += count
        self.warnings.append(f"{where}: the images of test have no class, so they are not used")

    def _complete(self, found: TableLabels) -> TableLabels:
        if found.missing:
            raise UserError(
                f"{found.table.path} lists {len(found.table.rows)} images, but {len(found.missing)} of them "
                f"are not in {self.source}, such as {found.missing[0]}; add them, or remove their lines"
            )
        return found

    def _name_numbers(self) -> None:
        """Replace numbers as labels by the names that folders or file names show."""
        base = descend(self._tree)
        names = names_for_numbers(self._train_table, lambda path: class_of(path, base, WHOLE_PATH) or "")
        if names:
            for labels in self._samples.values():
                labels.update({path: names.get(label, label) for path, label in labels.items()})
