"""Which checkpoints are kept beside the last one: the best, and those of the newest epochs."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import lines, new_run, tasks, train

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.checkpoints import BEST, LAST, PREVIOUS, epoch_checkpoints
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.callbacks.checkpoint_file import (
    KeptCheckpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

IDENTITY = {"recipe": {"epochs": 3}, "code": {"commit": "a"}}


def write(folder: Path, step: int, top1: float | None, epoch: int = 0, **identity: Any) -> Path:
    metrics = {} if top1 is None else {"top1": top1, "top5": 1.0, "loss": 1.0, "epoch": epoch}
    path = folder / LAST
    write_checkpoint({"global_step": step, "identity": {**IDENTITY, **identity}, "metrics": metrics}, path)
    return path


def step_of(path: Path) -> int:
    return read_checkpoint(path).step


def kept_epochs(folder: Path) -> list[str]:
    return [path.name for path in epoch_checkpoints(folder)]


def test_the_first_highest_accuracy_is_kept(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path, IDENTITY, 0)
    for step, top1 in enumerate([0.2, None, 0.5, 0.5, 0.4]):
        path = write(tmp_path, step, top1)
        kept.keep(path, read_checkpoint(path).metrics)
    assert [step_of(tmp_path / name) for name in (BEST, PREVIOUS, LAST)] == [2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, LAST, PREVIOUS]
    assert kept.best["top1"] == KeptCheckpoints(tmp_path, IDENTITY, 0).best["top1"] == 0.5


def test_a_kill_between_saving_and_keeping_loses_no_best_checkpoint(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path, IDENTITY, 0)
    kept.keep(write(tmp_path, 1, 0.2), {"top1": 0.2, "epoch": 1})
    path = write(tmp_path, 2, 0.6)  # and killed here
    resumed = KeptCheckpoints(tmp_path, {**IDENTITY, "code": {}}, 0)  # after a bug fix
    for _ in range(2):  # killed again at the same moment
        resumed.keep(path, read_checkpoint(path).metrics)
    assert step_of(tmp_path / BEST) == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", [b"damaged", None], ids=["damaged", "of another training"])
def test_a_best_checkpoint_that_is_no_use_is_replaced(content, tmp_path: Path, capsys) -> None:
    KeptCheckpoints(tmp_path, IDENTITY, 0).keep(write(tmp_path, 1, 0.9, seed=1), {"top1": 0.9, "epoch": 1})
    if content:
        (tmp_path / BEST).unlink()
        (tmp_path / BEST).write_bytes(content)
    kept = KeptCheckpoints(tmp_path, IDENTITY, 0)
    assert ("best.ckpt cannot be read" in capsys.readouterr().err) == bool(content)
    kept.keep(write(tmp_path, 2, 0.1), {"top1": 0.1, "epoch": 2})
    assert step_of(tmp_path / BEST) == 2


def test_the_newest_epochs_are_kept(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path, IDENTITY, 2)
    for epoch in range(8, 12):
        kept.keep(write(tmp_path, 10 * epoch, 0.1), {"top1": 0.1, "epoch": epoch})
    (tmp_path / "epoch-mine.ckpt").touch()
    assert kept_epochs(tmp_path) == ["epoch-10.ckpt", "epoch-11.ckpt"]
    assert step_of(tmp_path / "epoch-10.ckpt") == 100
    KeptCheckpoints(tmp_path, IDENTITY, 0).keep(write(tmp_path, 120, 0.1), {"top1": 0.1, "epoch": 12})
    assert kept_epochs(tmp_path) == ["epoch-10.ckpt", "epoch-11.ckpt"], "none is removed by another setting"


def test_checkpoints_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", no_links)
    kept = KeptCheckpoints(tmp_path, IDENTITY, 1)
    for step in (1, 2):
        kept.keep(write(tmp_path, step, 0.1 * step), {"top1": 0.1 * step, "epoch": step})
    names = (LAST, BEST, PREVIOUS, "epoch-2.ckpt")
    assert [step_of(tmp_path / name) for name in names] == [2, 2, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_every_checkpoint_is_tried_before_a_training_is_given_up(tmp_path: Path, capsys) -> None:
    kept = KeptCheckpoints(tmp_path, IDENTITY, 2)
    for step in range(1, 5):
        kept.keep(write(tmp_path, step, 0.5), {"top1": 0.5, "epoch": step})
    found = []
    for name in (LAST, PREVIOUS, "epoch-4.ckpt", "epoch-3.ckpt"):
        (tmp_path / name).unlink()  # it is a hard link
        (tmp_path / name).write_bytes(b"damaged")
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint
        found.append((checkpoint.path.name, checkpoint.step))
    assert found == [(PREVIOUS, 3), ("epoch-4.ckpt", 4), ("epoch-3.ckpt", 3), (BEST, 1)]
    assert "epoch-3.ckpt cannot be read" in capsys.readouterr().err
    (tmp_path / BEST).write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"last\.ckpt cannot be read .*, nor can any other checkpoint: remove"
    ):
        newest_checkpoint(tmp_path)


def test_the_best_checkpoint_is_taken_if_those_of_epochs_are_older(tmp_path: Path) -> None:
    for epochs, step in ((1, 5), (0, 60), (0, 70)):  # train.keep_checkpoints was 1, then null
        path = write(tmp_path, step, 0.01 * step)
        KeptCheckpoints(tmp_path, IDENTITY, epochs).keep(path, {"top1": 0.01 * step, "epoch": step})
    for name in (LAST, PREVIOUS):
        (tmp_path / name).unlink()  # it is a hard link
        (tmp_path / name).write_bytes(b"damaged")
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint
    assert (checkpoint.path.name, checkpoint.step) == (BEST, 70)


def best_of(run: Run) -> tuple[float, int]:
    metrics = read_checkpoint(run.folder / "checkpoints" / BEST).metrics
    return metrics["top1"], int(metrics["epoch"])


def best_line(run: Run) -> tuple[float, int]:
    """Return the highest val top-1 of metrics.csv, and the number of epochs after which it was first seen."""
    rows = [(float(line["val_top1"]), -int(line["epoch"]) - 1) for line in lines(run) if line["val_top1"]]
    top1, epoch = max(rows)
    return pytest.approx(top1), -epoch


@pytest.mark.slow
def test_best_of_a_training_that_is_stopped_and_resumed(
    config, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch
) -> None:
    changed, run = config(epochs=4, learning_rate=0.05), new_run(tmp_path / "run")
    changed.train.keep_checkpoints = 3
    signal_at(12)
    with pytest.raises(Exception, match="SIGUSR2 after step 12"):
        train(changed, tiny, run)
    monkeypatch.undo()
    assert best_of(run) == best_line(run)
    (run.folder / "checkpoints" / ".last.ckpt.0904c0af440b0a05.tmp").write_bytes(b"killed while writing")
    result = train(changed, tiny, run)
    assert best_of(run) == best_line(run) == (result["best_top1"], result["best_epoch"])
    folder = run.folder / "checkpoints"
    assert not list(folder.glob(".*"))
    assert kept_epochs(folder) == ["epoch-2.ckpt", "epoch-3.ckpt", "epoch-4.ckpt"]
    assert (folder / LAST).samefile(folder / "epoch-4.ckpt")
    for path in (folder / LAST, folder / "epoch-2.ckpt"):
        content = torch.load(path, weights_only=True)
        assert content["config"]["recipe"]["epochs"] == 4
        assert content["classes"][3] == ("n00000003", ["3"])


@pytest.mark.slow
def test_best_of_a_training_on_two_ranks_that_is_killed(tiny: DatasetReader, tmp_path: Path) -> None:
    run, recipe = new_run(tmp_path / "run"), {"epochs": 3}
    killed = tasks(tiny, run, size=2, recipe=recipe, die_at=11, save_every_step=True)
    assert -signal.SIGKILL in [rank.wait()[0] for rank in killed]
    assert best_of(run) == best_line(run)
    exits = [rank.wait()[0] for rank in tasks(tiny, run, size=2, recipe=recipe, save_every_step=True)]
    assert exits == [0, 0]
    assert best_of(run) == best_line(run)
