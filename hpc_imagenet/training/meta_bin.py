"""meta.bin: the file in which torchvision's ImageNet keeps the classes' names and the labels of val."""

from __future__ import annotations

import io

import torch

FILE = "meta.bin"


def encode(names: dict[str, tuple[str, ...]], val_wnids: list[str]) -> bytes:
    """Return the bytes of a meta.bin, equal in content to what torchvision makes of the development kit.

    It loads with `torch.load(…, weights_only=True)`.
    Source: torchvision.datasets.imagenet.parse_devkit_archive.

    Args:
        names: wnid → the words for that class.
        val_wnids: the class of every val image, in the order of the file names.
    """
    buffer = io.BytesIO()
    torch.save((names, val_wnids), buffer)
    return buffer.getvalue()
