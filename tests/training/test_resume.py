"""Resuming an interrupted training gives the same result as an uninterrupted one."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import STEPS, assert_same_training, finish, new_run, results, saved, tasks, train

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import EXIT_REQUEUE, PeerLost, Preempted, UserError
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.fit import fit
from hpc_imagenet.training.metrics import COLUMNS, CsvLogger
from hpc_imagenet.training.module import Classifier

pytestmark = pytest.mark.slow


def test_wait_returns_a_stop_signal_that_arrives_meanwhile() -> None:
    with StopSignal() as stop:
        assert stop.wait(0) is None
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        assert stop.wait(60) == signal.SIGUSR2


@pytest.mark.parametrize("step", [1, 4, 5, 6, 10])  # 5 and 10: last of an epoch
def test_resume_after_signal_is_bit_identical(
    step, config, tiny: DatasetReader, tmp_path: Path, reference, signal_at, monkeypatch
) -> None:
    run = new_run(tmp_path / "run")
    before = signal.getsignal(signal.SIGUSR2)
    signal_at(step)
    changed = config()
    changed.loader.workers = step % 3  # the reference had 0
    with pytest.raises(Preempted, match=f"SIGUSR2 after step {step}, which is saved"):
        train(changed, tiny, run)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGUSR2) is before
    assert saved(run)["global_step"] == step
    assert results(train(config(), tiny, run)) == results(reference[1])
    assert_same_training(reference[0], run)


def test_resume_within_a_window_is_bit_identical(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    """Windows of two steps: after step 8 of both epochs, the next window of the second is half done."""
    windowed = {"shuffle_window": 16}
    whole, run = new_run(tmp_path / "whole"), new_run(tmp_path / "run")
    expected = results(train(config(**windowed), tiny, whole))
    signal_at(8)
    with pytest.raises(Preempted, match="SIGUSR2 after step 8, which is saved"):
        train(config(**windowed), tiny, run)
    monkeypatch.undo()
    changed = config(**windowed)
    changed.loader.workers = 2  # the others had 0
    assert results(train(changed, tiny, run)) == expected
    assert_same_training(whole, run)


def test_resume_in_the_middle_of_a_validation(
    config, tiny: DatasetReader, tmp_path: Path, reference, monkeypatch
) -> None:
    original, calls = Classifier.validation_step, iter(range(100))

    def send_signal(self: Classifier, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if next(calls) == 1:  # the second of the first epoch's two batches
            os.kill(os.getpid(), signal.SIGTERM)

    run = new_run(tmp_path / "run")
    monkeypatch.setattr(Classifier, "validation_step", send_signal)
    with pytest.raises(Preempted, match="SIGTERM after step 5"):
        train(config(), tiny, run)
    monkeypatch.undo()
    assert results(train(config(), tiny, run)) == results(reference[1])
    assert_same_training(reference[0], run)


def test_finished_training_only_validates(
    config, tiny: DatasetReader, reference, tmp_path: Path, monkeypatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(reference[0].folder, run.folder)
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("it trains again"))
    result = train(config(), tiny, run)
    assert results(result) == results(reference[1])
    assert result["images_per_second"] == reference[1]["images_per_second"]
    assert (run.folder / "metrics.csv").read_bytes() == (reference[0].folder / "metrics.csv").read_bytes()


def test_seconds_are_those_of_all_starts(config, tiny: DatasetReader, reference, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(reference[0].folder, run.folder)
    content = saved(run)
    state = content["callbacks"]["ProgressReporter"]
    assert 0 < state["seconds"] < reference[1]["seconds"]
    state["seconds"] = 36_000.0
    torch.save(content, run.folder / "checkpoints" / "last.ckpt")
    assert train(config(), tiny, run)["seconds"] > 36_000
    del state["seconds"]  # a checkpoint of an older version
    torch.save(content, run.folder / "checkpoints" / "last.ckpt")
    assert train(config(), tiny, run)["seconds"] is None
    assert train(config(), tiny, run)["seconds"] is None  # from the new checkpoint


def test_damaged_checkpoint_falls_back_to_previous(
    config, tiny: DatasetReader, tmp_path: Path, reference, capsys
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(reference[0].folder, run.folder)
    last = run.folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    train(config(), tiny, run)
    assert_same_training(reference[0], run)
    assert "last.ckpt cannot be read" in capsys.readouterr().err
    for path in last.parent.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last.ckpt cannot be read .* remove .*checkpoints to train from"):
        train(config(), tiny, run)


def test_ranks_that_read_different_checkpoints_start_anew(
    tiny: DatasetReader, tmp_path: Path, reference
) -> None:
    """Also if one of them has read that of a finished training."""
    run = Run(tmp_path / "run")
    shutil.copytree(reference[0].folder, run.folder)
    last = run.folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    lost = finish(tasks(tiny, run, size=2, stale_rank=1))
    assert {result["lost"] for result in lost} == {
        f"the tasks have read different checkpoints, of steps {STEPS} to {2 * STEPS}"
    }
    assert last.read_bytes() == before


@pytest.mark.slow
def test_resume_after_kill_is_bit_identical(config, tiny: DatasetReader, tmp_path: Path, reference) -> None:
    seed = random.SystemRandom().randrange(2**32)
    steps = sorted(random.Random(seed).sample(range(1, 2 * STEPS), 2))
    print(f"seed {seed}: killed at steps {steps}")
    run = new_run(tmp_path / "run")
    for step in steps:
        (process,) = tasks(tiny, run, die_at=step, save_every_step=True)
        assert process.wait()[0] == -signal.SIGKILL
        # The last step of an epoch is saved after its validation
        assert saved(run)["global_step"] == step - (step == STEPS)
    train(config(), tiny, run)
    assert_same_training(reference[0], run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])  # the sum over more than two depends on the order
def test_signal_to_one_rank_stops_all_and_resume_is_bit_identical(
    ranks: int, tiny: DatasetReader, tmp_path: Path
) -> None:
    reference, run = new_run(tmp_path / "reference"), new_run(tmp_path / "run")
    # With batch norm, whose statistics differ between the ranks.
    batch_norm = {"model": "shufflenet_v2_x0_5"}
    expected = finish(tasks(tiny, reference, size=ranks, **batch_norm))
    stopped = finish(tasks(tiny, run, size=ranks, signal_at=3, signal_rank=1, **batch_norm))
    assert all(result["interrupted"] == 3 for result in stopped)
    assert results(finish(tasks(tiny, run, size=ranks, **batch_norm))[0]) == results(expected[0])
    assert_same_training(reference, run)
    # All ranks validated the network that is in the checkpoint.
    (alone,) = finish(tasks(tiny, reference, **batch_norm))
    assert alone["top1"] == expected[0]["top1"]
    assert alone["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [False, True])
def test_other_ranks_exit_when_a_rank_dies(stuck: bool, tiny: DatasetReader, tmp_path: Path) -> None:
    """Also if a device waits forever for the dead rank."""
    survivor, dead = tasks(tiny, new_run(tmp_path / "run"), size=2, die_at=3, die_rank=1, stuck=stuck)
    code, out, err = survivor.wait()
    assert dead.wait()[0] == -signal.SIGKILL
    if stuck:
        assert code == EXIT_REQUEUE
        assert "this task did not exit within 0.5 s" in err
    else:
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["lost"].startswith("lost another task of this job: ")


def test_a_rank_that_does_not_join_is_a_lost_task(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    def wait(*_: object) -> None:
        raise torch.distributed.DistStoreError("wait timeout after 600000ms")

    monkeypatch.setattr(distributed, "join_ranks", wait)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # fit sets it if it is not set
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # fit sets it to the number of CPUs
    with pytest.raises(PeerLost, match="lost another task of this job: wait timeout"):
        fit(config(), tiny, new_run(tmp_path / "run"), DistEnv(0, 2, 0, 2))


def test_a_lack_of_memory_while_the_ranks_join_does_not_suggest_accumulate(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'")

    monkeypatch.setattr(distributed, "join_ranks", fail)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(UserError, match=r"^this machine has too little free memory to connect the tasks"):
        fit(config(), tiny, new_run(tmp_path / "run"), DistEnv(0, 2, 0, 2))


def test_metrics_csv_resumes_at_the_checkpoint_step(tmp_path: Path) -> None:
    def rows(table: CsvLogger) -> list[tuple[str, str]]:
        with table.path.open(newline="") as file:
            return [(line["step"], line["val_loss"]) for line in csv.DictReader(file)]

    first = CsvLogger(tmp_path, step=0)
    for step in range(4):
        first.log_metrics({"train_loss": 1.0}, step)
    first.log_metrics({"val_loss": 2.0}, 3)
    with first.path.open("a") as file:
        file.write("5,1,1.0")  # incomplete after a kill
    second = CsvLogger(tmp_path, step=4)
    second.log_metrics({"val_loss": 2.0}, 3)  # the same validation, repeated
    second.log_metrics({"train_loss": 1.0}, 4)
    assert rows(second) == [("1", ""), ("2", ""), ("3", ""), ("4", ""), ("4", "2.0"), ("5", "")]
    third = CsvLogger(tmp_path, step=2)  # the work after step 2 was lost
    third.log_metrics({"train_loss": 1.0}, 2)
    assert rows(third) == [("1", ""), ("2", ""), ("3", "")]


def test_metrics_csv_of_an_older_version_gets_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,epoch,train_loss,val_loss\r\n1,0,1.0,\r\n1,0,,2.0\r\n2,1,\r\n"
    )  # the last is incomplete
    CsvLogger(tmp_path, step=1).log_metrics({"train_loss": 0.5, "data_wait": 0.25}, 1)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    values = [(line["train_loss"], line["val_loss"], line["data_wait"]) for line in lines]
    assert values == [("1.0", "", ""), ("", "2.0", ""), ("0.5", "", "0.25")]


def test_checkpoint_of_another_training_is_refused(
    config, tiny: DatasetReader, tmp_path: Path, reference
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(reference[0].folder, run.folder)
    before = saved(run)
    assert before["identity"]["recipe"]["epochs"] == 2
    changed = config(epochs=3, mixup=0.2)
    line = r"last.ckpt belongs to another training: recipe.epochs was 2, is 3 now \(and 1 more\)"
    with pytest.raises(UserError, match=line):
        train(changed, tiny, run)
    changed = config()
    changed.model.options = {"dropout": 0.1}
    with pytest.raises(
        UserError, match=r"model.options.dropout was not set, is 0.1 now: move its folder away"
    ):
        train(changed, tiny, run)
    changed = config()
    changed.seed = 4
    with pytest.raises(UserError, match="seed was 3, is 4 now"):
        train(changed, tiny, run)
    assert saved(run)["global_step"] == before["global_step"]


@pytest.mark.slow
def test_out_of_memory_error_suggests_accumulate(
    config, tiny: DatasetReader, tmp_path: Path, reference, monkeypatch
) -> None:
    """With this setting the run resumes from its last checkpoint."""
    changed, run = config(), new_run(tmp_path / "run")
    changed.model.options = {"dropout": 0}
    changed.train.checkpoint_every_minutes = 1e-9
    original = Classifier.training_step

    def run_out_of_memory(self: Classifier, batch: Any, batch_idx: int) -> Any:
        if self.global_step >= 3 and len(batch[1]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", run_out_of_memory)
    with pytest.raises(UserError, match=r"out of memory at step 4: 8 images .*train.accumulate=2 takes 4 at"):
        train(changed, tiny, run)
    assert saved(run)["global_step"] == 3
    changed.train.accumulate = 2
    train(changed, tiny, run)
    assert saved(run)["global_step"] == 2 * STEPS
    assert saved(run)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 4 * STEPS
    plain = new_run(tmp_path / "plain")
    changed.train.accumulate = 1
    monkeypatch.undo()
    train(changed, tiny, plain)
    for name, value in saved(plain)["state_dict"].items():
        torch.testing.assert_close(saved(run)["state_dict"][name], value, rtol=1e-3, atol=1e-4)
