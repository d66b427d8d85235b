"""Tables and lists of labelled images: CSV, text, JSON and MATLAB files as rows of columns.

| file | rows |
|---|---|
| .csv, .tsv, .tab | as they are; the most frequent of , ; tab and | in the header delimits, or X of `sep=X` |
| .txt, .lst, no header | a path, or a path and a label, with or without an ending |
| .jsonl, .json with a list of objects | their fields |
| .json with `images`, `annotations` and `categories` | file name and category, as in COCO and iNaturalist |
| .json with an object | file → label, or label → files |
| .mat | `file_list` and `labels`, or `annotations` with `fname` and `class` |
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from posixpath import splitext
from typing import Any

from hpc_imagenet.data.layouts.folder_tree import IMAGE_ENDINGS
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import decode_json
from hpc_imagenet.io.mat_file import flat, read_mat

TABLE_ENDINGS = (".csv", ".tsv", ".tab", ".txt", ".lst", ".jsonl", ".json", ".mat")
_SAMPLE = 100  # lines that decide how a list is read
_MAX_BYTES = 1 << 30  # larger files have more than labels
_NUMBER = re.compile(r"-?[0-9.]+")
# Headers in lower case without _ - and spaces, the likelier ones first.
IMAGE_HEADERS = (
    *("filename", "filepath", "filepaths", "file", "imagepath", "path", "image", "imagename", "imagefile"),
    *("imageid", "img", "imgname", "imgpath", "imageindex", "idcode", "id", "uuid", "name"),
)
LABEL_HEADERS = (
    *("labelname", "classname", "categoryname", "label", "labels", "class", "classes", "category", "target"),
    *("breed", "species", "dx", "diagnosis", "level", "findinglabels", "classid", "labelid", "categoryid"),
    *("classidx", "labelidx", "classindex", "targetid", "y"),
)
SPLIT_HEADERS = ("split", "splits", "datasplit", "subset", "partition")  # mean nothing else

IsImage = Callable[[str], bool]
Rows = list[list[str]]


@dataclass
class Table:
    """A table of images.

    Attributes:
        path: of the file, relative to the dataset's folder.
        header: names of the columns; their numbers from 1 on if the file has no header.
        rows: one per image, each of as many values as the header.
        problem: which row was cut or filled up, so that its class may be wrong; empty if none was.
        nested: names of the fields with lists or objects, which are no columns.
    """

    path: str
    header: list[str]
    rows: Rows
    problem: str = ""
    nested: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Path of its folder, relative to the dataset's folder."""
        return self.path.rpartition("/")[0]

    @property
    def stem(self) -> str:
        """Its name without ending."""
        return splitext(self.path.rpartition("/")[2])[0]

    def column(self, name: str) -> list[str]:
        """Return the values of one column."""
        place = self.header.index(name)
        return [row[place].strip() for row in self.rows]


def read_table(root: Path, path: str, is_image: IsImage) -> Table | None:
    """Read a table or list; None if it is none.

    Args:
        root: the dataset's folder.
        path: of the file, relative to it.
        is_image: whether a value names an image of the dataset.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    ending = splitext(path)[1].lower()
    file = root / path
    _check_file(file)
    if file.stat().st_size > _MAX_BYTES:
        return None
    if ending == ".mat":
        try:
            return _table(path, _read_mat(file))
        except (UserError, ValueError, KeyError, TypeError, OverflowError):  # damaged, or of another form
            return None
    if ending == ".json":
        try:
            data = decode_json(read_text(file))
            return _table(path, _json_rows(data), nested=_nested(data))
        except (ValueError, KeyError, TypeError):  # not JSON, or of another form
            return None
    if ending == ".jsonl":
        try:
            items = [decode_json(line) for line in read_text(file).split("\n") if line.strip()]
            return _table(path, _objects(items), nested=_nested(items))
        except ValueError:
            return None
    if ending in (".csv", ".tsv", ".tab"):
        return _table(path, _csv_rows(read_text(file)), is_image)
    return _read_list(path, read_text(file), is_image)


def _table(
    path: str, rows: Rows | None, is_image: IsImage | None = None, nested: tuple[str, ...] = ()
) -> Table | None:
    """Return rows as a table; the first one is the header, unless it names an image."""
    if not rows:
        return None
    if is_image and not _has_header(rows, is_image):
        header = [str(number) for number in range(1, len(rows[0]) + 1)]
    else:
        header, rows = [name.strip() for name in rows[0]], rows[1:]
    problem = ""
    for number, row in enumerate(rows, 1):
        fix = ""
        if len(header) - len(row) > len(header) // 2:
            fix = "correct it"
        elif any(value.strip() for value in row[len(header) :]):
            fix = "put a value that has the delimiter in it in quotes"
        if fix and not problem:
            problem = f"{path}: row {number} has {len(row)} columns, the first {len(header)}; {fix}"
        row[len(header) :] = [""] * (len(header) - len(row))
    return Table(path, header, rows, problem, nested) if rows else None


def _has_header(rows: Rows, is_image: IsImage) -> bool:
    """Whether the first row has the headers, one of which may be that of an image: `image` of image.jpg."""
    first = [value.strip() for value in rows[0]]
    if any(value.lower().endswith(IMAGE_ENDINGS) for value in first):
        return False
    images = [place for place, value in enumerate(first) if value and is_image(value)]
    known = [plain(value) in (*IMAGE_HEADERS, *LABEL_HEADERS, *SPLIT_HEADERS) for value in first]
    if all(known[place] for place in images) and (not images or sum(known) > 1):
        return True
    below = [row[place] for row in rows[1:_SAMPLE] for place in images if place < len(row)]
    return bool(below) and all(value.strip().lower().endswith(IMAGE_ENDINGS) for value in below)


def plain(name: str) -> str:
    """Return a header in lower case without _ - and spaces."""
    return re.sub(r"[\W_]", "", name.lower())


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: it is missing or not UTF-8.
    """
    _check_file(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        ending = file.suffix.lower()
        if ending and ending not in TABLE_ENDINGS:
            raise UserError(
                f"{file}: tables and lists are read from text, not from {ending}; save it as .csv"
            ) from None
        raise UserError(f"{file} is not UTF-8; save it as UTF-8") from None


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file} is a link to a missing file; restore the file or remove the link")


def _csv_rows(text: str) -> Rows:
    first, _, rest = text.partition("\n")
    if excel := re.fullmatch(r"sep=([,;\t|])\r?", first):  # Excel marks the delimiter so
        delimiter, text = excel[1], rest
    else:
        delimiter = max(",;\t|", key=first.count)
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except csv.Error:  # such as a field of more than 128 kB
        return []


def _read_list(path: str, text: str, is_image: IsImage) -> Table | None:
    lines = [line.strip() for line in text.split("\n") if line.strip() and line[0] != "#"]
    for split in _LINE_FORMS:
        sample = [split(line) for line in lines[:_SAMPLE]]
        if not sample or len({len(row) for row in sample}) > 1:
            continue
        first = sample[0][0]
        header = not is_image(first) or _has_header(sample, is_image)  # such as `path label`
        if len(sample) > header and all(is_image(row[0]) for row in sample[header:]):
            header = header and not first.lower().endswith(IMAGE_ENDINGS)  # that of an absent image
            rows = [split(line) for line in lines[header:]]
            width, columns = len(rows[0]), ["1", "2"][: len(rows[0])]
            other = next((number for number, row in enumerate(rows, 1 + header) if len(row) != width), None)
            problem = ""
            if width > 2:
                problem = (
                    f"{path}: line {1 + header} has {width} values; write a path and a class, with a tab "
                    "between them"
                )
            elif other:
                problem = f"{path}: line {other} has another form than the first; correct it"
            if problem:
                rows = [[*row, ""][: len(columns)] for row in rows]
            return Table(path, columns, rows, problem)
    return None


def _by_tab(line: str) -> list[str]:
    return line.split("\t")[:2]


def _at_first_space(line: str) -> list[str]:
    """Return path and label; of several numbers after the path, the first is the label."""
    path, _, label = line.partition(" ")
    words = label.split()
    if len(words) > 1 and all(map(_NUMBER.fullmatch, words)):
        label = words[0]
    return [path, label.strip()] if label else [path]


def _at_last_space(line: str) -> list[str]:
    path, _, label = line.rpartition(" ")
    return [path.strip(), label] if path else [label]


def _by_comma(line: str) -> list[str]:
    return [value.strip() for value in line.rstrip(",").split(",")]


# The forms of a line, tried in this order. Paths and labels may contain spaces, but not both.
_LINE_FORMS: tuple[Callable[[str], list[str]], ...] = (
    *(_by_tab, lambda line: [line], _at_first_space, _at_last_space, _by_comma),
)


def _json_rows(data: Any) -> Rows | None:
    if isinstance(data, list):
        return _objects(data)
    if not isinstance(data, dict) or not data:
        return None
    if {"images", "annotations", "categories"} <= data.keys():
        return _coco(data)
    if all(isinstance(value, (str, int)) for value in data.values()):
        return [["file", "label"], *([name, str(label)] for name, label in data.items())]
    if all(
        isinstance(files, list) and all(isinstance(file, str) for file in files) for files in data.values()
    ):
        return [["file", "label"], *([file, label] for label, files in data.items() for file in files)]
    return None


def _objects(items: list[Any]) -> Rows | None:
    if not items or not all(isinstance(item, dict) for item in items):
        return None
    header = list(dict.fromkeys(key for item in items for key in item))
    nested = _nested(items)
    scalar = [key for key in header if key not in nested]
    return [scalar, *([_text(_value(key, item)) for key in scalar] for item in items)]


def _nested(items: Any) -> tuple[str, ...]:
    """Return the fields of a list of objects that have lists or objects.

    A field of lists of one class is a column, unless another field has the classes.
    """
    objects = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    fields = dict.fromkeys(key for each in objects for key in each)
    nested = [key for key in fields if any(isinstance(each.get(key), (dict, list)) for each in objects)]
    if any(plain(key) in LABEL_HEADERS for key in fields if key not in nested):
        return tuple(nested)
    return tuple(key for key in nested if any(isinstance(_value(key, e), (dict, list)) for e in objects))


def _value(key: str, item: dict[str, Any]) -> Any:
    """Return the value of a field; of a list of one class that class."""
    value = item.get(key)
    if isinstance(value, list) and len(value) < 2 and plain(key) in LABEL_HEADERS:
        return value[0] if value else None
    return value


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)  # null, or NaN as pandas writes it


def _coco(data: dict[str, Any]) -> Rows:
    names = [category["name"] for category in data["categories"]]
    unique = len(set(names)) == len(names)
    name_of = {each["id"]: each["name"] if unique else str(each["id"]) for each in data["categories"]}
    file_of = {image["id"]: image["file_name"] for image in data["images"]}
    pairs = ((each["image_id"], each["category_id"]) for each in data["annotations"])
    return [["file_name", "label"], *([file_of[image], name_of[label]] for image, label in pairs)]


def _read_mat(file: Path) -> Rows | None:
    data = load_mat(file)
    if "file_list" in data and "labels" in data:  # Stanford Dogs
        return _pairs(flat(data["file_list"]), flat(data["labels"]))
    rows = data.get("annotations")
    if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "fname" in rows[0]:  # Stanford Cars
        if "class" not in rows[0]:
            return [["file"], *([str(row["fname"])] for row in rows)]
        names = _cars_names(file)
        labels = [int(row["class"]) for row in rows]
        return _pairs([row["fname"] for row in rows], [names.get(label, str(label)) for label in labels])
    return None


def _cars_names(file: Path) -> dict[int, str]:
    for meta in (file.parent / "cars_meta.mat", file.parent / "devkit" / "cars_meta.mat"):
        if meta.is_file():
            return {number: str(name) for number, name in enumerate(flat(load_mat(meta)["class_names"]), 1)}
    return {}


def _pairs(files: Iterable[Any], labels: Iterable[Any]) -> Rows:
    pairs: Iterator[tuple[Any, Any]] = zip(files, labels, strict=True)
    return [["file", "label"], *([str(file), str(label)] for file, label in pairs)]


def load_mat(file: Path) -> dict[str, Any]:
    """Return the variables of a MATLAB file, see `mat_file.read_mat`.

    Raises:
        UserError: it is missing, or not one that scipy reads.
    """
    _check_file(file)
    return read_mat(file.read_bytes(), str(file))
