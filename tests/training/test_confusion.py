from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import finish, new_run, tasks

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.confusion import MAX_CLASSES, MAX_ROWS, ConfusionCounts, write_confused_classes
from hpc_imagenet.training.loading.sampler import PADDING, BatchShare
from hpc_imagenet.training.module import Classifier


def rows_of(path: Path) -> list[list[int]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["label", "predicted", "images"]
    return [list(map(int, row)) for row in rows]


def test_pairs_are_counted_without_padding() -> None:
    counts = ConfusionCounts(4)
    assert counts.total() is None
    counts.update(torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 0, PADDING]))
    counts.update(torch.tensor([2]), torch.tensor([3]))
    total = counts.total()
    assert total is not None
    assert total.nonzero().tolist() == [[0, 0], [0, 1], [3, 2]]
    assert (total[0, 1], total.sum()) == (2, 4)
    counts.reset()
    assert counts.total() is None


def test_file_is_bounded_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "val_confusion.csv"
    write_confused_classes(path, torch.tensor([[9, 1, 0], [3, 9, 2], [0, 0, 9]]))
    assert rows_of(path) == [[1, 0, 3], [1, 2, 2], [0, 1, 1]]
    write_confused_classes(path, torch.ones(1500, 1500, dtype=torch.int32))
    rows = rows_of(path)
    assert len(rows) == MAX_ROWS
    assert all(label != predicted for label, predicted, _ in rows)
    assert path.stat().st_size < 100_000


def test_too_many_classes_are_not_counted() -> None:
    counts = ConfusionCounts(MAX_CLASSES + 1)
    counts.update(torch.tensor([0]), torch.tensor([0]))
    assert counts.total() is None


def wrong_images(run: Run) -> int:
    with (run.folder / "val_classes.csv").open(newline="") as file:
        return sum(
            round(int(row["images"]) * (1 - float(row["top1"])))
            for row in csv.DictReader(file)
            if row["top1"]
        )


def test_equal_logits_count_as_one_class_everywhere(config) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 100))
    torch.nn.init.zeros_(network[1].weight)
    torch.nn.init.zeros_(network[1].bias)
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    module = Classifier(network, 100, config().recipe, 0, 1, BatchShare(100), 1, zero, one)
    module.validation_step((torch.zeros(100, 3, 2, 2, dtype=torch.uint8), torch.arange(100)), 0)
    total = module.confusion.total()
    assert total is not None
    assert total.diagonal().tolist() == module.val_metrics.compute()["counts"][1].tolist()


@pytest.mark.slow
def test_training_writes_its_confused_classes(reference: tuple[Run, dict[str, Any]]) -> None:
    run, _ = reference
    found = rows_of(run.folder / "val_confusion.csv")
    assert sum(images for *_, images in found) == wrong_images(run) > 0


@pytest.mark.slow
def test_ranks_are_summed(tiny: DatasetReader, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    finish(tasks(tiny, run, size=2))
    found = rows_of(run.folder / "val_confusion.csv")
    assert sum(images for *_, images in found) == wrong_images(run) > 0
