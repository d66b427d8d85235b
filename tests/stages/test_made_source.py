from __future__ import annotations

import threading
from pathlib import Path

import pytest
from run_stage import assert_complete, config_of, run_stage, stage_error

from hpc_imagenet.config.schema import Config
from hpc_imagenet.stages.work import download

pytestmark = pytest.mark.slow


def test_dataset_make_creates_the_source(tmp_path: Path) -> None:
    source = tmp_path / "sources" / "digits"
    config = config_of(tmp_path, source, make="hpc_imagenet.demo.digits:write_digits")
    run_stage(download, config)
    assert_complete(tmp_path, source)
    for function in ("hpc_imagenet.demo.digits:wrong", "nowhere:x", "nothing"):
        error = stage_error(download, config_of(tmp_path / "b", tmp_path / "c", make=function))
        assert f"dataset.make={function}" in error


def test_several_datasets_of_one_source_make_it_once(tmp_path: Path, source: Path) -> None:
    made, both = tmp_path / "sources" / "digits", threading.Barrier(2)
    configs = [
        config_of(tmp_path / name, made, make="hpc_imagenet.demo.digits:write_digits") for name in "ab"
    ]
    errors: list[BaseException] = []

    def run(config: Config) -> None:
        try:
            both.wait(60)
            run_stage(download, config)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for name in "ab":
        assert_complete(tmp_path / name, source)
