"""`fit`: results, determinism, accumulation, ranks, and errors as one line."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from outcomes import STEPS, assert_same_training, finish, lines, new_run, results, saved, tasks, train
from pytorch_lightning.utilities import rank_zero_only

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.loading.image_order import permutation
from hpc_imagenet.training.module import Classifier
from hpc_imagenet.training.prototype import Prototype


@pytest.mark.slow
def test_result_progress_and_metrics_of_a_training(
    tiny: DatasetReader, reference: tuple[Run, dict[str, Any]]
) -> None:
    run, result = reference
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert result["top1"] == pytest.approx(round(result["top1"] * 13) / 13)
    assert result["epochs"] == 2
    assert result["images_per_second"] > 0
    assert saved(run)["global_step"] == 2 * STEPS
    assert run.progress["done"] == run.progress["total"] == 80
    assert run.progress["note"].startswith("epoch 2/2, top-1 ")
    validations = [line for line in lines(run) if line["val_top1"]]
    assert [(line["step"], line["epoch"]) for line in validations] == [("5", "0"), ("10", "1")]
    assert float(validations[-1]["val_top1"]) == pytest.approx(result["top1"])
    with (run.folder / "metrics.csv").open(newline="") as file:
        waits = [float(line["data_wait"]) for line in csv.DictReader(file) if line["data_wait"]]
    assert len(waits) == 2
    assert all(0 <= wait <= 1 for wait in waits)
    assert list((run.folder / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_same_seed_gives_identical_training(
    config, tiny: DatasetReader, tmp_path: Path, reference: tuple[Run, dict[str, Any]]
) -> None:
    again = new_run(tmp_path / "again")
    assert results(train(config(), tiny, again)) == results(reference[1])
    assert_same_training(reference[0], again)
    other = new_run(tmp_path / "other")
    other_seed = config()
    other_seed.seed = 4
    train(other_seed, tiny, other)
    with pytest.raises(AssertionError):
        assert_same_training(reference[0], other)


def test_val_classes_csv_has_accuracy_per_class(
    tiny: DatasetReader, reference: tuple[Run, dict[str, Any]]
) -> None:
    run, result = reference
    with (run.folder / "val_classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"n{digit:08d}" for digit in range(10)]
    labels = tiny.open_split("val").index["label"].tolist()
    assert [int(row["images"]) for row in rows] == [labels.count(digit) for digit in range(10)]
    for name in ("top1", "top5"):
        hits = sum(float(row[name]) * int(row["images"]) for row in rows if row["images"] != "0")
        assert hits / 13 == pytest.approx(result[name], abs=1e-4)


@pytest.mark.slow
def test_non_finite_loss_aborts_with_step_and_images(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    original = Classifier.training_step

    def spoilt(self: Classifier, batch: Any, batch_idx: int) -> Any:
        return original(self, batch, batch_idx) * (float("nan") if self.global_step == 6 else 1)

    monkeypatch.setattr(Classifier, "training_step", spoilt)
    run = new_run(tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"recipe.learning_rate=0.01: the loss at step 7 \(epoch 2\) is not fin.*train_0\d+.JPEG",
    ):
        train(config(), tiny, run)
    order = permutation(40, 3, 1)[8:16]
    names = [tiny.open_split("train").name(i) for i in order.tolist()]
    lines = [line.split("\t") for line in (run.folder / "bad_batch.txt").read_text().splitlines()]
    assert lines == [[name, str(i)] for name, i in zip(names, order.tolist(), strict=True)]
    assert saved(run)["global_step"] == STEPS
    assert all(torch.isfinite(value).all() for value in saved(run)["state_dict"].values())


@pytest.mark.slow
def test_unreadable_image_fails_or_is_skipped(config, tiny: DatasetReader, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "v1")
    offset, length, *_ = tiny.open_split("train").index[7].item()
    with (tmp_path / "v1" / "train.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * length)
    changed = config()
    changed.loader.workers = 1
    run = new_run(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(changed, DatasetReader(tmp_path / "v1"), run)
    assert str(caught.value).startswith(f"{tmp_path}/v1: image train_0007.JPEG cannot be read")
    assert "\n" not in str(caught.value)
    changed.loader.on_corrupt = "skip"
    result = train(changed, DatasetReader(tmp_path / "v1"), run)
    assert result["skipped"] == 1
    assert result["loss"] < 10
    # A second attempt only validates, and takes the number from the checkpoint.
    assert train(changed, DatasetReader(tmp_path / "v1"), run)["skipped"] == 1


@pytest.mark.slow
def test_accumulate_gives_the_same_step(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    def train_accumulated(count: int, run: Run) -> None:
        changed = config()
        changed.model.options, changed.train.accumulate = {"dropout": 0}, count
        train(changed, tiny, run)

    one, two = new_run(tmp_path / "one"), new_run(tmp_path / "two")
    train_accumulated(1, one)
    signal_at(8)
    with pytest.raises(Preempted):
        train_accumulated(2, two)
    monkeypatch.undo()
    train_accumulated(2, two)
    for name, value in saved(one)["state_dict"].items():
        torch.testing.assert_close(saved(two)["state_dict"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_deterministic_does_not_change_identity_or_cpu_results(
    config, tiny: DatasetReader, tmp_path: Path, reference
) -> None:
    changed, run = config(), new_run(tmp_path / "run")
    changed.train.deterministic = True
    assert changed.training_identity() == config().training_identity()
    try:
        # CPU algorithms are deterministic anyway.
        assert results(train(changed, tiny, run)) == results(reference[1])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_missing_deterministic_algorithm_error(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    def refused(self: Classifier, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
        )

    monkeypatch.setattr(Classifier, "training_step", refused)
    line = (
        r"^train.deterministic=true: torch has no deterministic adaptive_avg_pool2d_backward_cuda .*=false or"
    )
    with pytest.raises(UserError, match=line):
        train(config(), tiny, new_run(tmp_path / "run"))


def test_global_batch_larger_than_train_split(config, tiny: DatasetReader, tmp_path: Path) -> None:
    changed = config(global_batch=41)
    for begin in (
        lambda: train(changed, tiny, new_run(tmp_path / "run")),
        lambda: Prototype(changed, mock.Mock(reader=tiny, ids=())),
    ):
        with pytest.raises(UserError, match=r"recipe.global_batch=41 is more than the 40 images of train"):
            begin()


@pytest.mark.slow
def test_two_ranks_match_one_rank(tiny: DatasetReader, tmp_path: Path, reference) -> None:
    """Without dropout and batch norm the weights differ only by the order of summation."""
    alone, shared = new_run(tmp_path / "alone"), new_run(tmp_path / "shared")
    # Accumulation on two ranks, with augmentations that depend on the seed and step only. One epoch, because
    # another order of summation soon changes the argmax of some pooling. With the random numbers of another
    # rank the loss would differ by 6e-3.
    augmented = {"recipe": {"augment": "trivial", "erase": 0.5, "ema": 0.8, "epochs": 1}, "dropout": 0}
    started = (
        tasks(tiny, alone, dropout=0),
        tasks(tiny, shared, size=2, dropout=0),
        tasks(tiny, new_run(tmp_path / "a"), **augmented),
        tasks(tiny, new_run(tmp_path / "b"), size=2, accumulate=2, **augmented),
    )
    (one,), two, (one_augmented,), two_augmented = map(finish, started)
    assert results(two[0]) == results(two[1])
    a, b = saved(alone), saved(shared)
    assert a["global_step"] == b["global_step"] == 2 * STEPS
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-3, atol=1e-4)
    assert two[0]["top1"] == pytest.approx(one["top1"])
    assert two[0]["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert one_augmented["loss"] != one["loss"]
    assert two_augmented[0]["loss"] == pytest.approx(one_augmented["loss"], rel=1e-3)
    assert "Warning" not in "".join(path.read_text() for path in tmp_path.glob("b-*.err"))
    # Validation of one network on 13 images, on one and on two ranks.
    shutil.copytree(alone.folder, tmp_path / "copy")
    again = finish(tasks(tiny, Run(tmp_path / "copy"), size=2, dropout=0))
    assert again[0]["top1"] == one["top1"]
    assert again[0]["top5"] == one["top5"]
    assert again[0]["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "ranks"),
    [(2, 2), (1, 4)],  # DDP has no static graph with accumulation, nor with more than two ranks
)
def test_ranks_train_a_network_with_unused_weights(
    accumulate: int, ranks: int, tiny: DatasetReader, tmp_path: Path
) -> None:
    setting = {"model": "unused_weights:net", "accumulate": accumulate, "recipe": {"epochs": 1}}
    alone, shared = (
        finish(tasks(tiny, new_run(tmp_path / str(size)), size, **setting))[0]["loss"] for size in (1, ranks)
    )
    assert shared == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_variables_of_an_outer_slurm_job_are_ignored(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    outer = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "RANK": "2"}
    for name, value in {**outer, "SLURM_JOB_NAME": "outer", "SLURM_CPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # Lightning reads it from the variables when imported
    run = new_run(tmp_path / "run")
    train(config(epochs=1), tiny, run)
    assert saved(run)["global_step"] == STEPS
    assert len(lines(run)) == 2
