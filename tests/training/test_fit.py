from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import STEPS, assert_same_training, begin, finish, lines, results, saved, tasks, train
from pytorch_lightning.utilities import rank_zero_only

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.loading.sampler import permutation
from hpc_imagenet.training.module import Classifier


def test_a_training_tells_what_came_out(tiny: DatasetReader, whole: tuple[Run, dict[str, Any]]) -> None:
    run, result = whole
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
    assert list((run.folder / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_a_seed_decides_all(
    config, tiny: DatasetReader, tmp_path: Path, whole: tuple[Run, dict[str, Any]]
) -> None:
    again = begin(tmp_path / "again")
    assert results(train(config(), tiny, again)) == results(whole[1])
    assert_same_training(whole[0], again)
    other = begin(tmp_path / "other")
    different = config()
    different.seed = 4
    train(different, tiny, other)
    with pytest.raises(AssertionError):
        assert_same_training(whole[0], other)


def test_every_class_is_told(tiny: DatasetReader, whole: tuple[Run, dict[str, Any]]) -> None:
    run, result = whole
    with (run.folder / "val_classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"n{digit:08d}" for digit in range(10)]
    labels = tiny.open_split("val").index["label"].tolist()
    assert [int(row["images"]) for row in rows] == [labels.count(digit) for digit in range(10)]
    for name in ("top1", "top5"):
        hits = sum(float(row[name]) * int(row["images"]) for row in rows if row["images"] != "0")
        assert hits / 13 == pytest.approx(result[name], abs=1e-4)


def test_a_loss_that_is_no_number_stops_at_its_step(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    original = Classifier.training_step

    def spoilt(self: Classifier, batch: Any, batch_idx: int) -> Any:
        return original(self, batch, batch_idx) * (float("nan") if self.global_step == 6 else 1)

    monkeypatch.setattr(Classifier, "training_step", spoilt)
    run = begin(tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"recipe.learning_rate=0.01: the loss at step 7 \(epoch 2\) is no num.*train_0\d+.JPEG",
    ):
        train(config(), tiny, run)
    order = permutation(40, 3, 1)[8:16]
    names = [tiny.open_split("train").name(i) for i in order.tolist()]
    assert (run.folder / "bad_batch.txt").read_text().split() == names
    assert saved(run)["global_step"] == STEPS
    assert all(torch.isfinite(value).all() for value in saved(run)["state_dict"].values())


def test_an_unreadable_image_is_one_line(config, tiny: DatasetReader, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "v1")
    offset, length, *_ = tiny.open_split("train").index[7].item()
    with (tmp_path / "v1" / "train.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * length)
    asked = config()
    asked.loader.workers = 1
    run = begin(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(asked, DatasetReader(tmp_path / "v1"), run)
    assert str(caught.value).startswith(f"{tmp_path}/v1: image train_0007.JPEG cannot be read")
    assert "\n" not in str(caught.value)
    asked.loader.on_corrupt = "skip"
    result = train(asked, DatasetReader(tmp_path / "v1"), run)
    assert result["skipped"] == 1
    assert result["loss"] < 10
    # An attempt that only looks whether all is done read none of them.
    assert train(asked, DatasetReader(tmp_path / "v1"), run)["skipped"] == 1


@pytest.mark.slow
def test_a_step_in_parts_is_the_same_step(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    def parts(count: int, run: Run) -> None:
        asked = config()
        asked.model.options, asked.train.accumulate = {"dropout": 0}, count
        train(asked, tiny, run)

    one, two = begin(tmp_path / "one"), begin(tmp_path / "two")
    parts(1, one)
    signal_at(8)
    with pytest.raises(Preempted):
        parts(2, two)
    monkeypatch.undo()
    parts(2, two)
    for name, value in saved(one)["state_dict"].items():
        torch.testing.assert_close(saved(two)["state_dict"][name], value, rtol=1e-3, atol=1e-4)


def test_deterministic_algorithms_are_another_way_to_the_same_run(
    config, tiny: DatasetReader, tmp_path: Path, whole
) -> None:
    asked, run = config(), begin(tmp_path / "run")
    asked.train.deterministic = True
    assert asked.training() == config().training()
    try:
        assert results(train(asked, tiny, run)) == results(whole[1])  # on a CPU there are no others
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_without_a_deterministic_algorithm_is_one_line(
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
        train(config(), tiny, begin(tmp_path / "run"))


def test_more_images_a_step_than_there_are(config, tiny: DatasetReader, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe.global_batch=41 is more than the 40 images of train"):
        train(config(global_batch=41), tiny, begin(tmp_path / "run"))


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(tiny: DatasetReader, tmp_path: Path, whole) -> None:
    """Without dropout and batch norm the weights agree as closely as sums in another order can."""
    alone, shared = begin(tmp_path / "alone"), begin(tmp_path / "shared")
    # A step in parts on two ranks, with the treatment of images that all worlds have in common. The first
    # epoch: sums in another order soon send some maximum elsewhere. The rows of another rank are 6e-3 off.
    treated = {"recipe": {"augment": "trivial", "erase": 0.5, "ema": 0.8, "epochs": 1}, "dropout": 0}
    began = (
        tasks(tiny, alone, dropout=0),
        tasks(tiny, shared, size=2, dropout=0),
        tasks(tiny, begin(tmp_path / "a"), **treated),
        tasks(tiny, begin(tmp_path / "b"), size=2, accumulate=2, **treated),
    )
    (one,), two, (one_t,), two_t = map(finish, began)
    assert results(two[0]) == results(two[1])
    a, b = saved(alone), saved(shared)
    assert a["global_step"] == b["global_step"] == 2 * STEPS
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-3, atol=1e-4)
    assert two[0]["top1"] == pytest.approx(one["top1"])
    assert two[0]["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert one_t["loss"] != one["loss"]
    assert two_t[0]["loss"] == pytest.approx(one_t["loss"], rel=1e-3)
    # Exact validation: the 13 images of one network, over one rank and over two.
    shutil.copytree(alone.folder, tmp_path / "copy")
    again = finish(tasks(tiny, Run(tmp_path / "copy"), size=2, dropout=0))
    assert again[0]["top1"] == one["top1"]
    assert again[0]["top5"] == one["top5"]
    assert again[0]["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_variables_of_an_outer_slurm_job_change_nothing(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    outer = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "RANK": "2"}
    for name, value in {**outer, "SLURM_JOB_NAME": "outer", "SLURM_CPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # what Lightning makes of them when it is imported
    run = begin(tmp_path / "run")
    train(config(epochs=1), tiny, run)
    assert saved(run)["global_step"] == STEPS
    assert len(lines(run)) == 2
