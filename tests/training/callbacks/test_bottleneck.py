"""`BottleneckMonitor`: bottleneck.json and the suggested override."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outcomes import STEPS, new_run, train

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.training.callbacks import bottleneck
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.loading import batch_loader
from hpc_imagenet.training.loading.batch_loader import BatchBuilder
from hpc_imagenet.training.module import Classifier


@pytest.mark.slow
def test_bottleneck_json_has_rates_and_suggestion(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    clock, wait = [0.0], [1.0]
    decode, step = BatchBuilder._decode_and_crop, Classifier.training_step

    def slow_decode(self: BatchBuilder, *args: Any, **kwargs: Any) -> Any:
        clock[0] += wait[0] / 8  # per image of a batch
        return decode(self, *args, **kwargs)

    def slow_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        clock[0] += 0.25
        return step(self, batch, batch_idx)

    monkeypatch.setattr(BatchBuilder, "_decode_and_crop", slow_decode)
    monkeypatch.setattr(Classifier, "training_step", slow_step)
    monkeypatch.setattr(bottleneck, "_now", lambda device: clock[0])
    ticks = itertools.count()
    loader_clock = SimpleNamespace(perf_counter=lambda: clock[0] + 1e-9 * next(ticks))
    monkeypatch.setattr(batch_loader, "time", loader_clock)
    changed, run = config(epochs=4), new_run(tmp_path / "run")
    changed.train.bottleneck_after_seconds = 0
    train(changed, tiny, run)
    report = json.loads((run.folder / "bottleneck.json").read_text())
    assert report["bottleneck"] == "input_bound"
    assert report["waiting"] == 0.8
    assert report["device_images_per_second"] == 32
    assert report["workers"] == 0
    assert report["loader_images_per_second"] == 8
    expected = "loader.workers=" if report["cores"] > 1 else "process.layout="
    assert report["suggestion"].startswith(expected)
    assert "waits for data" in run.progress["note"]
    # Compute-bound, and too short for the report to be written before the end.
    wait[0], run = 0.001, new_run(tmp_path / "compute_bound")
    changed.train.bottleneck_after_seconds = 1000
    train(changed, tiny, run)
    report = json.loads((run.folder / "bottleneck.json").read_text())
    assert (report["bottleneck"], report["suggestion"], report["steps"]) == (
        "compute_bound",
        "",
        3 * (STEPS - 1),
    )


@pytest.mark.slow
def test_pause_between_steps_is_not_waiting_for_data(
    config, tiny: DatasetReader, tmp_path: Path, monkeypatch
) -> None:
    clock = [0.0]
    step, batch_start = Classifier.training_step, ProgressReporter.on_train_batch_start

    def slow_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        clock[0] += 0.25
        return step(self, batch, batch_idx)

    def pause(self: ProgressReporter, *args: Any) -> None:
        clock[0] += 0.75
        batch_start(self, *args)

    monkeypatch.setattr(Classifier, "training_step", slow_step)
    monkeypatch.setattr(ProgressReporter, "on_train_batch_start", pause)
    monkeypatch.setattr(bottleneck, "_now", lambda device: clock[0])
    # The loader measures its waits on the same clock: how long it really takes depends on the load.
    ticks = itertools.count()
    loader_clock = SimpleNamespace(perf_counter=lambda: clock[0] + 1e-9 * next(ticks))
    monkeypatch.setattr(batch_loader, "time", loader_clock)
    run = new_run(tmp_path / "run")
    train(config(), tiny, run)
    report = json.loads((run.folder / "bottleneck.json").read_text())
    assert report["bottleneck"] == "compute_bound"
    assert report["waiting"] == 0
    assert report["device_images_per_second"] == 8


@pytest.mark.parametrize(
    ("cpus", "workers", "loader", "setup", "expected"),
    [
        (16, 4, 400.0, "slurm", "loader.workers=11"),  # 100 images/s per thread; 1,000 needed, plus 10 %
        (8, 7, 700.0, "slurm", "cluster.cpus_per_task=12"),
        (8, 3, 300.0, "local", "loader.workers=7"),
        # The measured rates would suffice, but the device waits: never suggest fewer workers.
        (16, 14, 1500.0, "slurm", "loader.workers=15"),
        (16, 15, 1500.0, "slurm", "process.layout=shards process.resize=short:256"),
        (8, 7, 700.0, "local", "process.layout=shards process.resize=short:256"),
        (8, 7, 700.0, "local gpu", "process.layout=shards process.resize=short:256"),
        (8, 7, 700.0, "local gpu small", "loader.decode=gpu"),  # the short side is already 256
        (8, 7, 700.0, "local small", ""),  # nothing else is known
        (8, 7, None, "local gpu decode", "process.layout=shards process.resize=short:256"),
        (8, 7, None, "local gpu decode small", ""),
    ],
)
def test_suggestion_by_cpus_workers_rates_and_executor(
    config, cpus, workers, loader, setup, expected
) -> None:
    changed, options = config(), setup.split()
    changed.cluster.executor = options[0]
    changed.loader.decode = "gpu" if "decode" in options else "cpu"
    changed.process.resize = "short:256" if "small" in options else None
    assert bottleneck.suggestion(changed, cpus, workers, loader, 1000.0, "gpu" in options) == expected
