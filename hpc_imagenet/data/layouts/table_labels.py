"""Labels and splits of images as a table states them: its columns, and the images that its rows name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from hpc_imagenet.data.layouts.image_index import ImageIndex, rank_folders
from hpc_imagenet.data.layouts.label_table import Table
from hpc_imagenet.data.layouts.split_names import split_of
from hpc_imagenet.errors import UserError, did_you_mean

_ONE = "only datasets with one class per image are supported"
_SAMPLE = 50  # rows that decide which column names the images
# Headers in lower case without _ - and spaces, the likelier ones first.
_IMAGE_HEADERS = (
    *("filename", "filepath", "filepaths", "file", "imagepath", "path", "image", "imagename", "imagefile"),
    *("imageid", "img", "imgname", "imgpath", "imageindex", "idcode", "id", "uuid", "name"),
)
_LABEL_HEADERS = (
    *("labelname", "classname", "categoryname", "label", "labels", "class", "classes", "category", "target"),
    *("breed", "species", "dx", "diagnosis", "level", "findinglabels", "classid", "labelid", "categoryid"),
    *("classidx", "labelidx", "classindex", "targetid", "y"),
)
_NUMBER = re.compile(r"[+-]?[0-9]*[.,]?[0-9]*")
_SPLIT_HEADERS = ("split", "set", "subset", "partition", "phase", "dataset", "usage")


@dataclass
class TableLabels:
    """What a table states about images.

    Attributes:
        table: the table.
        labels: path → label; None as label if the table has none.
        splits: path → split, if the table has a column of splits.
        column: name of the column of labels; None if there is none, "" if there is one per class.
        missing: values that name no image.
    """

    table: Table
    labels: dict[str, str | None]
    splits: dict[str, str]
    column: str | None
    missing: list[str]

    @property
    def where(self) -> str:
        """Where its labels are, for the log."""
        named = self.column and not self.column.isdecimal()
        return f"{self.table.path}, column {self.column}" if named else self.table.path


def read_labels(
    table: Table, index: ImageIndex, split: str | None, columns: Sequence[str] = (), unlabelled: bool = False
) -> TableLabels | None:
    """Return what a table states; None if no column names images.

    Args:
        table: the table.
        index: the images.
        split: split of the table; None if it has none.
        columns: names of the column of labels, or of those of images and labels; empty: detected.
        unlabelled: whether labels are of no interest, as they are known from folders.

    Raises:
        UserError: it is ambiguous which column has the labels, or an image has two labels.
    """
    for name in columns:
        if name not in table.header:
            raise UserError(f"{table.path} has no column {name}{did_you_mean(name, table.header)}")
    image = columns[0] if len(columns) > 1 else _image_column(table, index)
    if image is None:
        return None
    split_column = _split_column(table, image)
    rest = [name for name in table.header if name not in ("", "Unnamed: 0", image, split_column)]
    column: str | None = None
    values: list[str] | None = None
    if unlabelled:
        pass
    elif columns:
        column, values = columns[-1], table.column(columns[-1])
    else:
        column, values = _label_values(table, rest)
    return _resolve(table, index, split, image, split_column, column, values)


def _resolve(
    table: Table,
    index: ImageIndex,
    split: str | None,
    image: str,
    split_column: str | None,
    column: str | None,
    values: list[str] | None,
) -> TableLabels:
    rank = rank_folders(table.folder, split)
    result = TableLabels(table, {}, {}, column, [])
    splits = table.column(split_column) if split_column else None
    for row, reference in enumerate(table.column(image)):
        path = index.find(reference, rank, table.path)
        if path is None:
            result.missing.append(reference)
            continue
        label = values[row] if values is not None else None
        if result.labels.setdefault(path, label) != label:
            raise UserError(
                f"{table.path}: {reference} has the classes {result.labels[path]} and {label}; {_ONE}"
            )
        if splits:
            result.splits[path] = split_of(splits[row]) or splits[row]
    names = set(filter(None, values or ()))
    for name in names:
        if "|" in name and names.issuperset(name.split("|")):
            raise UserError(f"{table.path} has several classes for one image, such as {name}; {_ONE}")
    return result


def _image_column(table: Table, index: ImageIndex) -> str | None:
    def names_images(column: str) -> bool:
        place = table.header.index(column)
        sample = [row[place] for row in islice(table.rows, _SAMPLE) if row[place].strip()]
        found = sum(value in index for value in sample)
        return found * 2 > len(sample) or (found > 0 and _plain(column) in _IMAGE_HEADERS)

    by_name = sorted(table.header, key=lambda name: _place(name, _IMAGE_HEADERS))
    return next((name for name in by_name if name and names_images(name)), None)


def _split_column(table: Table, image: str) -> str | None:
    for name in table.header:
        if name != image and _plain(name) in _SPLIT_HEADERS:
            values = set(table.column(name))
            if len(values) <= 6 and all(split_of(value) for value in values):
                return name
    return None


def _label_values(table: Table, columns: list[str]) -> tuple[str | None, list[str] | None]:
    """Return the column of labels and its values; None if the table has no labels."""
    known = sorted(
        (name for name in columns if _plain(name) in _LABEL_HEADERS),
        key=lambda name: _place(name, _LABEL_HEADERS),
    )
    if prediction := next((name for name in columns if _plain(name) == "predictionstring"), None):
        return prediction, [value.partition(" ")[0] for value in table.column(prediction)]  # class and boxes
    if known:
        values = table.column(known[0])
        for other in known[1:]:
            if not is_bijection(values, table.column(other)):
                raise _ambiguous(table, [known[0], other])
        return known[0], values
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
    if labels.column and _plain(labels.column) in _LABEL_HEADERS:
        return True
    return not all(_NUMBER.fullmatch(value) for value in labels.labels.values() if value)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _place(name: str, known: tuple[str, ...]) -> int:
    return known.index(_plain(name)) if _plain(name) in known else len(known)


def names_for_numbers(labels: dict[str, str], described: Sequence[Callable[[str], str]]) -> dict[str, str]:
    """Return number → name of its class, if paths show the names; empty if they do not.

    Args:
        labels: path → number of its class.
        described: functions from a path to what may be the name of its class; the first that gives each
            number a name of its own is used.
    """
    paths, numbers = list(labels), list(labels.values())
    if not numbers or not all(number.isdecimal() for number in numbers):
        return {}
    for name_of in described:
        names = [name_of(path) for path in paths]
        if all(names) and is_bijection(numbers, names):
            return dict(zip(numbers, names, strict=True))
    return {}
