"""The certificate: what a dataset holds, for people (certificate.md) and for `verify` (certificate.json).

It says nothing of the time it was written at, so that the same dataset has the same certificate.
"""

from __future__ import annotations

import itertools
import platform
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
_FEW = 50  # so many images of an oddity are named
_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048)  # px, of a short side


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
        name: of the dataset.
        content: short hash of which images these are.
        classes: in label order.
        splits: the index of each split.
        facts: of the same images, each of shape [images] and dtype `FACTS`.
        names: of the same images, as bytes.
        files: all that belong to the dataset, but the manifest and the certificate.
        skipped: names of images that were left out as corrupt.
        provenance: source, MD5s of the archives, how they were processed.
        tools: versions of what changed images, if any did.
    """
    counts = {
        split: np.bincount(of["label"], minlength=len(classes)).tolist() for split, of in splits.items()
    }
    return {
        "format": FORMAT,
        "name": name,
        "content": content,
        "classes": len(classes),
        "images": {split: len(of) for split, of in splits.items()},
        "bytes": {split: int(of["length"].sum(dtype=np.int64)) for split, of in splits.items()},
        "sizes": {split: _sizes(splits[split], of) for split, of in facts.items()},
        "oddities": {split: _oddities(of, names[split]) for split, of in facts.items()},
        "restart_markers": {split: int((of["marks"] & TILED != 0).sum()) for split, of in facts.items()},
        "skipped": list(skipped),
        "files": [{"path": file.path, "bytes": file.bytes, "hash": file.hash} for file in files],
        **provenance,
        "tools": {"hpc_imagenet": __version__, "python": platform.python_version(), **tools},
        "counts": {
            of.wnid: {split: counts[split][label] for split in splits} for label, of in enumerate(classes)
        },
    }


def render_page(certificate: Mapping[str, Any], classes: Sequence[ClassNames]) -> str:
    """Return the certificate as a page of Markdown."""
    of = certificate
    splits = list(of["images"])
    lines = [f"# {of['name']}, content {of['content']}", ""]
    lines += _table(
        ["", *splits],
        [
            ["images", *(f"{of['images'][split]:,}" for split in splits)],
            ["bytes", *(f"{of['bytes'][split]:,}" for split in splits)],
            *(
                [words, *(_range(of["sizes"][split][key]) for split in splits)]
                for key, words in (
                    ("width", "width, px"),
                    ("height", "height, px"),
                    ("bytes", "bytes an image"),
                )
            ),
        ],
    )
    lines += ["", "Least, median and greatest; sizes as the files' headers have them.", ""]
    lines += ["## Short sides", ""]
    bins = list(of["sizes"][splits[0]]["short_side"])
    lines += _table(
        ["px", *splits],
        [[b, *(f"{of['sizes'][split]['short_side'][b]:,}" for split in splits)] for b in bins],
    )
    lines += ["", "## Oddities", "", "Images that want care when they are decoded; all of them are in.", ""]
    rows = []
    for words in FLAG_NAMES.values():
        if any(words in of["oddities"][split] for split in splits):
            rows.append([words, *(f"{of['oddities'][s].get(words, {}).get('images', 0):,}" for s in splits)])
    lines += _table(["", *splits], rows) if rows else ["None."]
    few = [
        f"- {words}: {', '.join(found['named'])}"
        for split in splits
        for words, found in of["oddities"][split].items()
        if found["named"]
    ]
    lines += ["", *few] if few else []
    if of["skipped"]:
        lines += ["", "## Left out: they cannot be decoded", ""]
        lines += [f"- {image}" for image in of["skipped"]]
    lines += ["", "## Files", ""]
    lines += _table(
        ["file", "bytes", "hash"], [[f["path"], f"{f['bytes']:,}", f["hash"]] for f in of["files"]]
    )
    lines += ["", "## Where it comes from", ""]
    lines += _table(["", ""], [["source", of["source"]], *([k, v] for k, v in of["archives"].items())])
    lines += ["", "Processed with: " + ", ".join(f"{k} {v}" for k, v in of["process"].items()) + ". "]
    lines += ["By: " + ", ".join(f"{k} {v}" for k, v in of["tools"].items()) + "."]
    lines += ["", "## Classes", ""]
    lines += _table(
        ["label", "wnid", "names", *splits],
        [
            [label, one.wnid, ", ".join(one.names), *(f"{of['counts'][one.wnid][s]:,}" for s in splits)]
            for label, one in enumerate(classes)
        ],
    )
    return "\n".join(lines) + "\n"


def _sizes(entries: Index, facts: Array) -> dict[str, Any]:
    short = np.minimum(facts["width"], facts["height"])
    edges = [*_EDGES, int(np.iinfo(FACTS["width"]).max) + 1]
    counted = np.histogram(short, edges)[0].tolist()
    labels = [f"{low} to {high - 1}" for low, high in itertools.pairwise(_EDGES)]
    labels.append(f"{_EDGES[-1]} and more")
    return {
        "width": _spread(facts["width"]),
        "height": _spread(facts["height"]),
        "bytes": _spread(entries["length"]),
        "short_side": dict(zip(labels, counted, strict=True)),
    }


def _spread(values: Array) -> list[int]:
    if not len(values):
        return [0, 0, 0]
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _oddities(facts: Array, names: Array) -> dict[str, Any]:
    found = {}
    for bit, words in FLAG_NAMES.items():
        rows = np.flatnonzero(facts["marks"] & bit)
        if len(rows) and bit != CORRUPT:
            named = [name.decode("utf-8", "backslashreplace") for name in names[rows].tolist()]
            found[words] = {"images": len(rows), "named": named if len(rows) <= _FEW else []}
    return found


def _range(spread: Sequence[int]) -> str:
    return " · ".join(f"{value:,}" for value in spread)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
