"""A small dataset of real images, and configs of tiny trainings on it."""

from __future__ import annotations

import copy
import functools
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader

CLASSES = 10


def write_store(folder: Path, counts: dict[str, int], size: int = 32) -> DatasetReader:
    """Write the first `counts` digits of scikit-learn per split, as JPEGs in one tar per split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    order = np.arange(len(digits.target))
    parts = dict(
        zip(
            ("train", "val"),
            train_test_split(order, test_size=360, stratify=digits.target, random_state=0),
            strict=True,
        )
    )
    parts["test"] = parts["val"][::-1]
    folder.mkdir(parents=True)
    shards, splits = [], {}
    for shard, (name, count) in enumerate(counts.items()):
        entries = np.zeros(count, ENTRY)
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i, sample in enumerate(parts[name][:count]):
                pixels = (digits.images[sample] * 255 / 16).astype(np.uint8)
                buffer = io.BytesIO()
                image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
                image.save(buffer, "JPEG", quality=95)
                info = tarfile.TarInfo(f"{name}_{i:04d}.JPEG")
                info.size = buffer.tell()
                buffer.seek(0)
                entries[i] = (tar.offset + tarfile.BLOCKSIZE, info.size, digits.target[sample], shard)
                tar.addfile(info, buffer)
        write_index(folder / f"{name}.npy", entries)
        shards.append(_file(folder / f"{name}.tar"))
        splits[name] = Split(_file(folder / f"{name}.npy"), count)
    categories = tuple(ClassNames(f"n{digit:08d}", (str(digit),)) for digit in range(CLASSES))
    Manifest("digits", "0", "", categories, tuple(shards), splits).save(folder)
    return DatasetReader(folder)


def _file(path: Path) -> File:
    return File(path.name, path.stat().st_size, "md5:")


@functools.cache
def _composed() -> Config:
    # All other settings have the defaults in conf/.
    model = ("model.name=squeezenet1_1", "model.stem=auto")  # has dropout, so random states matter
    return compose(["dataset=digits", "cluster=foreground", "cluster.gpus_per_node=0", *model])[0]


def tiny_config(**recipe: Any) -> Config:
    """Return a config of two epochs of five steps on images of 16 px; `recipe` overrides settings."""
    config = copy.deepcopy(_composed())
    config.seed, config.workspace = 3, "unused"
    config.stage.name, config.loader.workers = "train", 0
    config.train.checkpoint_every_minutes = 60
    small = {
        **{"epochs": 2, "global_batch": 8, "optimizer": "sgd", "learning_rate": 0.01},
        **{"momentum": 0.9, "weight_decay": 1e-4, "norm_decay": False, "norm_momentum": None},
        **{"warmup_epochs": 0.5, "label_smoothing": 0.1, "size": 16, "val_resize": 16},
        **{"val_size": 16, "crop_scale": 0.5, "flip": 0.5, "precision": "auto"},
    }
    config.recipe = replace(config.recipe, **{**small, **recipe})
    return config
