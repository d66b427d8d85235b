"""Records of times: which trainings share one, sizes that were not timed, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import cluster_for
from hpc_imagenet.runs.time_record import (
    PassTime,
    Time,
    TimeRecord,
    find_record,
    record_path,
    training_shape,
    write_record,
)

pytestmark = pytest.mark.slow


def shape(*overrides: str) -> dict[str, Any]:
    (config,) = compose(["dataset=digits", "cluster=local", *overrides])
    config.datastore.content = "c0ffee00"
    return training_shape(config, cluster_for(config, "train"))


def record(train: dict[int, float], **values: Any) -> TimeRecord:
    times = {size: PassTime(Time(seconds, 2 * seconds), Time(0.5, 0.5)) for size, seconds in train.items()}
    fixed = {"run": "c0ffee00-price-resnet18", "host": "n1", "device": "CPU", "cpus": 2, "shape": shape()}
    parts = {"validation": PassTime(Time(0.1, 0.1)), "after": Time(1, 1), "startup": Time(9, 5)}
    return TimeRecord(**{**fixed, **parts, "end": Time(), "train": times, **values})


@pytest.mark.parametrize(
    "same",
    ["seed=3", "recipe.epochs=90", "recipe.learning_rate=1", "cluster.time=5", "recipe.label_smoothing=0"],
)
def test_settings_without_an_effect_on_the_speed_share_a_record(same: str) -> None:
    assert shape(same) == shape()


@pytest.mark.parametrize(
    "other",
    [
        *("model=resnet50", "recipe.size=32", "recipe.global_batch=32", "recipe.precision=bf16-mixed"),
        *("cluster.nodes=2", "cluster.tasks_per_node=2", "cluster.cpus_per_task=1", "cluster.parallel=2"),
        *("model.compile=true", "loader.workers=3", "cluster.scratch=/tmp", "recipe.mixup=0.2"),
        *("recipe.optimizer=adamw", "recipe.start_size=8", "train.accumulate=2", "recipe.ema=0.9"),
    ],
)
def test_settings_with_an_effect_on_the_speed_do_not(other: str) -> None:
    grow = ["recipe.grow_from=1", "recipe.grow_to=2"] if "start_size" in other else []
    assert shape(other, *grow) != shape()


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record({16: 0.2, 24: 0.4}, staged=(3, 4), waiting=0.25, suggestion="loader.workers=2")
    write_record(tmp_path, written)
    assert find_record(tmp_path, shape()) == written
    assert find_record(tmp_path, shape("recipe.size=32")) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("version", 0), ("train", {}), ("train", {"x": {}}), ("startup", {"wall": "soon", "cpu": 1})),
        *(("after", {"wall": float("nan"), "cpu": 1}), ("staged", [1]), ("cpus", 0), ("shape", {})),
        *(("more", 1), ("validation", None)),
    ],
)
def test_a_damaged_record_is_none(tmp_path: Path, name: str, value: Any) -> None:
    write_record(tmp_path, record({16: 0.2}))
    path = record_path(tmp_path, shape())
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert find_record(tmp_path, shape()) is None


def test_a_record_of_this_user_comes_before_that_of_another(tmp_path: Path) -> None:
    mine, other = record({16: 0.2}), record({16: 0.4})
    write_record(tmp_path, other)
    record_path(tmp_path, shape()).parent.rename(tmp_path / ".times-1")  # a user with another number
    assert find_record(tmp_path, shape()) == other
    write_record(tmp_path, mine)
    assert find_record(tmp_path, shape()) == mine
    record_path(tmp_path, shape()).write_text("{}")
    assert find_record(tmp_path, shape()) == other


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', "{"])
def test_a_file_that_is_no_record_is_none(tmp_path: Path, content: str) -> None:
    path = record_path(tmp_path, shape())
    path.parent.mkdir()
    path.write_text(content)
    assert find_record(tmp_path, shape()) is None


def test_sizes_that_were_not_timed_cost_as_their_pixels() -> None:
    one = record({16: 0.2})
    assert one.epoch(16).batch.wall == pytest.approx(0.2)
    assert one.epoch(32).batch.wall == pytest.approx(0.8)
    two = record({10: 0.1 + 0.001 * 100, 30: 0.1 + 0.001 * 900})  # 0.1 s and 1 ms a pixel
    for size in (20, 40):
        assert two.epoch(size).batch.wall == pytest.approx(0.1 + 0.001 * size**2)
        assert two.epoch(size).batch.cpu == pytest.approx(2 * (0.1 + 0.001 * size**2))
    steep = replace(two, train={20: PassTime(Time(0.1, 0.1)), 24: PassTime(Time(0.9, 0.9))})
    assert steep.epoch(8).batch.wall > 0  # below zero on the line
