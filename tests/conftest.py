"""What the tests of all rooms share. Its being here also puts this folder on the import path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from door import Door, Gate

# Threads that wait by spinning make a training many times slower beside other work. Read with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
