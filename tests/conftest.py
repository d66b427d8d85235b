"""What the tests of all rooms share. Its being here also puts this folder on the import path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from door import Door, Gate


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
