"""The parts of a training, on a clock that counts: all time is in one of them; limits end epochs early."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from outcomes import new_run

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.time_record import Time, TimeRecord
from hpc_imagenet.training.callbacks import epoch_times
from hpc_imagenet.training.callbacks.epoch_times import PassLimit
from hpc_imagenet.training.fit import fit

pytestmark = pytest.mark.slow


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[TimeRecord]:
    """The records that are written; the clock advances by 1 s, and 2 s of CPU time, whenever it is read."""
    ticks, records = itertools.count(1), []
    monkeypatch.setattr(epoch_times, "_now", lambda: Time(next(ticks), 0) * 1)
    monkeypatch.setattr(epoch_times, "write_record", lambda runs, record: records.append(record))
    return records


def train(
    config: Config, store: DatasetReader, folder: Path, limit: PassLimit | None = None
) -> dict[str, Any]:
    config.tracker = []
    return fit(config, store, new_run(folder / "run"), DistEnv(), limit)


def test_all_time_belongs_to_one_part(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, written: list[TimeRecord]
) -> None:
    train(config(epochs=3), tiny, tmp_path)
    last = written[-1]
    assert [len(written), last.device, last.host != ""] == [2, "CPU", True]
    times = last.train[16]
    epoch = (
        times.batch * 5 + times.overhead + last.validation.batch * 2 + last.validation.overhead + last.after
    )
    total = last.startup + epoch * 3 + times.first + last.validation.first + last.end
    assert total.wall == epoch_times._now().wall - 1


def test_the_time_that_a_run_waited_for_copies_is_no_startup(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, written: list[TimeRecord]
) -> None:
    settings, run = config(epochs=2), new_run(tmp_path / "run")
    settings.tracker, run.waited = [], 1000.0
    for _ in range(1000):
        epoch_times._now()
    fit(settings, tiny, run, DistEnv())
    assert written[-1].startup.wall == 1


def test_the_startup_of_a_later_trial_is_not_the_age_of_its_process(
    config: Callable[..., Config],
    tiny: DatasetReader,
    tmp_path: Path,
    written: list[TimeRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, run = config(epochs=2), new_run(tmp_path / "run")
    settings.tracker, run.follows, run.waited = [], True, 1000.0
    for _ in range(1000):
        epoch_times._now()
    fit(settings, tiny, run, DistEnv())
    assert written[-1].startup.wall == 1
    known = replace(written[-1], startup=Time(70, 30))
    monkeypatch.setattr(epoch_times, "find_record", lambda runs, shape: known)
    second = new_run(tmp_path / "second")
    second.follows = True
    fit(settings, tiny, second, DistEnv())
    assert written[-1].startup == known.startup


def test_a_limit_of_batches_ends_epochs_after_a_validation(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, written: list[TimeRecord]
) -> None:
    result = train(config(epochs=2), tiny, tmp_path, PassLimit(2, 1e9, {"of": "another"}))
    assert result["images_per_second"] > 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    steps_of_validations = [row.split(",")[0] for row in rows if row.split(",")[5]]
    assert steps_of_validations == ["2", "4"]
    assert (written[-1].shape, written[-1].short) == ({"of": "another"}, True)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, ["2", "4"]), (2, ["2", "4"])])
def test_a_limit_of_seconds_ends_epochs_at_the_next_step(
    config: Callable[..., Config],
    tiny: DatasetReader,
    tmp_path: Path,
    written: list[TimeRecord],
    accumulate: int,
    steps: list[str],
) -> None:
    limited = config(epochs=2)
    limited.train.accumulate = accumulate
    train(limited, tiny, tmp_path, PassLimit(10, 0.5, {}))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows if row.split(",")[5]] == steps


def test_a_training_of_one_epoch_writes_nothing(
    config: Callable[..., Config], tiny: DatasetReader, tmp_path: Path, written: list[TimeRecord]
) -> None:
    train(config(epochs=1), tiny, tmp_path)
    assert written == []
