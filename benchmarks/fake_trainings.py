"""Folders of trainings that never ran: a sweep on ImageNet, to measure and test the report.

Their results are plausible, but none was measured.
"""

from __future__ import annotations

import csv
import io
import math
import random
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpc_imagenet.config.compose import compose
from hpc_imagenet.datastore.index import ENTRY, write_index
from hpc_imagenet.datastore.manifest import ClassNames, File, Manifest, Split
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.report.published import published_accuracies
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING
from hpc_imagenet.runs.store import RunStore

MODELS = ("resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16")
STATES = (*[FINISHED] * 17, FAILED, RUNNING, QUEUED)
REASONS = {
    FAILED: "out of memory at step 812: 512 images at a time are too many",
    CANCELLED: "by the cancel command",
}
STEPS = 1251  # of an epoch


def write_trainings(
    workspace: Path, count: int, classes: int = 1000, epochs: int = 90, seed: int = 0
) -> None:
    """Write `count` run folders, and a datastore with three val images of each class."""
    bits, store = random.Random(seed), RunStore(workspace)
    names = write_datastore(workspace / "datastores" / "imagenet" / "v1", classes)
    overrides = ["dataset=imagenet", "cluster=slurm", "cluster.gpus_per_node=8", f"workspace={workspace}"]
    (config,) = compose([*overrides, f"datastore.url={workspace / 'datastores'}", f"recipe.epochs={epochs}"])
    frozen = asdict(config)
    frozen["stage"]["name"] = "train"
    frozen["datastore"] |= {"version": 1, "content": "fa4e0000"}
    for number in range(count):
        model = MODELS[number % len(MODELS)]
        frozen["model"]["name"], frozen["seed"] = model, number // len(MODELS)
        frozen["recipe"]["learning_rate"] = bits.choice((0.05, 0.1, 0.2, 0.4))
        frozen["recipe"]["weight_decay"] = bits.choice((1e-4, 1e-4, 5e-5))
        info = {"stage": "train", "label": model, "model": model, "needs": []}
        run = store.create(f"{number:08x}-{model}", frozen, info)
        state = STATES[number % len(STATES)]
        _write_attempt(run.folder, number, state, model, bits, epochs)
        if state == QUEUED:
            continue
        final = _final_accuracy(model, frozen["recipe"]["learning_rate"], bits)
        done = epochs if state == FINISHED else bits.randrange(1, epochs)
        _write_metrics(run.folder / "metrics.csv", final, done, epochs, bits)
        if state == FINISHED:
            _write_classes(run.folder, names, final, bits)


def write_datastore(folder: Path, classes: int) -> list[tuple[str, str]]:
    """Write a version with three val images of each class; return the ids and names of the classes."""
    folder.mkdir(parents=True)
    names = [(f"n{label:08d}", f"class number {label}, of a test") for label in range(classes)]
    entries, noise = np.zeros(3 * classes, ENTRY), np.random.default_rng(0)
    with tarfile.open(folder / "val.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(3 * classes):
            pixels = noise.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"val_{number}.JPEG")
            info.size = buffer.tell()
            buffer.seek(0)
            entries[number] = (tar.offset + tarfile.BLOCKSIZE, info.size, number % classes, 0)
            tar.addfile(info, buffer)
    write_index(folder / "val.npy", entries)
    shard, index = (File(name, (folder / name).stat().st_size, "md5:") for name in ("val.tar", "val.npy"))
    named = tuple(ClassNames(wnid, tuple(text.split(", "))) for wnid, text in names)
    splits = {"val": Split(index, len(entries))}
    Manifest("imagenet", "fa4e0000", "2026-03-01T00:00:00+00:00", named, (shard,), splits).save(folder)
    return names


def _final_accuracy(model: str, rate: float, bits: random.Random) -> float:
    published = published_accuracies()[model][0].top1
    return published - 0.03 * abs(math.log2(rate / 0.1)) + bits.gauss(0, 0.004)


def _write_attempt(
    folder: Path, number: int, state: str, model: str, bits: random.Random, epochs: int
) -> None:
    submitted = datetime.now(timezone.utc) - timedelta(hours=70) + timedelta(minutes=number)
    started = submitted + timedelta(minutes=bits.uniform(1, 90))
    hours = epochs * (0.05 + published_accuracies()[model][0].parameters / 5e8)
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    job = {"executor": "local", "host": "another-machine", "job_id": str(7000 + number)}
    write_json(
        attempt / "submitted.json", {**job, "time": submitted.isoformat(), "code": {"version": "0.1.0"}}
    )
    if state == QUEUED:
        return
    start: dict[str, Any] = {"host": f"node{number % 16}", "restarts": 0}
    if number % 9 == 0:  # requeued once
        stopped, again = started + timedelta(hours=hours / 2), started + timedelta(hours=hours / 2 + 3)
        start["earlier"] = [{"host": "node3", "time": started.isoformat(), "stopped": stopped.isoformat()}]
        start["restarts"], started, hours = 1, again, hours / 2
    write_json(attempt / "started.json", {**start, "time": started.isoformat()})
    if state == RUNNING:
        return
    result = None
    if state == FINISHED:
        published = published_accuracies()[model][0]
        result = {"images_per_second": round(2e10 / published.parameters, 1), "epochs": epochs}
        result |= {"parameters": published.parameters, "seconds": 3600 * hours, "skipped": 0}
    ended = (started + timedelta(hours=hours)).isoformat()
    outcome = {"state": state, "reason": REASONS.get(state, ""), "result": result, "time": ended}
    write_json(attempt / "outcome.json", outcome)


def _write_metrics(path: Path, final: float, done: int, epochs: int, bits: random.Random) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("step", "epoch", "train_loss", "learning_rate", "images_per_second"),
                *("val_top1", "val_top5", "val_loss", "data_wait"),
            ]
        )
        for epoch in range(done):
            part = (epoch + 1) / epochs
            top1 = final * (1 - math.exp(-6 * part)) + bits.gauss(0, 0.003)
            rate = round(3000 + bits.gauss(0, 60), 1)
            for step in range(50, STEPS, 50):
                at = epoch * STEPS + step
                loss = round(7 * math.exp(-3 * at / STEPS / epochs) + bits.gauss(0.9, 0.08), 4)
                decayed = 0.05 * (1 + math.cos(math.pi * at / STEPS / epochs))
                writer.writerow([at, epoch, loss, decayed, "", "", "", "", ""])
            steps = (epoch + 1) * STEPS
            writer.writerow([steps, epoch, "", "", rate, "", "", "", round(bits.uniform(0, 0.04), 4)])
            loss = round(4 * (1 - top1) + 0.2, 5)
            writer.writerow(
                [steps, epoch, "", "", "", round(top1, 5), round(min(1, 1.2 * top1), 5), loss, ""]
            )
    if done == epochs:
        outcome = path.parent / "attempts" / "1" / "outcome.json"
        _add_result(outcome, {"top1": round(top1, 5), "top5": round(min(1, 1.2 * top1), 5), "loss": loss})


def _add_result(path: Path, values: dict[str, float]) -> None:
    import json

    outcome = json.loads(path.read_bytes())
    outcome["result"] = values | outcome["result"]
    write_json(path, outcome)


def _write_classes(folder: Path, names: list[tuple[str, str]], final: float, bits: random.Random) -> None:
    def rows() -> Iterator[tuple[int, float]]:
        for label in range(len(names)):
            hardness = (label * 7919 % 1000) / 1000  # the same classes are hard for every model
            yield (
                label,
                min(1.0, max(0.0, round(50 * (final + 0.5 * (0.5 - hardness) + bits.gauss(0, 0.05))) / 50)),
            )

    with (folder / "val_classes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "id", "names", "images", "top1", "top5"])
        found = list(rows())
        for label, top1 in found:
            writer.writerow([label, *names[label], 50, f"{top1:.4f}", f"{min(1, top1 + 0.2):.4f}"])
    with (folder / "val_confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "predicted", "images"])
        for label, top1 in sorted(found, key=lambda pair: pair[1]):
            if wrong := round(50 * (1 - top1)):
                others = [(label + step) % len(names) for step in (1, 7, 40)]
                writer.writerows(
                    zip([label] * 3, others, (wrong // 2 + 1, wrong // 4, wrong // 8), strict=True)
                )
