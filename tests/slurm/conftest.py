"""Tests against a real Slurm: one lab for all of them, calm again after each."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import LAB, Lab, LabDoor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A lab of this session's own, gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))  # short: it holds sockets
    try:
        # As on other clusters: who is told to end has the time to save, however busy this machine is.
        yield Lab(folder, "KillWait=30")
    finally:
        subprocess.run([LAB, "--dir", folder, "down"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Iterator[LabDoor]:
    """The package on the lab, with a workspace that all nodes see."""
    door = LabDoor(tmp_path / "workspace", lab)
    yield door
    door.close()


@pytest.fixture(scope="session")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabDoor]:
    """The package on the lab, with a datastore of the digits in its workspace."""
    door = LabDoor(tmp_path_factory.mktemp("site") / "workspace", lab)
    # Made by the stages themselves, in this process: how they fare as jobs is tested elsewhere.
    for stage in ("download", "process", "upload"):
        door(f"+stage={stage}", "dataset=digits", "cluster=foreground")
    yield door
    door.close()


@pytest.fixture(autouse=True)
def _calm_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").calm()
