"""What the tests of all rooms share. Its being here also puts this folder on the import path."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from door import Door, Gate
from hypothesis import settings

# How long an example takes says how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Other programs' complaints are compared with what they say in English.
os.environ["LC_ALL"] = "C.UTF-8"

# Threads that wait by spinning make a training many times slower beside other work. Read with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts what is in its background deaf to interrupts, and so would be whatever is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, where several processes share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _share(item.nodeid) != SLURM)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole files, and one of them all that needs the Slurm lab."""
    from xdist.scheduler import LoadFileScheduling

    class Shares(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _share(nodeid)

    return Shares(config, log)


SLURM = "tests/slurm"


def _share(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return SLURM if file.startswith(f"{SLURM}/") else file


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path / "workspace")
    yield door
    door.close()


@pytest.fixture
def gate() -> Iterator[tuple[Gate, str]]:
    """A server that holds its clients until the test opens it, and its URL."""
    gate = Gate()
    with gate.serve() as url:
        yield gate, url
