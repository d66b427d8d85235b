"""Find the labelled images of a folder in the layouts in which datasets are published and collected."""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.layouts.completed_splits import (
    Labels,
    complete_splits,
    match_classes,
    require_disjoint,
)
from hpc_imagenet.data.layouts.folder_tree import foreign_images
from hpc_imagenet.data.layouts.layout_search import LayoutSearch
from hpc_imagenet.data.layouts.split_names import SPLITS
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import escape_name

_CHUNK = 2000  # files whose sizes a thread reads at a time


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image and its label.

    Attributes:
        path: relative to the root, with `/`.
        label: index of its class.
        size: bytes.
        time: mtime in ns.
    """

    path: str
    label: int
    size: int
    time: int


@dataclass(frozen=True)
class LabelledImages:
    """The images of a folder by split.

    Attributes:
        root: folder that the paths are relative to.
        layout: how classes and splits were found, for the log.
        classes: names of the classes as written, in label order.
        splits: train, val and test → images, sorted by class and path; train is never empty.
        skipped: reason → number of files that are no images of the dataset.
        warnings: what the user should know, one line each.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def find_images(folder: Path, dataset: Dataset, threads: int) -> LabelledImages:
    """Return the labelled images of a folder.

    Args:
        folder: the dataset's folder.
        dataset: the settings that decide where the layout is ambiguous.
        threads: number of folders, and of groups of files, that are read at a time.

    Raises:
        UserError: what was found is ambiguous or incomplete, and which setting decides.
    """
    try:
        return _find(folder, dataset, threads)
    except UserError as error:  # names of files and classes may contain control characters
        raise UserError(escape_name(str(error))) from None


def _find(folder: Path, dataset: Dataset, threads: int) -> LabelledImages:
    search = LayoutSearch(folder, dataset, threads)
    samples, skipped, warnings = search.run(), search.skipped, search.warnings
    require_disjoint(samples, search.source)
    classes = match_classes(samples, search.empty, dataset, search.source, skipped, warnings)
    complete_splits(samples, dataset, search.source, warnings)
    for ending, count in foreign_images(skipped).items():
        warnings.append(f"{count} {ending} files are skipped, as Pillow does not decode them; convert them")
    files = _stat(folder, samples, classes, threads)
    present = ", ".join(f"{len(files[split])} {split}" for split in SPLITS if files[split])
    return LabelledImages(
        folder,
        f"{search.how}: {len(classes)} classes, {present}",
        tuple(classes),
        files,
        {reason: count for reason, count in sorted(skipped.items()) if count},
        tuple(warnings),
    )


def _stat(
    root: Path, samples: dict[str, Labels], classes: list[str], threads: int
) -> dict[str, list[ImageFile]]:
    label_of = {name: label for label, name in enumerate(classes)}
    files = {}
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for split in SPLITS:
            ordered = sorted((label_of[name], path) for path, name in samples[split].items())
            chunks = [ordered[at : at + _CHUNK] for at in range(0, len(ordered), _CHUNK)]
            found = pool.map(lambda chunk: [_file(root, path, label) for label, path in chunk], chunks)
            files[split] = [file for part in found for file in part]
    if empty := [file.path for split in SPLITS for file in files[split] if not file.size]:
        if len(empty) == 1:
            raise UserError(f"{root / empty[0]} is empty; replace or remove it")
        raise UserError(
            f"{root}: {len(empty)} images are empty files, such as {empty[0]}; replace or remove them: "
            f"find {shlex.quote(str(root))} -type f -empty"
        )
    return files


def _file(root: Path, path: str, label: int) -> ImageFile:
    try:
        stat = (root / path).stat()
    except OSError as error:
        raise UserError(f"{root / path}: {error.strerror}; make it readable or remove it") from None
    return ImageFile(path, label, stat.st_size, stat.st_mtime_ns)
