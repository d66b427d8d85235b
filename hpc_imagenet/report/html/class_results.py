"""Accuracy per class and the confused classes of a run, from val_classes.csv and val_confusion.csv."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORST = 12  # classes of each run that the page describes
CONFUSED_WITH = 3  # wrong classes that it lists for each of them
BINS = 20  # of the histogram of accuracies


@dataclass(frozen=True)
class ClassResults:
    """Accuracies of the classes on val, at the end of a training.

    Attributes:
        names: id and names of each class, by label.
        images: number of val images, by label.
        top1: accuracy, 0 to 1, by label; None for a class without val images.
        confused: by label, the predicted labels with their number of images, most frequent first.
    """

    names: tuple[tuple[str, str], ...]
    images: tuple[int, ...]
    top1: tuple[float | None, ...]
    confused: dict[int, list[tuple[int, int]]]

    def worst(self) -> list[int]:
        """Return the labels with the lowest accuracy, lowest first."""
        measured = [(top1, label) for label, top1 in enumerate(self.top1) if top1 is not None]
        return [label for top1, label in sorted(measured)[:WORST] if top1 < 1]

    def histogram(self) -> list[int]:
        """Return how many classes have an accuracy in each of `BINS` equal bins from 0 to 1."""
        counts = [0] * BINS
        for top1 in self.top1:
            if top1 is not None:
                counts[min(BINS - 1, int(top1 * BINS + 1e-9))] += 1
        return counts


def read_class_results(folder: Path) -> ClassResults | None:
    """Return the results in a run's folder; None if it has none, or a damaged file."""
    paths = folder / "val_classes.csv", folder / "val_confusion.csv"
    return _read_unchanged(*paths, *(_modified(path) for path in paths))


@functools.lru_cache(maxsize=4096)  # a page that is served live reads only what has changed
def _read_unchanged(classes: Path, confusion: Path, *_modified: float) -> ClassResults | None:
    try:
        ids, names, images, top1 = _columns(classes, ("id", "names", "images", "top1"))
        confused: dict[int, list[tuple[int, int]]] = {}
        for pair in zip(*_columns(confusion, ("label", "predicted", "images")), strict=True):
            label, predicted, count = map(int, pair)
            pairs = confused.setdefault(label, [])
            if len(pairs) < CONFUSED_WITH and 0 <= predicted < len(ids):
                pairs.append((predicted, count))
        if not ids:
            return None
        accuracies = tuple(float(text) if text else None for text in top1)
        if not all(each is None or 0 <= each <= 1 for each in accuracies):
            return None
        shared = _shared(tuple(zip(ids, names, strict=True)))
        return ClassResults(shared, tuple(map(int, images)), accuracies, confused)
    except (ValueError, csv.Error):
        return None


@functools.lru_cache(maxsize=32)
def _shared(names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the same object for equal names: a thousand runs have the same thousand classes."""
    return names


def _columns(path: Path, names: Sequence[str]) -> list[Sequence[str]]:
    """Return columns of a CSV file; empty ones if there is no file.

    Raises:
        ValueError: a column is missing, or a line has another length.
    """
    try:
        with path.open(newline="", errors="replace") as file:
            header, *rows = csv.reader(file)  # DictReader takes three times as long
    except OSError:
        return [[] for _ in names]
    at = [header.index(name) for name in names]
    columns = list(zip(header, *rows, strict=True))
    return [columns[index][1:] for index in at]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
