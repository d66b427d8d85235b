"""A tiny datastore, and the settings of searches on it that take a second a trial."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from command_line import Cli
from PIL import Image
from sample_dataset import file_of, write_tar

from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import ClassNames, Manifest, Split

SETTINGS = (
    *("datastore.name=tiny", "recipe=demo", "model=squeezenet1_1", "recipe.epochs=2", "recipe.size=32"),
    *("recipe.val_size=32", "recipe.val_resize=32", "recipe.global_batch=8", "tracker=null"),
)
SPACE = ("recipe.learning_rate=tag(log, interval(0.0001,0.1))", "recipe.label_smoothing=0.0,0.1")


def write_datastore(workspace: Path, images: int = 24) -> None:
    """Write a complete datastore version with noisy images of two colours."""
    folder = workspace / "datastores/tiny/v1"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    shards, splits = [], {}
    for shard, name in enumerate(("train", "val")):
        members = []
        for i in range(images):
            pixels = noise.integers(0, 100, (32, 32, 3), np.uint8)
            pixels[..., i % 2] += 150
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            members.append((f"{name}_{i}.JPEG", buffer.getvalue()))
        locations = write_tar(folder / f"{name}.tar", members)
        entries = [(offset, size, i % 2, shard) for i, (offset, size) in enumerate(locations)]
        write_index(folder / f"{name}.npy", np.array(entries, ENTRY))
        shards.append(file_of(folder / f"{name}.tar", f"{name}.tar"))
        splits[name] = Split(file_of(folder / f"{name}.npy", f"{name}.npy"), images)
    classes = (ClassNames("n00000001", ("red",)), ClassNames("n00000002", ("green",)))
    Manifest("tiny", "0", "", classes, tuple(shards), splits).save(folder)


def trials(cli: Cli, name: str) -> list[dict[str, Any]]:
    """Return the records of a study's trials."""
    folder = cli.workspace / "runs/.search" / name / "trials"
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(records, key=lambda each: (each["rung"], each["trial"]))
