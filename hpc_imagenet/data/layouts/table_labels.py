"""Labels and splits of images as a table states them: its columns, and the images that its rows name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from posixpath import splitext

from hpc_imagenet.data.layouts.image_index import ImageIndex, ambiguity, is_elsewhere, rank_folders
from hpc_imagenet.data.layouts.label_table import (
    IMAGE_HEADERS,
    LABEL_HEADERS,
    SPLIT_HEADERS,
    Table,
    plain,
)
from hpc_imagenet.data.layouts.split_names import SPLITS, is_split, split_of
from hpc_imagenet.errors import UserError, did_you_mean

_ONE = "only datasets with one class per image are supported"
_SAMPLE = 50  # rows that decide which column names the images
_NUMBER = re.compile(r"[+-]?[0-9]*[.,]?[0-9]*")
_MAYBE_SPLIT_HEADERS = ("set", "phase", "dataset", "usage", "group")
_MAX_SPLITS = 6  # values of a column of splits that has another header


class DamagedTableError(UserError):
    """A table has rows that were cut or filled up."""


@dataclass
class TableLabels:
    """What a table states about images.

    Attributes:
        table: the table.
        labels: path → label; None as label if the table has none.
        splits: path → split, if the table has a column of splits.
        image: name of the column of images.
        column: name of the column of labels; None if there is none, "" if there is one per class.
        missing: values that name no image.
        problem: why its splits are not known, so that `splits` is empty; empty if they are, or it has none.
    """

    table: Table
    labels: dict[str, str | None]
    splits: dict[str, str]
    image: str
    column: str | None
    missing: list[str]
    problem: str = ""

    @property
    def where(self) -> str:
        """Where its labels are, for the log."""
        named = self.column and not self.column.isdecimal()
        return f"{self.table.path}, column {self.column}" if named else self.table.path

    def only_renames(self, classes: Mapping[str, str]) -> bool:
        """Whether its labels divide its images as known classes do, such as numbers beside class folders."""
        known = [classes[path] for path in self.labels if path in classes]
        return len(known) == len(self.labels) and is_bijection([*map(str, self.labels.values())], known)

    def require_splits(self, columns: Sequence[str] = ()) -> None:
        """Raise a UserError if its splits are not known, with the setting that ignores them.

        Args:
            columns: those that dataset.labels names; splits that are not known are ignored if they are two.
        """
        if self.problem and len(columns) < 2:
            ignore = f"remove dataset.labels={self.table.path}, which has no classes"
            if self.column is not None:
                ignore = f"set dataset.labels='{self.table.path}:{self.image}:{self.column}' to ignore it"
            raise UserError(f"{self.problem}, or {ignore}")


def read_labels(
    table: Table, index: ImageIndex, split: str | None, columns: Sequence[str] = (), unlabelled: bool = False
) -> TableLabels | None:
    """Return what a table states; None if no column names images.

    Args:
        table: the table.
        index: the images.
        split: split of the table; None if it has none.
        columns: names of the column of labels, or of those of images and labels; empty: detected, as is the
            one of labels if its name is empty.
        unlabelled: whether labels are of no interest, as they are known from folders.

    Raises:
        UserError: it is ambiguous which column has the labels, or an image has two labels.
        DamagedTableError: the labels or splits of some rows may be wrong.
    """
    for name in columns:
        if name and name not in table.header:
            if name in table.nested:
                raise _several_values(table, name)
            raise UserError(f"{table.path} has no column {name}{did_you_mean(name, table.header)}")
    image = columns[0] if len(columns) > 1 else _image_column(table, index)
    if image is None:
        return None
    split_column, problem = _split_column(table, (image, *columns))
    rest = [name for name in table.header if name not in ("", "Unnamed: 0", image, split_column)]
    column: str | None = None
    values: list[str] | None = None
    if unlabelled:
        pass
    elif columns and columns[-1]:
        column, values = columns[-1], table.column(columns[-1])
    else:
        column, values = _label_values(table, rest)
    if (values is not None or split_column) and table.problem:
        raise DamagedTableError(table.problem)
    result = TableLabels(table, {}, {}, image, column, [], problem)
    _resolve(result, index, split, None if problem else split_column, values)
    return result


def read_held_out(
    table: Table, index: ImageIndex, split: str | None, train: Collection[str]
) -> tuple[list[str], str]:
    """Return the training images that a table's column of splits holds out, and why they are not known.

    Args:
        table: the table.
        index: all images.
        split: split of the table; None if it has none.
        train: paths of the training images.
    """
    image = _image_column(table, index)
    column, problem = _split_column(table, (image,)) if image is not None else (None, "")
    if image is None or column is None:
        return [], ""
    ranks = {each: rank_folders(table.folder, each) for each in (None, *SPLITS)}
    splits: dict[str, str] = {}
    unclear, held_out = "", False
    for reference, value in zip(table.column(image), table.column(column), strict=True):
        meant = None if problem else split_of(value)
        found = index.nearest(reference, ranks[split or meant])
        if not any(path in train for path in found):  # such as a row of val beside the folder val
            continue
        if problem or table.problem:
            return [], table.problem or problem
        named = str(meant)
        if len(found) > 1:
            unclear = unclear or ambiguity(table.path, reference, found)
            held_out = held_out or named != "train"
        elif splits.setdefault(found[0], named) != named:
            return [], _contradiction(table, reference, splits[found[0]], named)
    if held_out:
        return [], unclear
    return [path for path, named in splits.items() if named != "train"], ""


def unmatched_splits(table: Table, index: ImageIndex) -> str | None:
    """Return the column of splits of a table whose rows name no image, such as a list of patients.

    Args:
        table: the table.
        index: all images.
    """
    if _image_column(table, index) is not None:
        return None
    column, problem = _split_column(table, ())
    several = column is not None and len({split_of(value) for value in table.column(column)}) > 1
    return column if several and not problem else None


def _resolve(
    result: TableLabels,
    index: ImageIndex,
    split: str | None,
    split_column: str | None,
    values: list[str] | None,
) -> None:
    """Fill in the labels, splits and missing images of a table."""
    table = result.table
    rank = rank_folders(table.folder, split)
    splits = table.column(split_column) if split_column else None
    for row, reference in enumerate(table.column(result.image)):
        path = index.find(reference, rank, table.path)
        if path is None or is_elsewhere(reference, path):
            result.missing.append(reference)
            continue
        label = values[row] if values is not None else None
        if result.labels.setdefault(path, label) != label:
            raise UserError(
                f"{table.path}: {reference} has the classes {result.labels[path]} and {label}; {_ONE}"
            )
        if splits:
            named = str(split_of(splits[row]))
            if result.splits.setdefault(path, named) != named:
                result.problem = _contradiction(table, reference, result.splits[path], named)
    if result.problem:
        result.splits.clear()
    names = set(filter(None, values or ()))
    if name := _first_joined(names, "|;"):
        raise UserError(f"{table.path} has several classes for one image, such as {name}; {_ONE}")


def _first_joined(names: Collection[str], marks: str) -> str | None:
    """Return the first name that joins other names by one of some characters; None if there is none."""
    known = set(names)
    return next(
        (
            name
            for name in sorted(known)
            for mark in marks
            if mark in name and known.issuperset(map(str.strip, name.split(mark)))
        ),
        None,
    )


def joined_classes(names: Collection[str]) -> list[str]:
    """Return a warning if a class may be several in one cell, as `cat, dog` beside `cat` and `dog`.

    It may also have that name: ImageNet has `tiger cat` and `tiger`.

    Args:
        names: classes of images in a table.
    """
    name = _first_joined(names, ",/ ")
    return [f"{name!r} is taken as a class, though its parts are classes, too; {_ONE}"] if name else []


def _several_values(table: Table, name: str) -> UserError:
    return UserError(
        f"{table.path}: {name} has lists or objects, and {_ONE}; set dataset.labels='{table.path}:COLUMN' if "
        "another column has the classes"
    )


def _contradiction(table: Table, reference: str, first: str, second: str) -> str:
    return (
        f"{table.path}: {reference} is in {first} and in {second}; an image belongs to one split only, "
        "so remove one of its rows"
    )


def _image_column(table: Table, index: ImageIndex) -> str | None:
    def names_images(column: str) -> bool:
        place = table.header.index(column)
        sample = [row[place] for row in islice(table.rows, _SAMPLE) if row[place].strip()]
        found = sum(value in index for value in sample)
        return found * 2 > len(sample) or (found > 0 and plain(column) in IMAGE_HEADERS)

    by_name = sorted(table.header, key=lambda name: _place(name, IMAGE_HEADERS))
    return next((name for name in by_name if name and names_images(name)), None)


def _split_column(table: Table, others: Sequence[str]) -> tuple[str | None, str]:
    """Return the column of splits, None if there is none, and why its splits are not known.

    Args:
        table: the table.
        others: its columns of images and classes.
    """
    found: dict[str, list[str | None]] = {}
    unknown: dict[str, str] = {}  # column → its first value that is no split
    for name in table.header:
        if name in others or not _may_be_splits(table, name):
            continue
        column = table.column(name)
        splits = [split_of(value) for value in column]
        if None in splits:
            unknown[name] = column[splits.index(None)]
        else:
            found[name] = splits
    names = list(found)
    if unknown and not any(plain(name) in SPLIT_HEADERS for name in names):
        name, value = next(iter(unknown.items()))
        return name, (
            f"{table.path}: column {name} has {value[:40]!r}, which is none of train, val and test; "
            "write one of these, or remove these rows or the column"
        )
    for other in names[1:]:
        if found[other] != found[names[0]]:
            return names[0], (
                f"{table.path}: columns {names[0]} and {other} have different splits; remove one of them"
            )
    return (names[0] if names else None), ""


def _may_be_splits(table: Table, name: str) -> bool:
    """Whether a column is meant to have splits, by its header, or as two of a few values are splits."""
    header, place = plain(name), table.header.index(name)
    if header in SPLIT_HEADERS:
        return any(table.column(name))
    if header in _MAYBE_SPLIT_HEADERS:
        return any(map(split_of, set(table.column(name))))
    if header in LABEL_HEADERS or len({row[place] for row in table.rows[:_SAMPLE]}) > _MAX_SPLITS:
        return False
    values = set(table.column(name))
    return len(values) <= _MAX_SPLITS and len({split_of(value) for value in values if is_split(value)}) > 1


def _label_values(table: Table, columns: list[str]) -> tuple[str | None, list[str] | None]:
    """Return the column of labels and its values; None if the table has no labels."""
    known = sorted(
        (name for name in columns if plain(name) in LABEL_HEADERS),
        key=lambda name: _place(name, LABEL_HEADERS),
    )
    if prediction := next((name for name in columns if plain(name) == "predictionstring"), None):
        return prediction, [value.partition(" ")[0] for value in table.column(prediction)]  # class and boxes
    if known:
        values = table.column(known[0])
        for other in known[1:]:
            if not is_bijection(values, table.column(other)):
                raise _ambiguous(table, [known[0], other])
        return known[0], values
    nested = sorted(table.nested, key=lambda name: _place(name, LABEL_HEADERS))
    if columns and nested and (len(columns) == 1 or plain(nested[0]) in LABEL_HEADERS):
        raise _several_values(table, nested[0])
    if not columns:
        return None, None
    if len(columns) == 1:
        return columns[0], table.column(columns[0])
    if (one_hot := _one_hot(table, columns)) is not None:
        return "", one_hot
    raise _ambiguous(table, columns)


def _one_hot(table: Table, columns: list[str]) -> list[str] | None:
    places = [table.header.index(name) for name in columns]
    labels = []
    for row in table.rows:
        ones = [place for place in places if row[place].strip() in ("1", "1.0")]
        if len(ones) != 1 or any(row[place].strip() not in ("0", "0.0", "1", "1.0") for place in places):
            return None
        labels.append(table.header[ones[0]])
    return labels


def _ambiguous(table: Table, columns: list[str]) -> UserError:
    shown = ", ".join(columns[:6]) + (" …" if len(columns) > 6 else "")
    return UserError(
        f"{table.path} has the columns {shown}, and each may be the class; set "
        f"dataset.labels='{table.path}:COLUMN'"
    )


def is_bijection(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two columns divide the rows into the same groups."""
    pairs = set(zip(first, second, strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def has_classes(labels: TableLabels) -> bool:
    """Whether a column has classes by its header, or by its values: words, not measurements."""
    if labels.column and plain(labels.column) in LABEL_HEADERS:
        return True
    return not all(_NUMBER.fullmatch(value) for value in labels.labels.values() if value)


def _place(name: str, known: tuple[str, ...]) -> int:
    return known.index(plain(name)) if plain(name) in known else len(known)


def names_for_numbers(labels: dict[str, str], folders_of: Callable[[str], str]) -> dict[str, str]:
    """Return number → name of its class, if paths show the names; empty if they do not.

    Names may be those of the images' folders, of all folders of their paths, or the beginnings of file names;
    the first that give each number a name of its own are used.

    Args:
        labels: path → number of its class.
        folders_of: returns the folders of a path that may be its class.
    """

    def parent(path: str) -> str:
        return path.split("/")[-2] if "/" in path else ""

    def begin(path: str) -> str:
        return re.sub(r"[\s._-]*[0-9]+$", "", splitext(path.rpartition("/")[2])[0])

    paths, numbers = list(labels), list(labels.values())
    if not numbers or not all(number.isdecimal() for number in numbers):
        return {}
    for name_of in (parent, folders_of, begin):
        names = [name_of(path) for path in paths]
        if all(names) and is_bijection(numbers, names):
            return dict(zip(numbers, names, strict=True))
    return {}
