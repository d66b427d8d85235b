"""Run a data stage in this process, with a config as the command line composes it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.data.download import receipt
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run

NAME = "numbers"  # of the dataset

FILES = {
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}


@functools.cache
def _composed() -> Config:
    return compose(["dataset=ilsvrc", f"dataset.name={NAME}", "dataset.source=x", "workspace=x"])[0]


def config_of(
    workspace: Path,
    source: str | Path,
    *,
    make: str | None = None,
    layout: str = "index",
    **pins: dict[str, Any],
) -> Config:
    """Return the config of three archives; `pins` set file, md5 or bytes of train, val or devkit."""
    config = copy.deepcopy(_composed())
    config.workspace, config.dataset.source, config.dataset.make = str(workspace), str(source), make
    config.dataset.hint = "the hint"
    config.download.retries, config.download.timeout = 0, 60
    config.process.layout, config.process.workers = layout, 1
    for split, values in pins.items():
        for field, value in values.items():
            setattr(config.dataset.archives[split], field, value)
    return config


def run_of(config: Config) -> Run:
    run = Run(Path(config.workspace) / "runs" / "abc-stage")
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def run_stage(stage: ModuleType, config: Config) -> dict[str, Any]:
    result: dict[str, Any] = stage.run(config, run_of(config), DistEnv())
    return result


def stage_error(stage: ModuleType, config: Config) -> str:
    """Return the one line with which the stage refuses."""
    with pytest.raises(UserError) as caught:
        run_stage(stage, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_complete(workspace: Path, source: Path) -> None:
    """Assert that the archives of the source, their receipts and nothing else have been downloaded."""
    folder = workspace / "archives" / "numbers"
    for file in FILES.values():
        assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert not receipt.missing_receipts(folder, FILES.values())
    assert len(list(folder.iterdir())) == 6, list(folder.iterdir())
