"""Scoring a checkpoint gives what the validation of its training gave, on any number of ranks."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import finish, new_run, results, tasks
from tiny_training import CLASSES, write_store

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config, Evaluate
from hpc_imagenet.datastore.index import write_index
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.checkpoints import fingerprint
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.score import score

pytestmark = pytest.mark.slow


def evaluation(config: Config, run: Run, checkpoint: str = "last", split: str = "val") -> Config:
    path = run.folder / "checkpoints" / f"{checkpoint}.ckpt"
    config.evaluate = Evaluate(str(path), fingerprint(path), split)
    return config


@pytest.mark.parametrize("size", [2, 3])
def test_every_number_of_ranks_gives_the_validation_of_the_training(
    size: int, tiny: DatasetReader, tmp_path: Path, reference: tuple[Run, dict[str, Any]]
) -> None:
    """13 images are no multiple of ranks or batches; each counts once."""
    checkpoint = str(reference[0].folder / "checkpoints" / "last.ckpt")
    scores = finish(tasks(tiny, new_run(tmp_path / "run"), size, score=checkpoint))
    for one in scores:
        assert results(one) == pytest.approx(results(reference[1]), rel=1e-5)
        assert (one["images"], one["skipped"], one["step"]) == (13, 0, 10)
    with (tmp_path / "run" / "val_classes.csv").open(newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 13


def test_one_process_gives_equal_bits(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, reference: tuple[Run, dict[str, Any]]
) -> None:
    run = new_run(tmp_path / "run")
    assert results(score(evaluation(config(), reference[0]), tiny, run, DistEnv())) == results(reference[1])
    assert run.progress["done"] == run.progress["total"] == 13


def test_classes_are_found_by_their_ids(
    config: Callable[..., Config], tmp_path: Path, reference: tuple[Run, dict[str, Any]]
) -> None:
    store = write_store(tmp_path / "v1", {"test": 40})
    run = new_run(tmp_path / "run")
    expected = results(score(evaluation(config(), reference[0], split="test"), store, run, DistEnv()))
    order = np.random.default_rng(0).permutation(CLASSES)  # order[label] is the old label
    manifest, index = store.manifest, np.array(store.open_split("test").index)
    index["label"] = np.argsort(order)[index["label"]]
    write_index(store.folder / "test.npy", index)
    replace(manifest, classes=tuple(manifest.classes[old] for old in order)).save(store.folder)
    again = score(
        evaluation(config(), reference[0], split="test"), DatasetReader(store.folder), run, DistEnv()
    )
    assert results(again) == pytest.approx(expected)
    replace(manifest, classes=tuple(replace(each, wnid=f"x{each.wnid}") for each in manifest.classes)).save(
        store.folder
    )
    with pytest.raises(UserError, match="does not know 10 of 10 classes, such as xn00000000"):
        score(evaluation(config(), reference[0], split="test"), DatasetReader(store.folder), run, DistEnv())


def test_another_size_gives_another_score(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, reference: tuple[Run, dict[str, Any]]
) -> None:
    run = new_run(tmp_path / "run")
    larger = evaluation(config(val_size=32, val_resize=32), reference[0])
    assert results(score(larger, tiny, run, DistEnv())) != results(reference[1])


def test_a_checkpoint_that_is_replaced_while_its_job_starts_is_not_scored(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, reference: tuple[Run, dict[str, Any]]
) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(reference[0].folder, copy.folder)
    submitted = evaluation(config(), copy)
    (copy.folder / "checkpoints" / "previous.ckpt").replace(copy.folder / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is another checkpoint than the one submitted"):
        score(submitted, tiny, new_run(tmp_path / "run"), DistEnv())
