"""Fixtures for tiny trainings."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import new_run, train
from tiny_training import tiny_config, write_store

from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training.callbacks.progress import ProgressReporter

# For loader_data and gpu_report.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
# Deterministic trainings need it. cuBLAS reads it once per process, at the first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=[pytest.param("cpu", id="rehearsal"), pytest.param("cuda", id="gpu", marks=NEEDS_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, as a rehearsal, and the GPU if torch sees one."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DatasetReader:
    """A store of 40 train and 13 val images: five steps of eight images per epoch."""
    return write_store(tmp_path_factory.mktemp("tiny") / "v1", {"train": 40, "val": 13})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config() -> Callable[..., Config]:
    return tiny_config


@pytest.fixture(scope="session")
def reference(tiny: DatasetReader, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """An uninterrupted training as reference: its run and its result."""
    run = new_run(tmp_path_factory.mktemp("reference") / "run")
    return run, train(tiny_config(), tiny, run)


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes the training send itself SIGUSR2 within a given step."""

    def patch(step: int) -> None:
        original = ProgressReporter.on_train_batch_end

        def send_signal(self: ProgressReporter, trainer: Any, *rest: Any) -> None:
            original(self, trainer, *rest)
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGUSR2)

        monkeypatch.setattr(ProgressReporter, "on_train_batch_end", send_signal)

    return patch
