"""Slurm's notation of times, memory and GPUs in settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.slurm_values import parse_gib, parse_gpus, parse_minutes
from hpc_imagenet.config.schema import cluster_for
from hpc_imagenet.errors import UserError


@pytest.mark.parametrize(
    ("value", "minutes"),
    [
        (90, 90),
        ("90", 90),
        ("24:00:00", 1440),
        ("1-00:00:00", 1440),
        ("2-12", 3600),
        ("1-02:30", 1590),
        ("30:00", 30),
        ("0:30:00", 30),
        ("00:00:59", 1),
        ("10:30", 11),
    ],
)
def test_times_are_read_as_sbatch_reads_them(value: object, minutes: int) -> None:
    assert parse_minutes(value) == minutes


@pytest.mark.slow
@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59))
def test_days_hours_and_minutes_add_up(days: int, hours: int, minutes: int) -> None:
    assert parse_minutes(f"{days}-{hours:02}:{minutes:02}:00") == (24 * days + hours) * 60 + minutes


@pytest.mark.parametrize(
    ("value", "gib"),
    [(64, 64), (0.5, 0.5), ("64", 64), ("64G", 64), ("512M", 0.5), ("1T", 1024), ("8GiB", 8)],
)
def test_memory_takes_slurms_units(value: object, gib: float) -> None:
    assert parse_gib(value) == gib


def test_gpus_take_a_type() -> None:
    assert (parse_gpus(4), parse_gpus("4"), parse_gpus("a100:4")) == (4, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.time=soon", "cluster.time=soon is not a time: minutes, MM:SS, HH:MM:SS"),
        ("cluster.time=1.5", "cluster.time=1.5 is not a time"),
        ("cluster.time=true", "cluster.time=True is not a time"),
        ("cluster.time=0:00", "cluster.time=0 is too small: at least 1"),
        ("cluster.memory_gb=64X", "cluster.memory_gb=64X is not an amount of memory"),
        ("cluster.gpus_per_node=a100:x", "cluster.gpus_per_node=a100:x is not a number of GPUs"),
        ("cluster.gpus_per_node=-1", "cluster.gpus_per_node=-1 is not a number of GPUs"),
        ("+cluster.stage.train={time: soon}", "cluster.stage.train.time=soon is not a time"),
        ("session.time=soon", "session.time=soon is not a time"),
    ],
)
def test_a_value_that_slurm_would_not_take_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["cluster=slurm", override])
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_cluster_takes_slurms_notation_and_jobs_get_numbers() -> None:
    (config,) = compose(
        [
            "cluster=slurm",
            "cluster.time=1-12:00:00",
            "cluster.memory_gb=512M",
            "cluster.gpus_per_node=a100:4",
            "+cluster.stage.train={time: '12:00:00', gpus_per_node: 2}",
        ]
    )
    cluster = cluster_for(config, "download")
    assert (cluster.time, cluster.memory_gb, cluster.gpus_per_node) == (2160, 0.5, 0)
    train = cluster_for(config, "train")
    assert (train.time, train.gpus_per_node, train.gpu_type) == (720, 2, "a100")


@pytest.mark.slow
def test_a_session_takes_them_too() -> None:
    (config,) = compose(["cluster=slurm", "+stage=session", "session.time=2:00:00", "session.gpus=v100:1"])
    cluster = cluster_for(config, "session")
    assert (cluster.time, cluster.gpus_per_node, cluster.gpu_type) == (122, 1, "v100")


@pytest.mark.slow
@pytest.mark.parametrize("line", ["time: 24:00:00", "stage: {train: {time: 12:00:00, nodes: 1}}"])
def test_a_time_that_yaml_would_misread_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    path = tmp_path / "cluster" / "mine.yaml"
    path.write_text(f"defaults: [slurm]\n{line} # per job\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 2: YAML reads time: \d\d:00:00 as .* in quotes"):
        compose(["cluster=mine"], config_dir=str(tmp_path))
    path.write_text(
        "defaults: [slurm]\n" + line.replace("24:00:00", '"24:00:00"').replace("12:00:00", '"12:00:00"')
    )
    (config,) = compose(["cluster=mine"], config_dir=str(tmp_path))
    assert cluster_for(config, "train").time in (1440, 720)
