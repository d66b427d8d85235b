from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only
from tiny_training import tiny_config

from hpc_imagenet.config import Config
from hpc_imagenet.datastore.store import Store
from hpc_imagenet.errors import Interrupted, UserError
from hpc_imagenet.runs import Run
from hpc_imagenet.training import verdict
from hpc_imagenet.training.account import Account
from hpc_imagenet.training.data import Batches
from hpc_imagenet.training.fit import fit
from hpc_imagenet.training.metrics import Table
from hpc_imagenet.training.model import build
from hpc_imagenet.training.module import Classifier
from hpc_imagenet.training.sampler import permutation
from hpc_imagenet.world import World

STEPS = 5  # an epoch of the tiny store; two epochs
HERE = Path(__file__).parent


def begin(folder: Path) -> Run:
    folder.mkdir()
    return Run(folder)


def train(config: Config, store: Store, run: Run) -> dict[str, Any]:
    result = fit(config, store, run, World())
    torch.set_num_threads(1)  # fit takes all there are
    return result


def saved(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def assert_same_training(one: Run, other: Run) -> None:
    """Weights, momentum, schedule and position bit for bit; the same lines of metrics but for the speed."""
    a, b = saved(one), saved(other)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    moments = [c["optimizer_states"][0]["state"] for c in (a, b)]
    assert all(
        torch.equal(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0]
    )
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["loops"] == b["loops"]  # where Lightning believes to be
    assert lines(one) == lines(other)


def lines(run: Run) -> list[dict[str, str]]:
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in csv.DictReader(file)]


def results(result: dict[str, Any]) -> tuple[float, float, float]:
    return result["top1"], result["top5"], result["loss"]


@pytest.fixture(scope="module")
def whole(tiny: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """The uninterrupted training that the others are compared with."""
    run = begin(tmp_path_factory.mktemp("whole") / "run")
    return run, train(tiny_config(), tiny, run)


def test_a_training_tells_what_came_out(tiny: Store, whole: tuple[Run, dict[str, Any]]) -> None:
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


def test_a_seed_decides_all(config, tiny: Store, tmp_path: Path, whole: tuple[Run, dict[str, Any]]) -> None:
    again = begin(tmp_path / "again")
    assert results(train(config(), tiny, again)) == results(whole[1])
    assert_same_training(whole[0], again)
    other = begin(tmp_path / "other")
    different = config()
    different.seed = 4
    train(different, tiny, other)
    with pytest.raises(AssertionError):
        assert_same_training(whole[0], other)


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process SIGUSR2 within that step."""

    def arrange(step: int) -> None:
        original = Account.on_train_batch_end

        def noisy(self: Account, trainer: Any, *rest: Any) -> None:
            original(self, trainer, *rest)
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGUSR2)

        monkeypatch.setattr(Account, "on_train_batch_end", noisy)

    return arrange


@pytest.mark.parametrize("step", [1, 4, 5, 6, 10])  # 5 and 10: an epoch's last
def test_going_on_after_a_signal_changes_nothing(
    step, config, tiny: Store, tmp_path: Path, whole, signal_at, monkeypatch
) -> None:
    run = begin(tmp_path / "run")
    before = signal.getsignal(signal.SIGUSR2)
    signal_at(step)
    asked = config()
    asked.loader.workers = step % 3  # the whole training had none
    with pytest.raises(Interrupted, match=f"SIGUSR2 after step {step}, which is saved"):
        train(asked, tiny, run)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGUSR2) is before
    assert saved(run)["global_step"] == step
    assert results(train(config(), tiny, run)) == results(whole[1])
    assert_same_training(whole[0], run)


OPTIONS: dict[str, dict[str, Any]] = {
    "averaged": {"ema": 0.8, "ema_every": 2, "schedule": "linear", "blurpool": True, "val_flip": True},
    "mixed": {"mixup": 0.2, "cutmix": 1.0, "augment": "trivial", "erase": 0.5},
    "growing": {"start_size": 16, "grow_to": 1, "size": 24, "val_size": 24, "val_resize": 24},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_going_on_changes_nothing_with_any_ingredient(
    name, config, tiny: Store, tmp_path: Path, whole, signal_at, monkeypatch
) -> None:
    asked = config(**OPTIONS[name])
    if name == "averaged":
        asked.model.name = "shufflenet_v2_x0_5"  # with batch norm, and convolutions that halve
    alone, run = begin(tmp_path / "alone"), begin(tmp_path / "run")
    expected = train(asked, tiny, alone)
    assert lines(alone) != lines(whole[0])
    signal_at(4)
    asked.loader.workers = 3
    with pytest.raises(Interrupted):
        train(asked, tiny, run)
    monkeypatch.undo()
    asked.loader.workers = 1
    assert results(train(asked, tiny, run)) == results(expected)
    assert_same_training(alone, run)


@pytest.mark.nightly
def test_going_on_changes_nothing_for_a_compiled_network(
    config, tiny: Store, tmp_path: Path, signal_at, monkeypatch
) -> None:
    asked = config(ema=0.8)
    asked.model.compile = True
    alone, run = begin(tmp_path / "alone"), begin(tmp_path / "run")
    expected = train(asked, tiny, alone)
    signal_at(4)
    with pytest.raises(Interrupted):
        train(asked, tiny, run)
    monkeypatch.undo()
    assert results(train(asked, tiny, run)) == results(expected)
    assert_same_training(alone, run)


def test_the_averaged_weights_are_judged(config, tiny: Store, tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    original = Account.on_train_batch_end

    def noting(self: Account, trainer: Any, module: Any, *rest: Any) -> None:
        original(self, trainer, module, *rest)
        seen.append((trainer.global_step, module.model.classifier[1].bias.detach().clone()))

    monkeypatch.setattr(Account, "on_train_batch_end", noting)
    run = begin(tmp_path / "run")
    result = train(config(ema=0.75, ema_every=2, warmup_epochs=0.8), tiny, run)
    right = dict(seen)[4]  # up to there it is a copy
    for step in (6, 8, 10):
        right = 0.75 * right + 0.25 * dict(seen)[step]
    state = saved(run)["state_dict"]
    torch.testing.assert_close(state["average.classifier.1.bias"], right)
    # The same weights alone, as somebody would begin with them.
    asked = config(epochs=1, learning_rate=0)
    asked.model.weights = str(run.folder / "checkpoints" / "last.ckpt")
    assert results(train(asked, tiny, begin(tmp_path / "next"))) == pytest.approx(results(result))


def test_a_probe_trains_nothing_but_the_classifier(
    config, tiny: Store, tmp_path: Path, signal_at, monkeypatch
) -> None:
    torch.manual_seed(1)
    source = build("shufflenet_v2_x0_5", 7, size=16).state_dict()
    torch.save(source, tmp_path / "w.pth")
    asked = config(freeze=True, learning_rate=0.1)
    asked.model.name, asked.model.weights = "shufflenet_v2_x0_5", str(tmp_path / "w.pth")
    alone, run = begin(tmp_path / "alone"), begin(tmp_path / "run")
    train(asked, tiny, alone)
    state = saved(alone)["state_dict"]
    changed = {key for key in source if not torch.equal(state[f"model.{key}"], source[key])}
    assert changed == {"fc.weight", "fc.bias"}  # and no statistics of batch norm
    signal_at(3)
    with pytest.raises(Interrupted):
        train(asked, tiny, run)
    monkeypatch.undo()
    (tmp_path / "w.pth").unlink()  # what it began with is not needed any more
    train(asked, tiny, run)
    assert_same_training(alone, run)


def test_growing_images_are_that_large(config, tiny: Store, tmp_path: Path, monkeypatch) -> None:
    original, sizes = Classifier.normalised, []

    def noting(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        sizes.append((self.training, *images.shape[1:]))
        return original(self, images)

    monkeypatch.setattr(Classifier, "normalised", noting)
    asked = config(**OPTIONS["growing"])
    asked.loader.workers = 1  # who outlive an epoch
    train(asked, tiny, begin(tmp_path / "run"))
    training = [side for training, _, side, _ in sizes if training]
    assert training == [16] * STEPS + [24] * STEPS
    assert {side for training, _, side, _ in sizes if not training} == {24}


def test_a_checkpoint_of_another_training_is_refused(config, tiny: Store, tmp_path: Path, whole) -> None:
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


def test_every_class_is_told(tiny: Store, whole: tuple[Run, dict[str, Any]]) -> None:
    run, result = whole
    with (run.folder / "val_classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"n{digit:08d}" for digit in range(10)]
    labels = tiny.split("val").index["label"].tolist()
    assert [int(row["images"]) for row in rows] == [labels.count(digit) for digit in range(10)]
    for name in ("top1", "top5"):
        hits = sum(float(row[name]) * int(row["images"]) for row in rows if row["images"] != "0")
        assert hits / 13 == pytest.approx(result[name], abs=1e-4)


def test_the_verdict_names_what_would_mend_it(config, tiny: Store, tmp_path: Path, monkeypatch) -> None:
    clock, wait = [0.0], [1.0]
    fill, step = Batches.fill, Classifier.training_step

    def slow(self: Batches, *rest: Any, **more: Any) -> Any:
        clock[0] += wait[0]
        return fill(self, *rest, **more)

    def working(self: Classifier, batch: Any, batch_idx: int) -> Any:
        clock[0] += 0.25
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Batches, "fill", slow)
    monkeypatch.setattr(Classifier, "training_step", working)
    monkeypatch.setattr(verdict, "_now", lambda device: clock[0])
    asked, run = config(epochs=4), begin(tmp_path / "run")
    asked.train.verdict_after_seconds = 0
    train(asked, tiny, run)
    told = json.loads((run.folder / "verdict.json").read_text())
    assert told["verdict"] == "starved"
    assert told["waiting"] == 0.8
    assert told["device_images_per_second"] == 32
    assert told["workers"] == 0
    assert told["loader_images_per_second"] > 0
    assert told["mend"].split("=")[0] in ("loader.workers", "process.layout")
    assert "waits for data" in run.progress["note"]
    wait[0], fed = 0.001, begin(tmp_path / "fed")  # and told at the end, where it is over before
    asked.train.verdict_after_seconds = 1000
    train(asked, tiny, fed)
    told = json.loads((fed.folder / "verdict.json").read_text())
    assert (told["verdict"], told["mend"], told["steps"]) == ("fed", "", 3 * (STEPS - 1))


@pytest.mark.parametrize(
    ("cpus", "workers", "loader", "executor", "right"),
    [
        (16, 4, 400.0, "slurm", "loader.workers=11"),  # 100 images/s each, 1,000 to reach, a tenth to spare
        (8, 7, 700.0, "slurm", "cluster.cpus_per_task=12"),
        (8, 3, 300.0, "local", "loader.workers=7"),
        (8, 7, 700.0, "local", "process.layout=shards process.resize=short:256"),
    ],
)
def test_one_override_would_mend_it(config, cpus, workers, loader, executor, right) -> None:
    asked = config()
    asked.cluster.executor = executor
    assert verdict.mend(asked, cpus, workers, loader, 1000.0) == right


def test_too_little_memory_names_the_parts_that_would_fit(
    config, tiny: Store, tmp_path: Path, whole, monkeypatch
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


def test_going_on_in_the_middle_of_a_validation(
    config, tiny: Store, tmp_path: Path, whole, monkeypatch
) -> None:
    original, calls = Classifier.validation_step, iter(range(100))

    def noisy(self: Classifier, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if next(calls) == 1:  # the second of the first epoch's two batches
            os.kill(os.getpid(), signal.SIGTERM)

    run = begin(tmp_path / "run")
    monkeypatch.setattr(Classifier, "validation_step", noisy)
    with pytest.raises(Interrupted, match="SIGTERM after step 5"):
        train(config(), tiny, run)
    monkeypatch.undo()
    assert results(train(config(), tiny, run)) == results(whole[1])
    assert_same_training(whole[0], run)


def test_a_finished_training_only_validates(config, tiny: Store, whole, tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(whole[0].folder, run.folder)
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("it trains again"))
    result = train(config(), tiny, run)
    assert results(result) == results(whole[1])
    assert result["images_per_second"] == whole[1]["images_per_second"]
    assert (run.folder / "metrics.csv").read_bytes() == (whole[0].folder / "metrics.csv").read_bytes()


def test_a_spoilt_checkpoint_falls_back_to_the_one_before(
    config, tiny: Store, tmp_path: Path, whole, capsys
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


def test_a_loss_that_is_no_number_stops_at_its_step(config, tiny: Store, tmp_path: Path, monkeypatch) -> None:
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
    names = [tiny.split("train").name(i) for i in order.tolist()]
    assert (run.folder / "bad_batch.txt").read_text().split() == names
    assert saved(run)["global_step"] == STEPS
    assert all(torch.isfinite(value).all() for value in saved(run)["state_dict"].values())


def test_an_unreadable_image_is_one_line(config, tiny: Store, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "v1")
    offset, length, *_ = tiny.split("train").index[7].item()
    with (tmp_path / "v1" / "train.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * length)
    asked = config()
    asked.loader.workers = 1
    run = begin(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(asked, Store(tmp_path / "v1"), run)
    assert str(caught.value).startswith(f"{tmp_path}/v1: image train_0007.JPEG cannot be read")
    assert "\n" not in str(caught.value)
    asked.loader.on_corrupt = "skip"
    result = train(asked, Store(tmp_path / "v1"), run)
    assert result["skipped"] == 1
    assert result["loss"] < 10


def test_a_step_in_parts_is_the_same_step(
    config, tiny: Store, tmp_path: Path, signal_at, monkeypatch
) -> None:
    def parts(count: int, run: Run) -> None:
        asked = config()
        asked.model.options, asked.train.accumulate = {"dropout": 0}, count
        train(asked, tiny, run)

    one, two = begin(tmp_path / "one"), begin(tmp_path / "two")
    parts(1, one)
    signal_at(8)
    with pytest.raises(Interrupted):
        parts(2, two)
    monkeypatch.undo()
    parts(2, two)
    for name, value in saved(one)["state_dict"].items():
        torch.testing.assert_close(saved(two)["state_dict"][name], value, rtol=1e-3, atol=1e-4)


def test_more_images_a_step_than_there_are(config, tiny: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe.global_batch=41 is more than the 40 images of train"):
        train(config(global_batch=41), tiny, begin(tmp_path / "run"))


# ---------------------------------------------------------------------------- as processes of their own


def tasks(store: Store, run: Run, size: int = 1, **setting: Any) -> list[subprocess.Popen[str]]:
    """One training on `size` ranks; `python tests/training/task.py` is one rank."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    port = 20_000 + random.SystemRandom().randrange(10_000)
    return [
        subprocess.Popen(
            [
                sys.executable,
                HERE / "task.py",
                store.folder,
                run.folder,
                json.dumps([rank, size, port, setting]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    told = [process.communicate(timeout=240) for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), told
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()


@pytest.mark.slow
def test_going_on_after_a_kill_changes_nothing(config, tiny: Store, tmp_path: Path, whole) -> None:
    seed = random.SystemRandom().randrange(2**32)
    steps = sorted(random.Random(seed).sample(range(1, 2 * STEPS), 2))
    print(f"seed {seed}: killed at steps {steps}")
    run = begin(tmp_path / "run")
    for step in steps:
        (process,) = tasks(tiny, run, die_at=step, save_every_step=True)
        process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL
        assert saved(run)["global_step"] == step - (step == STEPS)  # an epoch's last is saved behind it
    train(config(), tiny, run)
    assert_same_training(whole[0], run)


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(tiny: Store, tmp_path: Path, whole) -> None:
    """Without dropout and batch norm the weights agree as closely as sums in another order can."""
    alone, shared = begin(tmp_path / "alone"), begin(tmp_path / "shared")
    (one,) = finish(tasks(tiny, alone, dropout=0))
    two = finish(tasks(tiny, shared, size=2, dropout=0))
    assert results(two[0]) == results(two[1])
    a, b = saved(alone), saved(shared)
    assert a["global_step"] == b["global_step"] == 2 * STEPS
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-3, atol=1e-4)
    assert two[0]["top1"] == pytest.approx(one["top1"])
    assert two[0]["loss"] == pytest.approx(one["loss"], rel=1e-4)
    # A step in parts on two ranks, with the treatment of images that all worlds have in common. The first
    # epoch: sums in another order soon send some maximum elsewhere. The rows of another rank are 6e-3 off.
    treated = {"recipe": {"augment": "trivial", "erase": 0.5, "ema": 0.8, "epochs": 1}, "dropout": 0}
    (one_t,) = finish(tasks(tiny, begin(tmp_path / "a"), **treated))
    two_t = finish(tasks(tiny, begin(tmp_path / "b"), size=2, accumulate=2, **treated))
    assert one_t["loss"] != one["loss"]
    assert two_t[0]["loss"] == pytest.approx(one_t["loss"], rel=1e-3)
    # Exact validation: the 13 images of one network, over one rank and over two.
    shutil.copytree(alone.folder, tmp_path / "copy")
    again = finish(tasks(tiny, Run(tmp_path / "copy"), size=2, dropout=0))
    assert again[0]["top1"] == one["top1"]
    assert again[0]["top5"] == one["top5"]
    assert again[0]["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_and_changes_nothing(tiny: Store, tmp_path: Path) -> None:
    whole, run = begin(tmp_path / "whole"), begin(tmp_path / "run")
    normed = {"model": "shufflenet_v2_x0_5"}  # with batch norm: its statistics differ between the ranks
    expected = finish(tasks(tiny, whole, size=2, **normed))
    stopped = finish(tasks(tiny, run, size=2, signal_at=3, signal_rank=1, **normed))
    assert all(told["interrupted"] == 3 for told in stopped)
    assert results(finish(tasks(tiny, run, size=2, **normed))[0]) == results(expected[0])
    assert_same_training(whole, run)
    # The network that both ranks judged is the one in the checkpoint.
    (alone,) = finish(tasks(tiny, whole, **normed))
    assert alone["top1"] == expected[0]["top1"]
    assert alone["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


def test_metrics_go_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    def told(table: Table) -> list[tuple[str, str]]:
        with table.path.open(newline="") as file:
            return [(line["step"], line["val_loss"]) for line in csv.DictReader(file)]

    first = Table(tmp_path, step=0)
    for step in range(4):
        first.log_metrics({"train_loss": 1.0}, step)
    first.log_metrics({"val_loss": 2.0}, 3)
    with first.path.open("a") as file:
        file.write("5,1,1.0")  # and a kill
    second = Table(tmp_path, step=4)
    second.log_metrics({"val_loss": 2.0}, 3)  # the same validation again
    second.log_metrics({"train_loss": 1.0}, 4)
    assert told(second) == [("1", ""), ("2", ""), ("3", ""), ("4", ""), ("4", "2.0"), ("5", "")]
    third = Table(tmp_path, step=2)  # the work behind step 2 was lost
    third.log_metrics({"train_loss": 1.0}, 2)
    assert told(third) == [("1", ""), ("2", ""), ("3", "")]


def test_variables_of_an_outer_slurm_job_change_nothing(
    config, tiny: Store, tmp_path: Path, monkeypatch
) -> None:
    outer = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "RANK": "2"}
    for name, value in {**outer, "SLURM_JOB_NAME": "outer", "SLURM_CPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # what Lightning makes of them when it is imported
    run = begin(tmp_path / "run")
    train(config(epochs=1), tiny, run)
    assert saved(run)["global_step"] == STEPS
    assert len(lines(run)) == 2
