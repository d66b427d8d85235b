"""A training that was interrupted ends as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import STEPS, assert_same_training, begin, finish, results, saved, tasks, train

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import EXIT_REQUEUE, Preempted, UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.metrics import CsvLogger
from hpc_imagenet.training.module import Classifier


@pytest.mark.parametrize("step", [1, 4, 5, 6, 10])  # 5 and 10: an epoch's last
def test_going_on_after_a_signal_changes_nothing(
    step, config, tiny: DatasetReader, tmp_path: Path, whole, signal_at, monkeypatch
) -> None:
    run = begin(tmp_path / "run")
    before = signal.getsignal(signal.SIGUSR2)
    signal_at(step)
    asked = config()
    asked.loader.workers = step % 3  # the whole training had none
    with pytest.raises(Preempted, match=f"SIGUSR2 after step {step}, which is saved"):
        train(asked, tiny, run)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGUSR2) is before
    assert saved(run)["global_step"] == step
    assert results(train(config(), tiny, run)) == results(whole[1])
    assert_same_training(whole[0], run)


def test_going_on_in_the_middle_of_a_validation(
    config, tiny: DatasetReader, tmp_path: Path, whole, monkeypatch
) -> None:
    original, calls = Classifier.validation_step, iter(range(100))

    def noisy(self: Classifier, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if next(calls) == 1:  # the second of the first epoch's two batches
            os.kill(os.getpid(), signal.SIGTERM)

    run = begin(tmp_path / "run")
    monkeypatch.setattr(Classifier, "validation_step", noisy)
    with pytest.raises(Preempted, match="SIGTERM after step 5"):
        train(config(), tiny, run)
    monkeypatch.undo()
    assert results(train(config(), tiny, run)) == results(whole[1])
    assert_same_training(whole[0], run)


def test_a_finished_training_only_validates(
    config, tiny: DatasetReader, whole, tmp_path: Path, monkeypatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(whole[0].folder, run.folder)
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("it trains again"))
    result = train(config(), tiny, run)
    assert results(result) == results(whole[1])
    assert result["images_per_second"] == whole[1]["images_per_second"]
    assert (run.folder / "metrics.csv").read_bytes() == (whole[0].folder / "metrics.csv").read_bytes()


def test_a_spoilt_checkpoint_falls_back_to_the_one_before(
    config, tiny: DatasetReader, tmp_path: Path, whole, capsys
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(whole[0].folder, run.folder)
    last = run.folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    train(config(), tiny, run)
    assert_same_training(whole[0], run)
    assert "last.ckpt cannot be read" in capsys.readouterr().err
    for path in last.parent.iterdir():
        path.write_bytes(b"spoilt")
    with pytest.raises(UserError, match=r"last.ckpt cannot be read .* remove .*checkpoints to train from"):
        train(config(), tiny, run)


@pytest.mark.slow
def test_going_on_after_a_kill_changes_nothing(config, tiny: DatasetReader, tmp_path: Path, whole) -> None:
    seed = random.SystemRandom().randrange(2**32)
    steps = sorted(random.Random(seed).sample(range(1, 2 * STEPS), 2))
    print(f"seed {seed}: killed at steps {steps}")
    run = begin(tmp_path / "run")
    for step in steps:
        (process,) = tasks(tiny, run, die_at=step, save_every_step=True)
        assert process.ended()[0] == -signal.SIGKILL
        assert saved(run)["global_step"] == step - (step == STEPS)  # an epoch's last is saved behind it
    train(config(), tiny, run)
    assert_same_training(whole[0], run)


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_and_changes_nothing(
    tiny: DatasetReader, tmp_path: Path
) -> None:
    whole, run = begin(tmp_path / "whole"), begin(tmp_path / "run")
    normed = {"model": "shufflenet_v2_x0_5"}  # with batch norm: its statistics differ between the ranks
    began = tasks(tiny, whole, size=2, **normed)
    stopped = finish(tasks(tiny, run, size=2, signal_at=3, signal_rank=1, **normed))
    expected = finish(began)
    assert all(told["interrupted"] == 3 for told in stopped)
    assert results(finish(tasks(tiny, run, size=2, **normed))[0]) == results(expected[0])
    assert_same_training(whole, run)
    # The network that both ranks judged is the one in the checkpoint.
    (alone,) = finish(tasks(tiny, whole, **normed))
    assert alone["top1"] == expected[0]["top1"]
    assert alone["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [False, True])
def test_the_others_end_when_a_rank_is_gone(stuck: bool, tiny: DatasetReader, tmp_path: Path) -> None:
    """Even where a device waits for it for ever."""
    left, gone = tasks(tiny, begin(tmp_path / "run"), size=2, die_at=3, die_rank=1, stuck=stuck)
    code, out, err = left.ended()
    assert gone.ended()[0] == -signal.SIGKILL
    if stuck:
        assert code == EXIT_REQUEUE
        assert "this task does not come to its end" in err
    else:
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["lost"].startswith("lost another task of this job: ")


def test_metrics_go_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    def told(table: CsvLogger) -> list[tuple[str, str]]:
        with table.path.open(newline="") as file:
            return [(line["step"], line["val_loss"]) for line in csv.DictReader(file)]

    first = CsvLogger(tmp_path, step=0)
    for step in range(4):
        first.log_metrics({"train_loss": 1.0}, step)
    first.log_metrics({"val_loss": 2.0}, 3)
    with first.path.open("a") as file:
        file.write("5,1,1.0")  # and a kill
    second = CsvLogger(tmp_path, step=4)
    second.log_metrics({"val_loss": 2.0}, 3)  # the same validation again
    second.log_metrics({"train_loss": 1.0}, 4)
    assert told(second) == [("1", ""), ("2", ""), ("3", ""), ("4", ""), ("4", "2.0"), ("5", "")]
    third = CsvLogger(tmp_path, step=2)  # the work behind step 2 was lost
    third.log_metrics({"train_loss": 1.0}, 2)
    assert told(third) == [("1", ""), ("2", ""), ("3", "")]


def test_a_checkpoint_of_another_training_is_refused(
    config, tiny: DatasetReader, tmp_path: Path, whole
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(whole[0].folder, run.folder)
    before = saved(run)
    assert before["identity"]["recipe"]["epochs"] == 2
    asked = config(epochs=3, mixup=0.2)
    line = r"last.ckpt is of another training: recipe.epochs is 2 there and 3 here \(and 1 more\)"
    with pytest.raises(UserError, match=line):
        train(asked, tiny, run)
    asked = config()
    asked.model.options = {"dropout": 0.1}
    with pytest.raises(UserError, match=r"model.options.dropout is not set there and 0.1 here: put it aside"):
        train(asked, tiny, run)
    asked = config()
    asked.seed = 4
    with pytest.raises(UserError, match="seed is 3 there and 4 here"):
        train(asked, tiny, run)
    assert saved(run)["global_step"] == before["global_step"]


@pytest.mark.slow
def test_too_little_memory_names_the_parts_that_would_fit(
    config, tiny: DatasetReader, tmp_path: Path, whole, monkeypatch
) -> None:
    """And the run goes on with so many parts, from the checkpoint of before."""
    asked, run = config(), begin(tmp_path / "run")
    asked.model.options = {"dropout": 0}
    asked.train.checkpoint_every_minutes = 1e-9
    original = Classifier.training_step

    def greedy(self: Classifier, batch: Any, batch_idx: int) -> Any:
        if self.global_step >= 3 and len(batch[1]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", greedy)
    with pytest.raises(UserError, match=r"out of memory at step 4: 8 images .*train.accumulate=2 takes 4 at"):
        train(asked, tiny, run)
    assert saved(run)["global_step"] == 3
    asked.train.accumulate = 2
    train(asked, tiny, run)
    assert saved(run)["global_step"] == 2 * STEPS
    assert saved(run)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 4 * STEPS
    plain = begin(tmp_path / "plain")
    asked.train.accumulate = 1
    monkeypatch.undo()
    train(asked, tiny, plain)
    for name, value in saved(plain)["state_dict"].items():
        torch.testing.assert_close(saved(run)["state_dict"][name], value, rtol=1e-3, atol=1e-4)
