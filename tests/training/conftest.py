"""The fixtures of a tiny training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_training import tiny_config, write_store

from hpc_imagenet.config import Config
from hpc_imagenet.datastore.store import Store


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """40 train and 13 val images: five steps of eight."""
    return write_store(tmp_path_factory.mktemp("tiny") / "v1", {"train": 40, "val": 13})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config() -> Callable[..., Config]:
    return tiny_config
