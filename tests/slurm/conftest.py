"""Fixtures for tests against a real Slurm: one lab (a private cluster) per session, reset after each test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import LAB, Lab, LabDoor

# Slurm calls it with -s SUBJECT RECIPIENT; the tests name a file as the recipient.
MAIL = '#!/bin/sh\nprintf "%s\\n" "$2" >> "$3"\n'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The lab of this test session, shut down at its end."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))  # short: socket paths are limited to 108 bytes
    try:
        (folder / "mail").write_text(MAIL)
        (folder / "mail").chmod(0o755)
        # 30 s between SIGTERM and SIGKILL, Slurm's default: time to save on a busy machine.
        yield Lab(folder, "KillWait=30", f"MailProg={folder}/mail")
    finally:
        subprocess.run([LAB, "--dir", folder, "down"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Iterator[LabDoor]:
    """The command line on the lab, with a workspace shared by all nodes."""
    cli = LabDoor(tmp_path / "workspace", lab)
    yield cli
    cli.close()


@pytest.fixture(scope="session")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabDoor]:
    """The command line on the lab, with a datastore of the digits in its workspace."""
    cli = LabDoor(tmp_path_factory.mktemp("site") / "workspace", lab)
    # Run the stages in this process; their jobs are tested elsewhere.
    for stage in ("download", "process", "upload"):
        cli(f"+stage={stage}", "dataset=digits", "cluster=foreground")
    yield cli
    cli.close()


@pytest.fixture(autouse=True)
def _reset_lab_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").reset()
