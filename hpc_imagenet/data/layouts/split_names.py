"""Names of splits and classes: `train` in `seg_train` and `TrainImages`, and 2 before 10."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from posixpath import splitext

SPLITS = ("train", "val", "test")
_MEANINGS = {
    "train": ("train", "training", "trn", "trainset"),
    "val": ("val", "valid", "validation", "dev", "eval", "valset"),
    "test": ("test", "testing", "tst", "testset"),
}
_WORDS = {word: split for split, words in _MEANINGS.items() for word in words}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # also the words of trainLabels
_DIGITS = re.compile(r"(\d{1,4000})")  # int() refuses more than 4300 digits
_PART_WORDS = frozenset(
    ("part", "images", "image", "imgs", "img", "batch", "chunk", "photos", "data", "folder", "shard")
)


def words_of(name: str) -> set[str]:
    """Return the words of a name in lower case; `trainLabels_2` has train and labels."""
    return {word.lower() for word in _WORD.findall(name)}


def split_of(name: str) -> str | None:
    """Return the split that a name means; None if it means none, or several, as `train_test_split` does."""
    splits = {_WORDS[word] for word in words_of(name) if word in _WORDS}
    return splits.pop() if len(splits) == 1 else None


def is_split(value: str) -> bool:
    """Whether a value is the word for a split and no more, as `Train` and `val` are."""
    return split_of(value) is not None and len(words_of(value)) == 1


def is_trainval(name: str) -> bool:
    """Whether a name means training and validation images together."""
    words = words_of(name)
    return "trainval" in words or {_WORDS.get(word) for word in words} - {None} == {"train", "val"}


def file_split(path: str) -> str | None:
    """Return the split that the name of a table, or of a folder that contains it, means."""
    *folders, name = path.split("/")
    if is_trainval(splitext(name)[0]):
        return "train"
    return next(
        (split for part in (splitext(name)[0], *reversed(folders)) if (split := split_of(part))), None
    )


def list_split(path: str) -> str | None:
    """Return the split of a list by its name: train, val, test, or trainval for both."""
    return "trainval" if is_trainval(splitext(path.rpartition("/")[2])[0]) else file_split(path)


def is_series(names: Iterable[str]) -> bool:
    """Whether names differ only in a number, as `train.X1` and `train.X2` do."""
    return len({_DIGITS.sub("", name) for name in names}) == 1


def is_series_of_parts(names: list[str]) -> bool:
    """Whether names are those of parts of one set of images, as `images_part_1` and `images_part_2` are."""
    return len(names) > 1 and is_series(names) and bool(words_of(names[0]) & _PART_WORDS)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key: numbers in a name sort as numbers, the rest by code points."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)], name


def same_class(name: str, classes: dict[str, str]) -> str | None:
    """Return the class that a name means, be it written in another Unicode form or with leading zeros.

    Args:
        name: as another split or list writes it.
        classes: `class_keys` of the classes.
    """
    return next((classes[key] for key in _keys(name) if key in classes), None)


def class_keys(classes: Iterable[str]) -> dict[str, str]:
    """Return the keys that `same_class` looks up → class."""
    keys: dict[str, str] = {}
    for name in classes:
        for key in _keys(name):
            keys.setdefault(key, name)
    return {**keys, **{name: name for name in classes}}


def _keys(name: str) -> list[str]:
    return [name, unicodedata.normalize("NFC", name), *([str(int(name))] if _DIGITS.fullmatch(name) else [])]
