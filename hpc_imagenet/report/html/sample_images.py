"""Thumbnails of a datastore's images as data URIs for the page: val images of classes, named train images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.datastore.open_dataset import open_dataset
from hpc_imagenet.datastore.reader.dataset_reader import SplitReader
from hpc_imagenet.datastore.versions import Version

CLASSES = 48  # of a datastore, at most
PER_CLASS = 3
SIDE = 96  # px, the longer side
_QUALITY = 70  # of the JPEGs: about 3 kB each


def thumbnails(version: Version, labels: Sequence[int]) -> dict[int, list[str]]:
    """Return data URIs of the first val images of each class, by label.

    Args:
        version: the datastore; of one behind ssh nothing can be read.
        labels: the classes; those after the first `CLASSES` are left out.

    Raises:
        UserError: the datastore cannot be read from this machine.
        OSError: the same, of a folder.
    """
    with open_dataset(version, Cluster(executor="local"), stages=False) as store:
        reader = store.open_split("val")
        positions = {
            label: np.flatnonzero(reader.index["label"] == label)[:PER_CLASS].tolist()
            for label in dict.fromkeys(labels[:CLASSES])
        }
        uris = {label: [_thumbnail(reader, i) for i in found] for label, found in positions.items()}
    return {label: [uri for uri in found if uri] for label, found in uris.items()}


def named_thumbnails(version: Version, images: Sequence[tuple[str, int]]) -> list[str]:
    """Return a data URI of each train image, given by name and position; empty if it is another image by now.

    Args:
        version: the datastore, as in `thumbnails`.
        images: names and positions in the split.

    Raises:
        UserError: the datastore cannot be read from this machine.
        OSError: the same, of a folder.
    """
    with open_dataset(version, Cluster(executor="local"), stages=False) as store:
        reader = store.open_split("train")
        return [
            _thumbnail(reader, position) if position < len(reader) and reader.name(position) == name else ""
            for name, position in images
        ]


def _thumbnail(reader: SplitReader, position: int) -> str:
    """Return one image, or an empty string if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(reader.read(position)[0])) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
