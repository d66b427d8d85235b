"""Dataset certificate: contents of a dataset, for people (certificate.md) and `verify` (certificate.json).

It contains no time stamp, so that the same dataset has the same certificate.
"""

from __future__ import annotations

import itertools
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpc_imagenet import __version__
from hpc_imagenet.data.images.image_header import CORRUPT, FACTS, FLAG_NAMES, TILED
from hpc_imagenet.data.tar.tar_scan import Array
from hpc_imagenet.datastore.index import Index
from hpc_imagenet.datastore.manifest import ClassNames, File

JSON, PAGE = "certificate.json", "certificate.md"
FORMAT = 1
_CHUNK = 1 << 20  # labels that are counted at a time
_MAX_NAMED = 50  # images with a flag are listed by name up to this number
_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048)  # px: histogram bins of the short side


def build_certificate(
    *,
    name: str,
    content: str,
    classes: Sequence[ClassNames],
    splits: Mapping[str, Index],
    facts: Mapping[str, Array],
    names: Mapping[str, Array],
    files: Sequence[File],
    skipped: Sequence[str],
    provenance: Mapping[str, Any],
    tools: Mapping[str, str],
) -> dict[str, Any]:
    """Return the certificate of a dataset.

    Args:
        name: name of the dataset.
        content: short hash that identifies the set of images.
        classes: classes in label order.
        splits: split → index.
        facts: split → header facts of the same images, shape [images], dtype `FACTS`.
        names: split → file names of the same images, as bytes, shape [images].
        files: all files of the dataset except the manifest and the certificate.
        skipped: names of the corrupt images that were left out.
        provenance: source, MD5s of the archives, settings of the process stage, how images were checked; of
            labelled images also what was found in their folder.
        tools: versions of the tools that changed images; empty if none did.
    """
    counts = {split: _class_counts(entries["label"], len(classes)) for split, entries in splits.items()}
    return {
        "format": FORMAT,
        "name": name,
        "content": content,
        "classes": len(classes),
        "images": {split: len(entries) for split, entries in splits.items()},
        "bytes": {split: int(entries["length"].sum(dtype=np.int64)) for split, entries in splits.items()},
        "sizes": {split: _sizes(splits[split], split_facts) for split, split_facts in facts.items()},
        "oddities": {split: _flagged(split_facts, names[split]) for split, split_facts in facts.items()},
        "restart_markers": {
            split: int((split_facts["marks"] & TILED != 0).sum()) for split, split_facts in facts.items()
        },
        "skipped": list(skipped),
        "files": [{"path": file.path, "bytes": file.bytes, "hash": file.hash} for file in files],
        **provenance,
        "tools": {"hpc_imagenet": __version__, "python": platform.python_version(), **tools},
        "counts": {
            category.wnid: {split: counts[split][label] for split in splits}
            for label, category in enumerate(classes)
        },
    }


def render_page(certificate: Mapping[str, Any], classes: Sequence[ClassNames]) -> str:
    """Return the certificate as a Markdown page."""
    images, sizes, flagged = certificate["images"], certificate["sizes"], certificate["oddities"]
    splits = list(images)
    lines = [f"# {certificate['name']}, content {certificate['content']}", ""]
    lines += _table(
        ["", *splits],
        [
            ["images", *(f"{images[split]:,}" for split in splits)],
            ["bytes", *(f"{certificate['bytes'][split]:,}" for split in splits)],
            *(
                [label, *(_format_range(sizes[split][key]) for split in splits)]
                for key, label in (
                    ("width", "width, px"),
                    ("height", "height, px"),
                    ("bytes", "bytes per image"),
                )
            ),
        ],
    )
    lines += ["", "Minimum, median and maximum; widths and heights are those in the file headers.", ""]
    lines += ["## Short sides", ""]
    bins = list(sizes[splits[0]]["short_side"])
    lines += _table(
        ["px", *splits],
        [[label, *(f"{sizes[split]['short_side'][label]:,}" for split in splits)] for label in bins],
    )
    lines += ["", "## Unusual images", "", "Images that need care when decoded; none is left out.", ""]
    rows = []
    for flag in FLAG_NAMES.values():
        if any(flag in flagged[split] for split in splits):
            counts = [flagged[split].get(flag, {}).get("images", 0) for split in splits]
            rows.append([flag, *(f"{count:,}" for count in counts)])
    lines += _table(["", *splits], rows) if rows else ["None."]
    name_lines = [
        f"- {flag}: {_escape(', '.join(found['named']))}"
        for split in splits
        for flag, found in flagged[split].items()
        if found["named"]
    ]
    lines += ["", *name_lines] if name_lines else []
    if certificate["skipped"]:
        lines += ["", "## Corrupt images that were left out", ""]
        lines += [f"- {_escape(image)}" for image in certificate["skipped"]]
    lines += _folder_lines(certificate.get("folder"))
    lines += ["", "## Files", ""]
    lines += _table(
        ["file", "bytes", "hash"],
        [[file["path"], f"{file['bytes']:,}", file["hash"]] for file in certificate["files"]],
    )
    lines += ["", "## Source", ""]
    lines += _table(["", ""], [["source", _escape(certificate["source"])], *certificate["archives"].items()])
    process = {**certificate["process"], "check": certificate["check"]}
    lines += ["", f"Processed with: {_settings(process)}. "]
    lines += [f"Tools: {_settings(certificate['tools'])}."]
    lines += ["", "## Classes", ""]
    class_counts = certificate["counts"]
    lines += _table(
        ["label", "wnid", "names", *splits],
        [
            [
                label,
                _escape(category.wnid),
                _escape(", ".join(category.names)),
                *(f"{class_counts[category.wnid][split]:,}" for split in splits),
            ]
            for label, category in enumerate(classes)
        ],
    )
    return "\n".join(lines) + "\n"


def _folder_lines(folder: Mapping[str, Any] | None) -> list[str]:
    """Return the lines about the folder of labelled images that the archives were made of."""
    if folder is None:
        return []
    lines = ["", "## Folder", "", f"- layout: {_escape(folder['layout'])}"]
    lines += [f"- left out, {_escape(reason)}: {count:,}" for reason, count in folder["skipped"].items()]
    if folder["oriented"]:
        paths = folder["reencoded"]
        lines += [f"- turned upright by their EXIF orientation: {folder['oriented']:,}"]
        lines += [f"- of these encoded again, as they could not be turned without loss: {len(paths):,}"]
        lines += [f"  - {_escape(path)}" for path in paths[:_MAX_NAMED]]
        if len(paths) > _MAX_NAMED:
            lines += [f"  - and {len(paths) - _MAX_NAMED:,} more, which {JSON} names"]
    return lines


def _escape(text: str) -> str:
    """Escape what Markdown or HTML would interpret in a name; `|` is left to `_table`."""
    return re.sub(r"([\\`*\[\]<>&#])", r"\\\1", text)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _class_counts(labels: Array, classes: int) -> list[int]:
    """Return the number of images of each class. In chunks, since bincount takes 8 bytes for each label."""
    counts = np.zeros(classes, np.int64)
    for begin in range(0, len(labels), _CHUNK):
        counts += np.bincount(labels[begin : begin + _CHUNK], minlength=classes)
    found: list[int] = counts.tolist()
    return found


def _sizes(entries: Index, facts: Array) -> dict[str, Any]:
    short = np.minimum(facts["width"], facts["height"])
    edges = [*_EDGES, int(np.iinfo(FACTS["width"]).max) + 1]
    counted = np.histogram(short, edges)[0].tolist()
    labels = [f"{low} to {high - 1}" for low, high in itertools.pairwise(_EDGES)]
    labels.append(f"{_EDGES[-1]} and more")
    return {
        "width": _min_median_max(facts["width"]),
        "height": _min_median_max(facts["height"]),
        "bytes": _min_median_max(entries["length"]),
        "short_side": dict(zip(labels, counted, strict=True)),
    }


def _min_median_max(values: Array) -> list[int]:
    if not len(values):
        return [0, 0, 0]
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _flagged(facts: Array, names: Array) -> dict[str, Any]:
    found = {}
    for bit, words in FLAG_NAMES.items():
        rows = np.flatnonzero(facts["marks"] & bit)
        if len(rows) and bit != CORRUPT:
            image_names = [name.decode("utf-8", "backslashreplace") for name in names[rows].tolist()]
            found[words] = {"images": len(rows), "named": image_names if len(rows) <= _MAX_NAMED else []}
    return found


def _format_range(values: Sequence[int]) -> str:
    return " · ".join(f"{value:,}" for value in values)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]
