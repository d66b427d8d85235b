"""Small folders of labelled images, written from patterns of paths, and what must be found in them."""

from __future__ import annotations

import functools
import io
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.layouts.image_finder import LabelledImages, find_images
from hpc_imagenet.errors import UserError

Text = str | bytes


@dataclass
class Sample:
    """One layout: its files, the settings that it needs, and what must be found in it."""

    images: list[str]  # patterns for `expand`
    classes: str  # separated by |
    counts: tuple[int, int, int]  # train, val, test
    files: dict[str, Text] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of Dataset
    skipped: dict[str, int] = field(default_factory=dict)  # a part of what is expected
    warning: str = ""  # a part of one


def expand(pattern: str) -> list[str]:
    """Return the paths of a pattern: `{a,b}` are alternatives, `{1..3}` numbers."""
    parts = []
    for number, part in enumerate(re.split(r"\{([^}]*)\}", pattern)):
        if number % 2 == 0:
            parts.append([part])
        elif match := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            parts.append([str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2]) + 1)])
        else:
            parts.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*parts)]


@functools.cache
def image_bytes(ending: str, colour: int) -> bytes:
    """Return a small image in the format of an ending."""
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM"}.get(
        ending, ending.upper()
    )
    Image.new("L" if ending == "pgm" else "RGB", (9, 7), colour).save(buffer, kind)
    return buffer.getvalue()


def write_sample(root: Path, sample: Sample) -> Path:
    """Write a sample's folder."""
    paths = [path for pattern in sample.images for path in expand(pattern)]
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(path.rpartition(".")[2].lower(), number % 256))
    for path, content in sample.files.items():
        file = root / path
        if path.endswith("/"):
            file.mkdir(parents=True, exist_ok=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def lines(*patterns: str) -> str:
    """Return the paths of patterns, one per line."""
    return "".join(f"{path}\n" for pattern in patterns for path in expand(pattern))


def mat(**variables: Any) -> bytes:
    """Return a MATLAB file."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def cells(*values: Any) -> Any:
    """Return a column of MATLAB cells."""
    import numpy as np

    column = np.empty((len(values), 1), object)
    for number, value in enumerate(values):
        column[number, 0] = value
    return column


def cars(*rows: tuple[str, int]) -> bytes:
    """Return annotations of Stanford Cars."""
    import numpy as np

    annotations = np.empty((1, len(rows)), [("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
    for number, (name, label) in enumerate(rows):
        annotations[0, number] = (1, label, name)
    return mat(annotations=annotations)


Files = dict[str, Text]


def dataset_of(**settings: Any) -> Dataset:
    """Return the settings of a dataset of labelled images."""
    return Dataset(name="own", source="x", format="images", **settings)


def find(root: Path, images: list[str], files: Files | None = None, **settings: Any) -> LabelledImages:
    """Write a folder, and return the images that are found in it."""
    write_sample(root, Sample(images, "", (0, 0, 0), files or {}))
    return find_images(root, dataset_of(**settings), 2)


def refusal(root: Path, images: list[str], files: Files | None = None, **settings: Any) -> str:
    """Write a folder as `find` does, and return the line that refuses it, with SOURCE for its path."""
    root.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        find(root, images, files, **settings)
    line = str(caught.value).replace(str(root), "SOURCE")
    assert "\n" not in line
    return line
