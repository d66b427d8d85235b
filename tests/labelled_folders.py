"""Folders of labelled images, for tests of what is made of them."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import encoded

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.layouts.image_finder import ImageFile, LabelledImages
from hpc_imagenet.stages.work import download


@functools.cache
def _composed() -> Config:
    return compose(["dataset=images", "dataset.name=numbers", "dataset.source=x", "workspace=x"])[0]


def config_of(workspace: Path, source: Path, layout: str = "index") -> Config:
    config = copy.deepcopy(_composed())
    config.workspace, config.dataset.source = str(workspace), str(source)
    config.download.retries, config.download.connections = 0, 2
    config.process.layout, config.process.workers = layout, 1
    return config


def add(
    root: Path, splits: dict[str, list[ImageFile]], split: str, path: str, label: int, data: bytes
) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    stat = file.stat()
    splits.setdefault(split, []).append(ImageFile(path, label, stat.st_size, stat.st_mtime_ns))


def use(found: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> LabelledImages:
    monkeypatch.setattr(download, "find_images", lambda folder, dataset, threads: found)
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def rotated(orientation: int, size: tuple[int, int], kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(kind, size=size, exif=exif)
