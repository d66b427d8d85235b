"""bad_batch.txt of a training that ended by a non-finite loss: the images of that step.

A line is the name of an image and, after a tab, its position in the train split. The position finds the
image: names are only in the headers of the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.io.atomic_files import atomic_write

BAD_BATCH_FILE = "bad_batch.txt"


def write_bad_batch(folder: Path, images: Sequence[tuple[str, int]]) -> Path:
    """Write names and positions of images into a run's folder; return the file."""
    path = folder / BAD_BATCH_FILE
    with atomic_write(path) as file:
        file.write("".join(f"{name}\t{position}\n" for name, position in images).encode(errors="replace"))
    return path


def read_bad_batch(folder: Path) -> list[tuple[str, int]]:
    """Return names and positions of the images; empty if there is no such file, without damaged lines."""
    try:
        text = (folder / BAD_BATCH_FILE).read_bytes().decode(errors="replace")
    except OSError:
        return []
    lines = (line.rpartition("\t") for line in text.splitlines())
    return [(name, int(position)) for name, _, position in lines if name and position.isdecimal()]
